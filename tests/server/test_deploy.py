"""Starting and stopping: the port before the model, one signal drains, a second one stops."""

from __future__ import annotations

import contextlib
import json
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import httpx
import pytest
from live_server import until

from fake_backend import FakeBackend, FakeTemplate, fake_card
from martlet import backends, chat, hub, server
from martlet.errors import MartletError
from martlet.server.sockets import bind

CHAT = "/v1/chat/completions"
ENDLESS = {"messages": [{"role": "user", "content": "hi"}], "ignore_eos": True, "temperature": 0}


@contextlib.contextmanager
def server_process(delay=0.0, drain=10.0):
    with bind("127.0.0.1", 0) as free:
        port = free.getsockname()[1]
    script = Path(__file__).with_name("serve_echo.py")
    process = subprocess.Popen(
        [sys.executable, str(script), str(port), str(delay), str(drain)], stderr=subprocess.PIPE, text=True
    )
    url = f"http://127.0.0.1:{port}"
    try:
        until(lambda: process.poll() is not None or answers(url), 30)
        yield process, url
    finally:
        process.kill()
        process.wait()
        process.stderr.close()


def answers(url):
    with contextlib.suppress(httpx.TransportError):
        return httpx.get(f"{url}/health").status_code == 200


def open_stream(url, **more):
    return httpx.stream("POST", url + CHAT, json={**ENDLESS, "stream": True, **more}, timeout=30)


def test_sigterm_lets_running_requests_finish():
    with server_process(delay=0.03) as (process, url), open_stream(url, max_tokens=40) as response:
        lines = response.iter_lines()
        next(lines)
        process.send_signal(signal.SIGTERM)
        until(lambda: httpx.get(f"{url}/health").status_code == 503)
        assert httpx.get(f"{url}/health").json()["status"] == "draining"
        refused = httpx.post(url + CHAT, json=ENDLESS)
        assert refused.status_code == 503 and int(refused.headers["retry-after"]) > 0
        assert refused.json()["error"]["code"] == "shutting_down"
        rest = [line for line in lines if line]
        assert rest[-1] == "data: [DONE]"
        assert json.loads(rest[-2].removeprefix("data: "))["choices"][0]["finish_reason"] == "length"
        assert process.wait(10) == 0


def test_sigterm_under_load_lets_all_that_were_taken_finish():
    """Twenty streams, more than fit in a batch: those that wait for a row count as taken too."""
    ends, body = [], {**ENDLESS, "stream": True, "max_tokens": 80}

    def listen(client):
        with client.stream("POST", CHAT, json=body) as response:
            lines = [line for line in response.iter_lines() if line]
        reasons = [json.loads(line.removeprefix("data: "))["choices"][0]["finish_reason"] for line in lines[:-1]]
        ends.append((response.status_code, reasons[-1], lines[-1]))

    with server_process(delay=0.03, drain=30) as (process, url), httpx.Client(base_url=url, timeout=60) as client:
        threads = [threading.Thread(target=listen, args=(client,)) for _ in range(20)]
        for thread in threads:
            thread.start()
        until(lambda: waiting(url) == 4)
        process.send_signal(signal.SIGTERM)
        for thread in threads:
            thread.join(60)
        assert process.wait(10) == 0
    assert ends == [(200, "length", "data: [DONE]")] * 20


def waiting(url) -> float:
    lines = httpx.get(f"{url}/metrics").text.splitlines()
    return next(float(line.split()[-1]) for line in lines if line.startswith("martlet:num_requests_waiting"))


def test_what_does_not_finish_in_time_is_aborted_and_told_so():
    with server_process(delay=0.03, drain=0.2) as (process, url), open_stream(url) as response:
        lines = response.iter_lines()
        next(lines)
        process.send_signal(signal.SIGTERM)
        rest = [line for line in lines if line]
        assert json.loads(rest[-1].removeprefix("data: "))["error"]["code"] == "shutting_down"
        assert process.wait(10) == 0


def test_a_second_signal_stops_at_once():
    with server_process(delay=0.03, drain=60) as (process, url), open_stream(url) as response:
        lines = response.iter_lines()
        next(lines)
        process.send_signal(signal.SIGINT)
        until(lambda: httpx.get(f"{url}/health").status_code == 503)
        began = time.monotonic()
        process.send_signal(signal.SIGTERM)
        assert process.wait(10) == 128 + signal.SIGTERM
        assert time.monotonic() - began < 5


def test_a_port_in_use_is_told_before_the_model_loads(monkeypatch):
    monkeypatch.setattr(hub, "resolve", lambda name: pytest.fail("the model was looked up first"))
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        with pytest.raises(MartletError, match=f"port {port} of 127.0.0.1 is in use") as caught:
            server.run(server.ServerOptions(model="m", port=port))
    assert caught.value.exit_code != 0 and caught.value.param == "port"


def test_a_host_that_is_not_ours():
    with pytest.raises(MartletError, match="no-such-host"):
        bind("no-such-host.invalid", 0)


def test_a_socket_refuses_until_the_model_is_there():
    with bind("127.0.0.1", 0) as listener, pytest.raises(ConnectionRefusedError):
        socket.create_connection(listener.getsockname(), timeout=1)


def test_run_wires_model_template_defaults_and_names(monkeypatch):
    seen = {}
    card = fake_card(generation_config={"temperature": 0.5, "top_p": 1.0, "do_sample": True}, template="fake")
    backend = FakeBackend(card=card)

    def fake_load(given, **options):
        seen.update(options, card=given)
        return backend

    def fake_serve(app, listener, *, drain_seconds, **more):
        seen.update(service=app.state.service, drain_seconds=drain_seconds)
        return 7

    monkeypatch.setattr(hub, "resolve", lambda name: card)
    monkeypatch.setattr(backends, "load", fake_load)
    monkeypatch.setattr(chat, "template_for", lambda *a, **options: FakeTemplate())
    monkeypatch.setattr("martlet.server.deploy.serve", fake_serve)
    options = server.ServerOptions(model="m", backend="pt", port=0, served_model_names=("a", "b"), drain_seconds=3)
    assert server.run(options) == 7
    assert seen["card"] is card and seen["backend"] == "pt" and seen["drain_seconds"] == 3
    assert seen["service"].names == ("a", "b")
    assert seen["service"].defaults == {"temperature": 0.5}
    assert isinstance(seen["service"].template, FakeTemplate)
    assert backend.runner.closed
