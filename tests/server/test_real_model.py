"""The official client against the default model on the native engine, over HTTP."""

from __future__ import annotations

import contextlib
import subprocess
import sys
import threading

import httpx
import openai
import psutil
import pytest
from live_server import live, until

from martlet import backends, chat
from martlet.runners.base import LoadOptions
from martlet.server import create_app
from martlet.server.sockets import bind

PROMPTS = ["Say hello.", "Repeat exactly: 🦆🎉👩‍👩‍👧", "请用中文说你好。", "Count: 1, 2, 3"]
MODEL = "smollm2-135m-instruct"


@pytest.fixture(scope="module")
def backend():
    load = LoadOptions(device="cpu", dtype="float32", max_model_len=512, max_num_seqs=8, kv_cache_tokens=4096)
    backend = backends.load(MODEL, load=load)
    yield backend
    backend.close()


@pytest.fixture(scope="module")
def client(backend):
    with live(create_app(backend, chat.template_for(backend.card, backend.tokenizer))) as url:
        yield openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=60)


def ask(text, **more):
    return {"model": MODEL, "messages": [{"role": "user", "content": text}], "max_tokens": 8, **more}


def streamed(client, request):
    chunks = client.chat.completions.create(**request, stream=True)
    return "".join(choice.delta.content or "" for chunk in chunks for choice in chunk.choices)


@pytest.mark.parametrize("how", [{"temperature": 0}, {"temperature": 1.2, "seed": 11}], ids=["greedy", "seeded"])
@pytest.mark.parametrize("text", PROMPTS)
def test_stream_equals_plain(client, text, how):
    request = ask(text, **how)
    plain = client.chat.completions.create(**request)
    assert plain.choices[0].message.content
    assert streamed(client, request) == plain.choices[0].message.content
    assert plain.choices[0].finish_reason in ("stop", "length")


def test_emoji_and_cjk_through_raw_prompts(client):
    for prompt in ("🦆🎉🦆🎉🦆🎉🦆", "你好，世界。你好，世界。你好，"):
        request = {"model": MODEL, "prompt": prompt, "max_tokens": 16, "temperature": 0, "logprobs": 0}
        choice = client.completions.create(**request).choices[0]
        chunks = client.completions.create(**request, stream=True)
        assert "".join(c.choices[0].text for c in chunks) == choice.text
        assert not choice.text.isascii()
        assert len(choice.logprobs.tokens) == 16


def test_a_stop_string_cut_across_tokens(client):
    request = ask("What is the capital of France?", temperature=0, logprobs=True)
    choice = client.chat.completions.create(**request).choices[0]
    tokens = [entry.token for entry in choice.logprobs.content]
    assert b"".join(bytes(entry.bytes) for entry in choice.logprobs.content).decode() == choice.message.content
    stop = tokens[3][-1] + tokens[4] + tokens[5][:2]
    before = choice.message.content.split(stop)[0]
    request = ask("What is the capital of France?", temperature=0, stop=stop)
    cut = client.chat.completions.create(**request).choices[0]
    assert (cut.message.content, cut.finish_reason, cut.stop_reason) == (before, "stop", stop)
    assert streamed(client, request) == before


def test_eight_at_once_equal_each_alone(client, backend):
    requests = [ask(f"{text} ({i})", temperature=0, max_tokens=6) for i, text in enumerate(PROMPTS * 2)]
    alone = [streamed(client, request) for request in requests]
    together = [""] * len(requests)

    def run(at):
        together[at] = streamed(client, requests[at])

    threads = [threading.Thread(target=run, args=(at,)) for at in range(len(requests))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert together == alone
    assert backend.stats().kv_blocks_used == 0


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_frees_the_memory_within_a_step(client, backend, stream):
    request = ask("Tell me a very long story.", temperature=0, stream=stream)
    request |= {"max_tokens": 400, "extra_body": {"ignore_eos": True}}
    leaving = openai.OpenAI(base_url=client.base_url, api_key="none", max_retries=0, timeout=0.7)
    if stream:
        with leaving.chat.completions.create(**request) as chunks:
            next(iter(chunks))
            assert backend.stats().kv_blocks_used > 0
            steps = backend.stats().steps
    else:
        with pytest.raises(openai.APITimeoutError):
            leaving.chat.completions.create(**request)
        steps = backend.stats().steps
    until(lambda: backend.stats().kv_blocks_used == 0)
    assert backend.stats().running == 0
    assert backend.stats().steps <= steps + 3  # the one under way, and one or two before the closed socket is noticed


def test_a_killed_server_takes_its_grammar_workers_along():
    with bind("127.0.0.1", 0) as free:
        url = f"http://127.0.0.1:{free.getsockname()[1]}"
    words = ["--port", url.rpartition(":")[2], "--device", "cpu", "--max_model_len", "512", "--kv_cache_tokens", "2048"]
    process = subprocess.Popen([sys.executable, "-m", "martlet", "deploy", *words], stderr=subprocess.DEVNULL)
    try:
        until(lambda: process.poll() is not None or is_up(url), 60)
        schema = {"type": "json_schema", "json_schema": {"name": "a", "schema": {"type": "boolean"}}}
        answer = httpx.post(f"{url}/v1/chat/completions", json=ask("Yes?", response_format=schema), timeout=60)
        assert answer.json()["choices"][0]["message"]["content"] in ("true", "false")
        family = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
        assert any("martlet.grammar.worker" in each.cmdline() for each in family)
        process.kill()
        _, alive = psutil.wait_procs(family, timeout=10)
        assert alive == []
    finally:
        process.kill()
        process.wait()


def is_up(url) -> bool:
    with contextlib.suppress(httpx.TransportError):
        return httpx.get(f"{url}/health").status_code == 200
    return False
