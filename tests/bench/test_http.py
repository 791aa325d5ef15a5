"""The HTTP client against our server with an echo model."""

from __future__ import annotations

import contextlib
import json
import socket
import sys
import threading
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "server"))
from live_server import live

from fake_backend import FakeBackend, FakeTemplate
from martlet import cli
from martlet.bench import http
from martlet.bench.workloads import Workload
from martlet.server import create_app


@pytest.fixture(scope="module")
def url():
    backend = FakeBackend()
    with live(create_app(backend, FakeTemplate(), served_model_names=["echo"])) as address:
        yield f"{address}/v1"
    backend.close()


@pytest.mark.parametrize(
    "workload",
    [
        Workload("W5", "chats", 12, 3, chats=("hello", "abc", "x" * 30, "y", "zz")),
        Workload("W1", "texts", 12, 2, texts=("abcdef", "qwertz")),
    ],
    ids=["chat", "completion"],
)
def test_every_request_is_timed(url, workload):
    endpoint = http.Endpoint(url, "echo", extra={"ignore_eos": True})
    timelines = http.measure(endpoint, workload, salt="s")
    assert [t.new_tokens for t in timelines] == [12] * workload.size if workload.chats else [12, 12]
    assert all(t.prompt_tokens > 0 and t.first > 0 and t.times == sorted(t.times) for t in timelines)
    assert http.check(timelines, workload) is None


def test_short_answers_are_told(url):
    workload = Workload("W5", "chats", 12, 1, chats=("abc",))
    timelines = http.measure(http.Endpoint(url, "echo"), workload)
    assert http.check(timelines, workload) == "answers had 4-4 tokens (mean 4.0), not 12"


def test_the_command_writes_a_line(url, tmp_path, capsys):
    output = tmp_path / "out.jsonl"
    assert cli.main(["bench", "http", "--url", url, "--model", "echo", "--output", str(output)]) == 0
    assert "W5 output, tok/s" in capsys.readouterr().out
    (line,) = output.read_text().splitlines()
    row = json.loads(line)
    assert (row["workload"], row["runs"][0]["new_tokens"], row["note"]) == ("W5", 32 * 64, None)
    assert row["machine"]["cores"] >= 1


@pytest.mark.parametrize("model", ["nosuch", "echo"])
def test_a_server_that_refuses_or_is_not_there_is_one_line(url, model, capsys):
    where = url if model == "nosuch" else "http://127.0.0.1:9/v1"
    assert cli.main(["bench", "http", "--url", where, "--model", model]) == 1
    said = capsys.readouterr().err
    assert said.startswith(f"martlet: error: {where}/chat/completions") and said.count("\n") == 1


CHUNKS = (
    {"choices": [{"delta": {"content": "a"}}]},
    {"choices": [], "usage": {"prompt_tokens": 3, "completion_tokens": 1}},
)


def closing_server(requests: list[bytes]) -> socket.socket:
    """Answers one request a connection with a stream, promises to keep the connection, and drops it at the next."""
    listener = socket.create_server(("127.0.0.1", 0))

    def answer(connection: socket.socket) -> None:
        with connection:
            requests.append(connection.recv(65536))
            body = "".join(f"data: {json.dumps(chunk)}\n\n" for chunk in CHUNKS) + "data: [DONE]\n\n"
            head = "HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nConnection: keep-alive\r\n"
            connection.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n{body}".encode())
            connection.recv(65536)  # the next request, or its end

    def serve() -> None:
        with contextlib.suppress(OSError):  # closed
            while True:
                threading.Thread(target=answer, args=listener.accept()[:1], daemon=True).start()

    threading.Thread(target=serve, daemon=True).start()
    return listener


def test_a_server_that_drops_connections_it_promised_to_keep_is_measured_all_the_same():
    requests: list[bytes] = []
    workload = Workload("W5", "chats", 1, 2, chats=tuple("abcdef"))
    with closing_server(requests) as listener:
        url = f"http://127.0.0.1:{listener.getsockname()[1]}/v1"
        timelines = http.measure(http.Endpoint(url, "any"), workload)
    assert [t.new_tokens for t in timelines] == [1] * 6 and len(requests) == 6
