"""The known ways to hurt such servers: each is refused or does nothing, and the server goes on.

Paths around the key are in test_gate.py, floods and lies on the wire in test_connections.py, adapters' paths in
test_adapters.py.
"""

from __future__ import annotations

import json
import os
import socket
import threading

import httpx
import psutil
import pytest
from test_deploy import server_process

CHAT, RESPONSES, MESSAGES = "/v1/chat/completions", "/v1/responses", "/v1/messages"
HI = [{"role": "user", "content": "hi"}]
JSON = {"content-type": "application/json"}


def chat(web, content, **more):
    return web.post(CHAT, json={"messages": [{"role": "user", "content": content}], "temperature": 0, **more})


@pytest.fixture(scope="module")
def web(url):
    with httpx.Client(base_url=url, timeout=60) as client:
        yield client


def environment() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name != "PYTEST_CURRENT_TEST"}


@pytest.fixture(autouse=True)
def still_answers(web):
    before = environment()
    yield
    assert environment() == before, "a request has written to the environment"
    assert chat(web, "hi").json()["choices"][0]["message"]["content"] == "hi"


@pytest.fixture
def trap():
    """A server that nobody may call: gives its address, and fails the test when somebody has."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(0.05)
        yield f"http://127.0.0.1:{listener.getsockname()[1]}/latest/meta-data"
        with pytest.raises(TimeoutError):
            listener.accept()


@pytest.mark.parametrize("target", ["trap", "http://169.254.169.254/latest", "file:///etc/passwd", "ftp://x/y"])
def test_no_url_is_ever_fetched(web, trap, target):
    address = trap if target == "trap" else target
    parts = {
        CHAT: [
            {"type": "image_url", "image_url": {"url": address}},
            {"type": "image_url", "image_url": address},
            {"type": "input_audio", "input_audio": {"data": address, "format": "wav"}},
            {"type": "video_url", "video_url": {"url": address}},
            {"type": "file", "file": {"file_id": address}},
        ],
        RESPONSES: [{"type": "input_image", "image_url": address}, {"type": "input_file", "file_url": address}],
        MESSAGES: [
            {"type": "image", "source": {"type": "url", "url": address}},
            {"type": "document", "source": {"type": "url", "url": address}},
        ],
    }
    for path, kinds in parts.items():
        for part in kinds:
            turns = [{"role": "user", "content": [{**part, "text": "look"}]}]
            body = {"input": turns} if path == RESPONSES else {"messages": turns, "max_tokens": 2}
            answer = web.post(path, json=body)
            assert answer.status_code == 400, answer.text
            assert "content[0]" in answer.text
    tools = [{"type": "mcp", "server_label": "x", "server_url": address}]
    assert web.post(RESPONSES, json={"input": "a", "tools": tools}).status_code == 400
    callback = {"x-forwarded-for": address, "x-request-id": address, "traceparent": address, "referer": address}
    assert chat(web, address, user=address).status_code == 200
    assert web.get("/v1/models", headers=callback).status_code == 200


@pytest.mark.parametrize(
    "text",
    [
        "{{ 7 * 7 }}",
        "{% for i in range(10**9) %}x{% endfor %}",
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.__init__.__globals__ }}",
        "${jndi:ldap://x/y}",
        "%s%n%x",
        "\x00\x1b[2J",
    ],
)
def test_what_a_user_writes_is_text_and_no_template(web, text):
    assert chat(web, text).json()["choices"][0]["message"]["content"] == text.partition("\x03")[0]
    body = {"messages": HI, "chat_template": text}
    assert web.post(CHAT, json=body).status_code == 400


@pytest.mark.parametrize("role", ["{{ 7 }}", "system\x03user", "user\n", "__class__"])
def test_a_role_is_one_of_the_known(web, role):
    assert web.post(CHAT, json={"messages": [{"role": role, "content": "a"}]}).status_code == 400
    assert web.post(RESPONSES, json={"input": [{"role": role, "content": "a"}]}).status_code == 400


def nested(depth, inside="1"):
    return '{"a": ' * depth + inside + "}" * depth


@pytest.mark.parametrize("depth", [50, 150, 900, 5_000, 100_000])
@pytest.mark.parametrize("path", [CHAT, RESPONSES, MESSAGES, "/v1/completions", "/v1/embeddings", "/tokenize"])
def test_json_has_a_bottom(web, path, depth):
    needed = {
        CHAT: '"messages": [{"role": "user", "content": "hi", "extra": %s}]',
        RESPONSES: '"input": "hi", "tools": [{"type": "function", "name": "f", "parameters": %s}]',
        MESSAGES: '"max_tokens": 2, "messages": [{"role": "user", "content": "hi"}], "metadata": %s',
    }.get(path, '"prompt": "hi", "input": "hi", "extra": %s')
    answer = web.post(path, content="{" + needed % nested(depth) + "}", headers=JSON, timeout=30)
    assert answer.status_code == (200 if depth == 50 and path != "/v1/embeddings" else 400), answer.text[:500]


@pytest.mark.parametrize(
    "more",
    [
        {"stop": ["x"] * 10_000},
        {"stop": "x" * 1_000_000},
        {"stop_token_ids": list(range(200)) * 1000},
        {"logit_bias": {str(i % 250): 1 for i in range(250)} | {str(10**9): 1}},
        {"logit_bias": {str(i): 0 for i in range(300_000)}},
        {"allowed_token_ids": [1] * 1_000_000},
        {"n": 128, "stop": ["a" * 1000] * 64},
        {"seed": 10**400},
        {"temperature": 1e308},
        {"max_tokens": 2**63},
        {"top_k": 2**63},
        {"priority": 2**100},
        {"cache_salt": "x" * 1_000_000},
        {"user": "x" * 1_000_000},
        {"model": "x" * 1_000_000},
        {"x" * 10_000: 1},
        {f"x{i}\r\nset-cookie: a=b": 1 for i in range(1000)},
    ],
    ids=lambda more: next(iter(more))[:20].split("\r")[0],
)
def test_much_of_a_field_is_refused_or_harmless(web, more):
    answer = web.post(CHAT, json={"messages": HI, "max_tokens": 2, **more}, timeout=30)
    assert answer.status_code in (200, 400, 404), answer.text[:500]
    assert len(answer.content) < 2000 and "set-cookie" not in answer.headers
    assert sum(len(k) + len(v) for k, v in answer.headers.items()) < 8192


GIANT = "<" * 1_000_000
TOOL = {"type": "function", "function": {"name": "f", "description": GIANT}}


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        (CHAT, {"messages": [{"role": "user", "content": GIANT}]}, "messages"),
        (CHAT, {"messages": [{"role": "user", "content": [{"type": "text", "text": GIANT}]}]}, "messages"),
        (CHAT, {"messages": HI, "tools": [TOOL]}, "messages"),
        (RESPONSES, {"input": GIANT}, "input"),
        ("/v1/completions", {"prompt": ["a", GIANT]}, "prompt[1]"),
    ],
)
def test_a_text_that_cannot_fit_is_refused_before_its_tokens_are_counted(web, path, body, param):
    answer = web.post(path, json=body)
    error = answer.json()["error"]
    assert answer.status_code == 400 and error["param"] == param and error["code"] == "context_length_exceeded"
    assert error["message"].startswith(f"{param}: 1000") and "characters" in error["message"]


def test_long_lists_end_early(web):
    for name, body in (
        ("messages", {"messages": HI * 5000}),
        ("tools", {"messages": HI, "tools": [{"function": {"name": "f"}}] * 129}),
    ):
        error = web.post(CHAT, json=body).json()["error"]
        assert error["param"] == name and "should have at most" in error["message"]


def test_numbers_that_are_none(web):
    for value in ("NaN", "Infinity", "-Infinity", "1e999", "1" * 5000):
        content = f'{{"messages": [{{"role": "user", "content": "hi"}}], "temperature": {value}}}'
        assert web.post(CHAT, content=content, headers=JSON).status_code == 400


def test_keys_twice_and_bytes_that_are_no_text(web):
    twice = b'{"messages": [], "messages": [{"role": "user", "content": "hi"}], "temperature": 0}'
    assert web.post(CHAT, content=twice, headers=JSON).status_code in (200, 400)
    for content in (b'{"messages": "\xff\xfe"}', '{"messages": []}'.encode("utf-16"), b"\x1f\x8b" + b"\0" * 100):
        answer = web.post(CHAT, content=content, headers=JSON)
        assert answer.status_code == 400


def test_a_compressed_body_is_not_unpacked(web):
    answer = web.post(CHAT, content=b"\x1f\x8b" + b"\0" * 100, headers={**JSON, "content-encoding": "gzip"})
    assert answer.status_code == 400


def test_fifty_hostile_requests_at_once_hurt_nobody(web, backend):
    bodies = [{"messages": HI, "n": 128, "max_tokens": 1, "stop": "zz"}, {"messages": [0] * 10_000}, {"stop": []}]
    seen = []

    def attack(i):
        seen.append(web.post(CHAT, content=json.dumps(bodies[i % 3]), headers=JSON, timeout=60).status_code)

    threads = [threading.Thread(target=attack, args=(i,)) for i in range(50)]
    for thread in threads:
        thread.start()
    assert chat(web, "hi").status_code == 200
    for thread in threads:
        thread.join()
    assert set(seen) <= {200, 400} and len(seen) == 50
    assert backend.stats().kv_blocks_used == 0


def test_a_killed_server_leaves_no_orphan():
    schema = {"type": "json_schema", "json_schema": {"name": "a", "schema": {"type": "object"}}}
    with server_process(delay=0.02) as (process, address):
        httpx.post(address + CHAT, json={"messages": HI, "max_tokens": 3, "response_format": schema}, timeout=60)
        family = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
        process.kill()
        process.wait()
        _, alive = psutil.wait_procs(family, timeout=5)
        assert alive == []
