"""Clients that leave, steps that fail, engines that hang, queues that are full, and what is said of them."""

from __future__ import annotations

import json
import logging
import socket
import threading

import httpx
import openai
import pytest
from live_server import live, until

from fake_backend import EchoRunner, FakeBackend, FakeTemplate
from martlet.engine.options import EngineOptions
from martlet.engine.request import Stats
from martlet.server import create_app
from martlet.server.operations import condition

HI = [{"role": "user", "content": "hi"}]
ENDLESS = {"messages": HI, "temperature": 0, "ignore_eos": True}


@pytest.fixture
def backend():
    backend = FakeBackend(options=EngineOptions(max_num_queued=2))
    yield backend
    backend.close()
    assert backend.runner.closed


@pytest.fixture
def url(backend):
    with live(create_app(backend, FakeTemplate())) as address:
        yield address


def post(url, body, **more):
    return httpx.post(f"{url}/v1/chat/completions", json=body, **more)


def send_and_leave(url, body, wait_until):
    """A client that closes its connection once `wait_until` is true."""
    host, port = url.removeprefix("http://").split(":")
    raw = json.dumps(body).encode()
    with socket.create_connection((host, int(port))) as connection:
        head = "POST /v1/chat/completions HTTP/1.1", "Host: x", "Content-Type: application/json"
        connection.sendall("\r\n".join([*head, f"Content-Length: {len(raw)}", "", ""]).encode() + raw)
        until(wait_until)


@pytest.mark.parametrize("more", [{"stream": True}, {"stream": False}, {"stream": True, "n": 4}])
def test_a_client_that_leaves_frees_its_memory_within_a_step(backend, url, more):
    backend.runner.delay = 0.05
    send_and_leave(url, {**ENDLESS, **more}, lambda: backend.stats().running == more.get("n", 1))
    assert backend.stats().kv_blocks_used > 0
    steps = backend.stats().steps
    until(lambda: backend.stats().running == 0)
    stats = backend.stats()
    assert stats.steps <= steps + 2  # the one under way when the client left, and the one that told of the abort
    assert stats.kv_blocks_used == 0
    assert stats.finished == {"abort": 1}
    backend.runner.delay = 0.0
    assert post(url, {"messages": HI, "temperature": 0}).status_code == 200


def test_a_client_that_leaves_the_queue_is_forgotten(backend, url):
    backend.runner.delay = 0.02
    with httpx.stream("POST", f"{url}/v1/chat/completions", json={**ENDLESS, "stream": True, "n": 16}) as running:
        news = running.iter_bytes()  # kept: httpx closes the connection with its iterator
        next(news)
        until(lambda: backend.stats().running == 16)
        send_and_leave(url, ENDLESS, lambda: backend.stats().waiting == 1)
        until(lambda: backend.stats().waiting == 0)
        assert backend.stats().finished == {"abort": 1}
        assert backend.stats().running == 16


def test_a_failing_step_is_a_500_with_an_id_and_no_detail(backend, url, caplog):
    backend.runner.fail_on = b"poison"
    answers = {}

    def ask(text):
        answers[text] = post(url, {"messages": [{"role": "user", "content": text}], "temperature": 0})

    with caplog.at_level(logging.INFO):
        ask("poison")
        ask("healthy")
    error = answers["poison"].json()["error"]
    assert answers["poison"].status_code == 500
    assert error["code"] == "internal_error" and error["type"] == "server_error"
    request_id = answers["poison"].headers["x-request-id"]
    assert request_id in error["message"] and "secret" not in answers["poison"].text
    assert any(request_id in r.message and r.exc_info and "secret" in str(r.exc_info[1]) for r in caplog.records)
    assert any(r.message.startswith(request_id) and "finish=error" in r.message for r in caplog.records)
    assert answers["healthy"].json()["choices"][0]["message"]["content"] == "healthy"


def test_a_poisoned_request_hurts_only_itself(backend, url):
    backend.runner.delay, backend.runner.fail_on = 0.01, b"poison"
    texts, answers = ["one healthy stream", "two", "three of them"], {}

    def ask(text):
        stream = text != "two"
        body = {"messages": [{"role": "user", "content": text}], "temperature": 0, "stream": stream}
        answers[text] = post(url, body, timeout=30)

    threads = [threading.Thread(target=ask, args=(text,)) for text in (*texts, "poison")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert answers["poison"].status_code == 500  # no event of the stream had been sent
    error = answers["poison"].json()["error"]
    assert error["code"] == "internal_error" and "secret" not in answers["poison"].text
    assert answers["two"].json()["choices"][0]["message"]["content"] == "two"
    for text in (texts[0], texts[2]):
        events = [json.loads(line[6:]) for line in answers[text].text.splitlines() if line.startswith("data: {")]
        assert "".join(event["choices"][0]["delta"].get("content") or "" for event in events) == text
    assert httpx.get(f"{url}/health").json() == {"status": "ok"} and backend.stats().kv_blocks_used == 0


def test_an_error_in_mid_stream_is_an_event_and_the_end(backend, url):
    backend.runner.delay = 0.01
    body = {**ENDLESS, "stream": True}
    with httpx.stream("POST", f"{url}/v1/chat/completions", json=body) as response:
        lines = response.iter_lines()
        first = next(lines)
        backend.runner.fail_on = b"hi"
        events = [line for line in (first, *lines) if line]
    error = json.loads(events[-1].removeprefix("data: "))["error"]
    assert error["code"] == "internal_error" and "secret" not in error["message"]
    assert not any("[DONE]" in event for event in events)
    assert all("choices" in json.loads(event.removeprefix("data: ")) for event in events[:-1])
    backend.runner.fail_on = b""
    client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
    stream = client.chat.completions.create(model="echo", messages=HI, stream=True, extra_body={"ignore_eos": True})
    with pytest.raises(openai.APIError):
        for _ in stream:
            backend.runner.fail_on = b"hi"


def test_a_full_queue_is_a_429_with_retry_after(backend, url):
    backend.runner.delay = 0.02
    with httpx.stream("POST", f"{url}/v1/chat/completions", json={**ENDLESS, "stream": True, "n": 16}) as running:
        news = running.iter_bytes()  # kept: httpx closes the connection with its iterator
        next(news)
        until(lambda: backend.stats().running == 16)
        prompts = {"prompt": ["a", "b", "c"]}
        response = httpx.post(f"{url}/v1/completions", json=prompts)
        assert response.status_code == 429
        assert int(response.headers["retry-after"]) >= 1
        assert response.json()["error"]["type"] == "rate_limit_error"
        assert backend.stats().waiting == 0  # none of the three was queued
    assert httpx.post(f"{url}/v1/completions", json={"prompt": ["a", "b"]}).status_code == 200


def test_health_tells_of_an_engine_that_fails_and_recovers(backend, url):
    backend.runner.fail_on = b"hi"
    for _ in range(3):
        assert post(url, {"messages": HI}).status_code == 500
    response = httpx.get(f"{url}/health")
    assert response.status_code == 503 and response.json()["status"] == "error"
    backend.runner.fail_on = b""
    assert post(url, {"messages": HI}).status_code == 200
    assert httpx.get(f"{url}/health").json() == {"status": "ok"}


def test_health_while_the_engine_is_closed(backend, url):
    backend.close()
    assert post(url, {"messages": HI}).status_code == 500


@pytest.mark.parametrize(
    ("stats", "draining", "state"),
    [
        (Stats(), False, "ok"),
        (Stats(busy_seconds=5), False, "ok"),
        (Stats(busy_seconds=600), False, "stuck"),
        (Stats(error="dead", busy_seconds=600), True, "error"),
        (Stats(), True, "draining"),
    ],
)
def test_condition(stats, draining, state):
    assert condition(stats, draining)[0] == state


def test_the_loop_answers_while_a_step_computes(backend, url):
    backend.runner.may_step.clear()
    thread = threading.Thread(target=post, args=(url, {"messages": HI, "max_tokens": 2}))
    thread.start()
    until(lambda: backend.stats().busy_seconds > 0)
    assert httpx.get(f"{url}/v1/models").status_code == 200
    assert backend.stats().generated_tokens == 0 and thread.is_alive()
    backend.runner.may_step.set()
    thread.join()
    assert backend.stats().generated_tokens == 2


def test_one_line_a_request_and_never_the_prompt(backend, url, caplog):
    with caplog.at_level(logging.INFO, "martlet.server"):
        response = post(url, {"messages": [{"role": "user", "content": "confidential"}], "temperature": 0})
        post(url, {"messages": [], "temperature": 0})
        httpx.get(f"{url}/health")
        send_and_leave(url, {**ENDLESS, "n": 2}, lambda: backend.stats().running == 2)
        until(lambda: len(caplog.records) == 3)
    lines = [record.getMessage() for record in caplog.records]
    assert lines[0].startswith(response.headers["x-request-id"])
    for part in ("POST /v1/chat/completions 200", "model=echo", "prompt=18", "output=13", "cached=0", "finish=stop"):
        assert part in lines[0]
    assert " 400 " in lines[1]
    assert "finish=abort" in lines[2]
    assert "confidential" not in caplog.text


def test_metrics_count_what_happened(backend, url):
    before = dict.fromkeys(("prompt_tokens_total", "generation_tokens_total"), 0.0)
    assert metrics(url)["generation_tokens_total"] == before["generation_tokens_total"]
    post(url, {"messages": HI, "temperature": 0})
    post(url, {"messages": HI, "temperature": 0, "stream": True, "max_tokens": 2})
    found = metrics(url)
    assert found["prompt_tokens_total"] == 16 and found["generation_tokens_total"] == 5
    assert found["num_requests_running"] == 0 and found["kv_cache_usage_perc"] == 0
    assert found['request_success_total{finished_reason="length"}'] == 1
    assert found['request_success_total{finished_reason="stop"}'] == 1
    assert found["e2e_request_latency_seconds_count"] == 2
    assert found["time_to_first_token_seconds_count"] == 1
    assert found["inter_token_latency_seconds_count"] == 1
    assert found["request_generation_tokens_sum"] == 5
    assert found["request_params_max_tokens_count"] == 1


def metrics(url):
    """{name without prefix, with labels other than the model's: value}."""
    found = {}
    for line in httpx.get(f"{url}/metrics").text.splitlines():
        if line.startswith("martlet:"):
            name, value = line.removeprefix("martlet:").rsplit(" ", 1)
            for label in ('engine="0"', 'model_name="echo"'):
                name = name.replace(f"{label},", "").replace(f",{label}", "").replace(label, "")
            found[name.replace("{}", "")] = float(value)
    return found


def test_eight_clients_get_what_each_would_get_alone():
    backend = FakeBackend(EchoRunner(max_rows=4))
    texts = [f"client {i} 🦆 says {'多' * i}" for i in range(8)]
    answers = {}
    with live(create_app(backend, FakeTemplate())) as url:
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)

        def ask(text):
            chunks = client.chat.completions.create(
                model="echo", messages=[{"role": "user", "content": text}], temperature=0, stream=True
            )
            answers[text] = "".join(c.choices[0].delta.content or "" for c in chunks)

        threads = [threading.Thread(target=ask, args=(text,)) for text in texts]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert answers == {text: text for text in texts}
        assert backend.stats().kv_blocks_used == 0
    backend.close()
