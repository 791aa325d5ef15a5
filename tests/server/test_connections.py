"""What arrives on the wire: floods, lies about lengths, slow clients; and the kinds of socket it may arrive on."""

from __future__ import annotations

import json
import socket
import ssl
import threading
import time
from pathlib import Path

import httpx
import pytest
from live_server import live, until
from raw_http import head, read, send, status

from fake_backend import FakeBackend, FakeTemplate
from martlet.errors import MartletError
from martlet.server import create_app
from martlet.server.deploy import Server, server_config
from martlet.server.options import Limits
from martlet.server.protocol import Protocol
from martlet.server.sockets import bind, bind_unix, check_tls

TLS = Path(__file__).parent / "tls"
HI = {"messages": [{"role": "user", "content": "hi"}], "temperature": 0}
CHAT = "/v1/chat/completions"
JSON = "Content-Type: application/json"


@pytest.fixture(scope="module")
def app():
    backend = FakeBackend()
    yield create_app(backend, FakeTemplate(), limits=Limits(max_body_bytes=4096, body_seconds=0.5))
    backend.close()


@pytest.fixture(scope="module")
def url(app):
    with live(app) as address:
        yield address


@pytest.fixture(autouse=True)
def still_answers(url):
    yield
    assert httpx.post(url + CHAT, json=HI).json()["choices"][0]["message"]["content"] == "hi"


@pytest.mark.parametrize(
    "headers",
    [[f"x-{i}: 1" for i in range(1000)], [f"x: {'a' * 200_000}"], ["x: 1"] * 20_000, ["\x00: 1"], ["no colon"]],
)
def test_a_flood_of_headers_is_refused(url, headers):
    assert status(send(url, head("GET", "/v1/models", headers))) in (400, 431)


def test_a_long_path_is_refused(url):
    assert status(send(url, head("GET", "/" + "a" * 100_000))) in (400, 431)


def test_a_head_without_an_end_is_bounded_as_it_comes(url):
    pieces = ["GET /health HTTP/1.1\r\n", *[f"x: {'a' * 50_000}\r\n"] * 20]
    assert status(send(url, *pieces)) == 400


def test_lines_behind_a_body_in_chunks_are_no_headers(url):
    body = json.dumps(HI)
    trailers = "Content-Type: text/plain\r\n" * 2000  # more than a head may have
    chunked = f"{len(body):x}\r\n{body}\r\n0\r\n{trailers}\r\n"
    answer = send(url, head("POST", CHAT, [JSON, "Transfer-Encoding: chunked"]), chunked)
    assert status(answer) == 200


def test_who_asks_for_another_protocol_is_answered_in_this_one(url):
    body = json.dumps(HI)
    more = [JSON, f"Content-Length: {len(body)}", "Connection: Upgrade, HTTP2-Settings", "Upgrade: h2c"]
    first = head("POST", CHAT, more, close=False)
    answer = send(url, first + body[:9], body[9:] + head("GET", "/health"))
    assert [line.split()[1] for line in answer.split(b"\r\n") if b"HTTP/1.1" in line] == [b"200"] * 2, answer
    assert status(send(url, head("CONNECT", "here:80"))) == 400


def test_many_wishes_at_once_are_refused_and_not_read_one_inside_the_other(url, caplog):
    wish = head("GET", "/health", ["Connection: Upgrade", "Upgrade: h2c"], close=False)
    assert b"HTTP/1.1 400" in send(url, wish * 2000)
    assert not any(line.exc_info for line in caplog.records)


@pytest.mark.parametrize(
    "headers",
    [
        ["Content-Length: 5", "Transfer-Encoding: chunked"],
        ["Transfer-Encoding: chunked", "Content-Length: 5"],
        ["Content-Length: 5", "Content-Length: 6"],
        ["Content-Length: 5, 6"],
        ["Content-Length: -1"],
        ["Content-Length: +5"],
        ["Content-Length: 0x5"],
        ["Content-Length : 5"],
        ["Transfer-Encoding: xchunked"],
        ["Transfer-Encoding: chunked, identity"],
        ["Transfer-Encoding: chunked", "Transfer-Encoding: chunked"],
    ],
)
def test_a_body_has_one_length_and_nothing_is_smuggled_behind_it(url, headers):
    smuggled = "0\r\n\r\n" + head("GET", "/v1/models")
    answer = send(url, head("POST", CHAT, [JSON, *headers], close=False), smuggled)
    assert status(answer) in (400, 501), answer
    assert answer.count(b"HTTP/1.1 ") == 1


@pytest.mark.parametrize("end", ["\n", "x\r\n", "\r\r\n"])
def test_chunks_end_as_the_standard_says(url, end):
    """Readers that disagree about the end of a chunk disagree about where the next request begins."""
    body = json.dumps(HI)
    chunked = f"{len(body):x}\r\n{body}{end}0\r\n\r\n"
    answer = send(url, head("POST", CHAT, [JSON, "Transfer-Encoding: chunked"]), chunked)
    assert status(answer) in (0, 400)


def test_a_body_in_chunks_is_counted_as_it_comes(url):
    pieces = [f"{1000:x}\r\n{' ' * 1000}\r\n"] * 8
    answer = send(url, head("POST", CHAT, [JSON, "Transfer-Encoding: chunked"], close=False), *pieces)
    assert status(answer) == 413


def test_a_body_that_is_said_to_be_giant_is_not_waited_for(url):
    answer = send(url, head("POST", CHAT, [JSON, f"Content-Length: {10**15}"], close=False))
    assert status(answer) == 413


def test_a_body_that_never_comes_is_a_408(url):
    answer = send(url, head("POST", CHAT, [JSON, "Content-Length: 50"], close=False), "{")
    assert status(answer) == 408
    assert json.loads(answer.partition(b"\r\n\r\n")[2])["error"]["type"] == "invalid_request_error"


def test_a_client_that_leaves_before_its_body_has_come_is_no_failure(url, caplog):
    host, port = url.removeprefix("http://").split(":")
    with caplog.at_level("INFO", "martlet.server"):
        with socket.create_connection((host, int(port))) as connection:
            connection.sendall(head("POST", CHAT, [JSON, "Content-Length: 50"], close=False).encode() + b"{")
        until(lambda: any(" 499 " in line.getMessage() for line in caplog.records))
    # The line of an earlier test's request may come late: it is written when the answer is on its way.
    assert sum(" 499 " in line.getMessage() for line in caplog.records) == 1
    assert not any(line.exc_info for line in caplog.records)


@pytest.fixture
def impatient(monkeypatch):
    monkeypatch.setattr(Protocol, "header_seconds", 0.3)


@pytest.mark.parametrize(("first", "expected"), [("", 0), ("GET /health HTTP/1.1\r\nHost:", 408)])
def test_a_head_that_never_ends_closes_the_connection(url, impatient, first, expected):
    assert status(send(url, first)) == expected


def test_more_bytes_do_not_turn_the_clock_back(url, impatient):
    """Slowloris: one header now and then, for ever."""
    host, port = url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=5) as connection:
        connection.sendall(b"GET /health HTTP/1.1\r\n")
        stop = threading.Event()

        def drip():
            while not stop.wait(0.05):
                try:
                    connection.sendall(b"x: 1\r\n")
                except OSError:
                    return

        thread = threading.Thread(target=drip)
        thread.start()
        try:
            assert status(read(connection)) == 408
        finally:
            stop.set()
            thread.join()


def test_the_clock_runs_for_a_second_request_too_and_never_while_one_is_answered(url, app, impatient):
    backend = app.state.service.backend
    host, port = url.removeprefix("http://").split(":")
    body = json.dumps({**HI, "stream": True, "ignore_eos": True, "max_tokens": 40})
    request = head("POST", CHAT, [JSON, f"Content-Length: {len(body)}"], close=False) + body
    backend.runner.delay = 0.02  # 0.8 s for the answer
    try:
        with socket.create_connection((host, int(port)), timeout=5) as connection:
            connection.sendall(request.encode())
            answer = b""
            while b"[DONE]" not in answer:
                answer += connection.recv(65536)
            connection.sendall(b"GET /he")
            assert status(read(connection).partition(b"0\r\n\r\n")[2]) in (0, 408)
    finally:
        backend.runner.delay = 0.0


def test_a_hundred_idle_connections_hold_nobody_up(url):
    host, port = url.removeprefix("http://").split(":")
    idle = [socket.create_connection((host, int(port))) for _ in range(100)]
    try:
        assert httpx.get(f"{url}/health").status_code == 200
    finally:
        for connection in idle:
            connection.close()


def serve_on(listener, app, **tls):
    server = Server(server_config(app, **tls))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    until(lambda: server.started)
    return server, thread


def test_https(app):
    certfile, keyfile = str(TLS / "cert.pem"), str(TLS / "key.pem")
    check_tls(certfile, keyfile)
    with bind("127.0.0.1", 0) as listener:
        server, thread = serve_on(listener, app, ssl_certfile=certfile, ssl_keyfile=keyfile)
        port = listener.getsockname()[1]
        trust = ssl.create_default_context(cafile=certfile)
        answer = httpx.post(f"https://127.0.0.1:{port}{CHAT}", json=HI, verify=trust)
        assert answer.json()["choices"][0]["message"]["content"] == "hi"
        with pytest.raises(httpx.TransportError):
            httpx.get(f"http://127.0.0.1:{port}/health")
        server.should_exit = True
        thread.join(10)


@pytest.mark.parametrize(
    ("certfile", "keyfile", "param"),
    [
        (None, "key.pem", "ssl_certfile"),
        ("missing.pem", "key.pem", "ssl_certfile"),
        ("cert.pem", "missing.pem", "ssl_keyfile"),
        ("cert.pem", None, "ssl_certfile"),
        ("key.pem", "cert.pem", "ssl_certfile"),
    ],
)
def test_bad_certificates_are_told_before_a_model_loads(certfile, keyfile, param):
    with pytest.raises(MartletError) as caught:
        check_tls(certfile and str(TLS / certfile), keyfile and str(TLS / keyfile))
    assert caught.value.param == param


def test_a_unix_socket(app, tmp_path):
    path = str(tmp_path / "martlet.sock")
    bind_unix(path).close()  # as a killed server leaves it
    with bind_unix(path) as listener:
        server, thread = serve_on(listener, app)
        with httpx.Client(transport=httpx.HTTPTransport(uds=path), base_url="http://local") as client:
            assert client.post(CHAT, json=HI).json()["choices"][0]["message"]["content"] == "hi"
        with pytest.raises(MartletError, match="in use"):
            bind_unix(path)
        server.should_exit = True
        thread.join(10)
    (tmp_path / "file").write_text("mine")
    with pytest.raises(MartletError):
        bind_unix(str(tmp_path / "file"))
    assert (tmp_path / "file").read_text() == "mine"
    with pytest.raises(MartletError):
        bind_unix(str(tmp_path / "no" / "folder"))


def test_connections_close_while_the_clock_is_short(url, impatient):
    began = time.monotonic()
    send(url, "GET / HTTP/1.1\r\n")
    assert time.monotonic() - began < 5
