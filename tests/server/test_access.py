"""Who may do how much at a time, what the log tells of it, and which pages may call."""

from __future__ import annotations

import json
import logging
import threading

import httpx
import pytest
from live_server import live, until

from fake_backend import FakeBackend, FakeTemplate
from martlet.engine.options import EngineOptions
from martlet.engine.request import Stats
from martlet.errors import UsageError
from martlet.server import create_app
from martlet.server.logs import JsonFormatter, throughput
from martlet.server.options import Limits

CHAT = "/v1/chat/completions"
HI = {"messages": [{"role": "user", "content": "hi"}], "temperature": 0}
ENDLESS = {**HI, "ignore_eos": True, "stream": True}


@pytest.fixture
def backend():
    backend = FakeBackend(options=EngineOptions(max_num_queued=1))
    yield backend
    backend.close()


def key(name):
    return {"authorization": f"Bearer {name}"}


def test_a_key_has_so_many_requests_running_and_others_do_not_count(backend):
    backend.runner.delay = 0.02
    app = create_app(backend, FakeTemplate(), api_keys=["one", "two"], limits=Limits(max_requests_per_key=1))
    with live(app) as url:
        with httpx.stream("POST", url + CHAT, json=ENDLESS, headers=key("one")) as running:
            news = running.iter_bytes()
            next(news)
            refused = httpx.post(url + CHAT, json=HI, headers=key("one"))
            assert refused.status_code == 429 and int(refused.headers["retry-after"]) >= 1
            assert refused.json()["error"]["code"] == "too_many_requests"
            assert httpx.post(url + CHAT, json=HI, headers=key("two")).status_code == 200
            assert httpx.get(f"{url}/metrics", headers=key("one")).status_code == 200
            assert httpx.post(url + CHAT, json=HI).status_code == 401
        until(lambda: httpx.post(url + CHAT, json=HI, headers=key("one")).status_code == 200)
        text = httpx.get(f"{url}/metrics", headers=key("one")).text
        assert 'martlet:admission_rejections_total{engine="0",model_name="echo"} 1.0' in text.replace(
            'model_name="echo",engine="0"', 'engine="0",model_name="echo"'
        )


def test_anthropics_way_to_send_a_key(backend):
    with live(create_app(backend, FakeTemplate(), api_keys=["one"])) as url:
        assert httpx.get(f"{url}/v1/models", headers={"x-api-key": "one"}).status_code == 200
        assert httpx.get(f"{url}/v1/models", headers={"x-api-key": "two"}).status_code == 401


@pytest.mark.parametrize("keys", [[""], ["good", "  "]])
def test_an_empty_key_lets_nobody_in(backend, keys):
    with pytest.raises(UsageError, match="empty"):
        create_app(backend, api_keys=keys).build_middleware_stack()


@pytest.mark.parametrize("stream", [False, True])
def test_an_answer_that_takes_too_long_is_stopped_and_told_so(backend, stream):
    backend.runner.delay = 0.02
    with live(create_app(backend, FakeTemplate(), limits=Limits(request_seconds=0.2))) as url:
        answer = httpx.post(url + CHAT, json={**ENDLESS, "stream": stream})
        if stream:
            error = json.loads(answer.text.strip().split("\n\n")[-1].removeprefix("data: "))["error"]
        else:
            assert answer.status_code == 503 and int(answer.headers["retry-after"]) > 0
            error = answer.json()["error"]
        assert error["code"] == "deadline_exceeded"
        until(lambda: backend.stats().kv_blocks_used == 0)
        assert httpx.post(url + CHAT, json=HI).status_code == 200


def test_a_full_queue_is_healthy_and_not_ready(backend):
    backend.runner.delay = 0.02
    with live(create_app(backend, FakeTemplate(), max_num_queued=1)) as url:
        assert httpx.get(f"{url}/ready").json() == {"status": "ok"}
        with httpx.stream("POST", url + CHAT, json={**ENDLESS, "n": 16}) as running:
            news = running.iter_bytes()
            next(news)
            waiter = threading.Thread(target=httpx.post, args=(url + CHAT,), kwargs={"json": HI, "timeout": 30})
            waiter.start()
            until(lambda: backend.stats().waiting == 1)
            full = httpx.get(f"{url}/ready")
            assert full.status_code == 503 and full.json()["status"] == "busy"
            assert httpx.get(f"{url}/health").status_code == 200
        waiter.join()
        assert httpx.get(f"{url}/ready").status_code == 200


def test_only_the_named_origins_may_call(backend):
    app = create_app(backend, FakeTemplate(), api_keys=["one"], cors_origins=["https://good.example"])
    with live(app) as url:

        def ask(origin, **more):
            wish = {"origin": origin, "access-control-request-method": "POST"}
            return httpx.options(url + CHAT, headers={**wish, "access-control-request-headers": "authorization"})

        assert ask("https://good.example").headers["access-control-allow-origin"] == "https://good.example"
        assert "access-control-allow-origin" not in ask("https://evil.example").headers
        answer = httpx.post(url + CHAT, json=HI, headers={**key("one"), "origin": "https://good.example"})
        assert answer.status_code == 200 and answer.headers["access-control-allow-origin"] == "https://good.example"
        assert httpx.post(url + CHAT, json=HI, headers={"origin": "https://good.example"}).status_code == 401
    with live(create_app(backend, FakeTemplate())) as url:
        answer = httpx.post(url + CHAT, json=HI, headers={"origin": "https://good.example"})
        assert "access-control-allow-origin" not in answer.headers


TRACE = "4bf92f3577b34da6a3ce929d0e0e4736"


@pytest.mark.parametrize(
    ("header", "trace"),
    [
        (f"00-{TRACE}-00f067aa0ba902b7-01", TRACE),
        (f"00-{'0' * 32}-00f067aa0ba902b7-01", None),
        (f"00-{TRACE}-00f067aa0ba902b7", None),
        (f"00-{TRACE.upper()}-00f067aa0ba902b7-01", None),
        ("garbage", None),
    ],
)
def test_a_line_of_json_with_the_trace(backend, caplog, header, trace):
    with live(create_app(backend, FakeTemplate(), api_keys=["a", "b"])) as url, caplog.at_level(logging.INFO):
        answer = httpx.post(url + CHAT, json=HI, headers={**key("b"), "traceparent": header})
        until(lambda: any(hasattr(r, "fields") for r in caplog.records))
    record = next(r for r in caplog.records if hasattr(r, "fields"))
    line = json.loads(JsonFormatter().format(record))
    assert line["id"] == answer.headers["x-request-id"]
    assert (line["method"], line["path"], line["status"], line["key"]) == ("POST", CHAT, 200, 2)
    assert line.get("trace") == trace
    assert (
        line["model"] == "echo" and line["output"] == 3 and line["finish"] == "stop" and line["client"] == "127.0.0.1"
    )
    assert 0 <= line["queued"] < 10
    assert "hi" not in line.values()


def test_throughput():
    before = Stats(prompt_tokens=100, generated_tokens=50, cached_tokens=10, kv_blocks_total=10)
    now = Stats(2, 1, 10, 4, prompt_tokens=300, generated_tokens=150, cached_tokens=60)
    assert throughput(before, now, 2.0) == {
        "running": 2,
        "waiting": 1,
        "prompt_per_s": 100,
        "output_per_s": 50,
        "kv_percent": 40,
        "cached_percent": 25,
    }


def test_version(backend):
    from martlet import __version__

    with live(create_app(backend, FakeTemplate(), owned_by="somebody")) as url:
        assert httpx.get(f"{url}/version").json() == {"version": __version__}
        assert httpx.get(f"{url}/v1/models").json()["data"][0]["owned_by"] == "somebody"
