"""The client against a server of few words, one that is not ours; tests/swift has it against our own."""

from __future__ import annotations

import asyncio
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from martlet.client import AsyncClient, Client, _Events
from martlet.errors import InvalidRequest, MartletError, ModelNotFound, Overloaded, UsageError

USER = [{"role": "user", "content": "hi"}]


class Handler(BaseHTTPRequestHandler):
    """Answers what the server's `answer` holds: (status, body), body as JSON or as lines to stream; keeps what came."""

    def do_GET(self):
        self._reply(None)

    def do_POST(self):
        self._reply(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))

    def _reply(self, body):
        self.server.seen.append((self.path, dict(self.headers), body))
        status, answer = self.server.answer
        data = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *args):
        pass


@pytest.fixture(scope="module")
def server():
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield server
        server.shutdown()
        thread.join(5)


@pytest.fixture
def client(server):
    server.seen, server.answer = [], (200, {})
    with Client(f"http://127.0.0.1:{server.server_port}/v1/", api_key="k") as client:
        yield client


def events(*data, space=" ", done=True) -> bytes:
    lines = [f"data:{space}{json.dumps(d, ensure_ascii=False)}\n\n" for d in data]
    return "".join([": comment\n\n", *lines, f"data:{space}[DONE]\n\n" * done]).encode()


def chunk(finish=None, **delta):
    return {"id": "c", "choices": [{"index": 0, "delta": delta, "finish_reason": finish}], "model": "m"}


def test_models_without_private_fields(client, server):
    server.answer = (200, {"data": [{"id": "m", "surprise": 1}]})
    models = client.models()
    assert [(m.id, m.object, m.is_chat, m.max_model_len) for m in models.data] == [("m", "model", None, None)]
    path, headers, _ = server.seen[0]
    assert path == "/v1/models" and headers["Authorization"] == "Bearer k"


def test_an_answer_reads_like_an_object(client, server):
    message = {"role": "assistant", "content": "hé", "refusal": None}
    choice = {"index": 0, "message": message, "finish_reason": "stop"}
    server.answer = (200, {"id": "x", "choices": [choice], "usage": {"prompt_tokens": 3, "details": {}}})
    answer = client.chat(USER, model="m", temperature=0, seed=1)
    assert answer.choices[0].message.content == "hé"
    assert (answer.choices[0].finish_reason, answer.usage.prompt_tokens, answer.created) == ("stop", 3, 0)
    assert server.seen[0][2] == {"model": "m", "messages": USER, "temperature": 0, "seed": 1}


def test_completions(client, server):
    server.answer = (200, {"choices": [{"text": "b"}]})
    assert client.completions([1, 2], model="m").choices[0].text == "b"
    assert server.seen[0][0] == "/v1/completions" and server.seen[0][2] == {"model": "m", "prompt": [1, 2]}


@pytest.mark.parametrize("space", [" ", ""])
@pytest.mark.parametrize("done", [True, False])
def test_a_stream_is_read_with_and_without_its_niceties(client, server, space, done):
    server.answer = (
        200,
        events(chunk(role="assistant"), chunk(content="你\u2028"), chunk("stop"), space=space, done=done),
    )
    chunks = list(client.chat(USER, model="m", stream=True))
    assert [c.choices[0].delta.content for c in chunks] == ["", "你\u2028", ""]
    assert chunks[-1].choices[0].finish_reason == "stop"
    assert server.seen[0][2]["stream"] is True


def test_events_may_be_cut_anywhere():
    data = events(chunk(content="你好"), chunk("stop")).replace(b"\n", b"\r\n")
    for size in (1, 2, 7, 50):
        reader = _Events()
        got = [e for i in range(0, len(data), size) for e in reader.feed(data[i : i + size])]
        assert got == [chunk(content="你好"), chunk("stop")] and reader.done


def test_a_stream_that_breaks_off_is_no_answer(client, server):
    server.answer = (200, events(chunk(content="a"), done=False))
    with pytest.raises(MartletError, match="broke off"):
        list(client.chat(USER, model="m", stream=True))


def test_an_error_in_mid_stream_is_raised_after_what_came(client, server):
    server.answer = (200, events(chunk(content="a"), {"error": {"message": "engine fault"}}, done=False))
    stream = client.chat(USER, model="m", stream=True)
    assert next(stream).choices[0].delta.content == "a"
    with pytest.raises(MartletError, match="engine fault"):
        next(stream)


def test_a_stream_may_be_left_early(client, server):
    server.answer = (200, events(chunk(content="a"), chunk(content="b"), chunk("stop")))
    stream = client.chat(USER, model="m", stream=True)
    next(stream)
    stream.close()
    server.answer = (200, {"data": []})
    assert client.models().data == []


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("status", "body", "kind", "says"),
    [
        (400, {"error": {"message": "bad n", "param": "n"}}, InvalidRequest, "bad n"),
        (401, {"error": {"message": "wrong key"}}, UsageError, "wrong key"),
        (404, {"error": {"message": "no model x"}}, ModelNotFound, "no model x"),
        (429, {"error": {"message": "busy"}}, Overloaded, "busy"),
        (422, {"detail": [{"msg": "field required"}]}, InvalidRequest, "field required"),
        (400, {"object": "error", "message": "not in the model_list"}, InvalidRequest, "model_list"),
        (200, {"object": "error", "message": "too long", "code": 400}, MartletError, "too long"),
        (500, {"error": "plain text"}, MartletError, "plain text"),
        (502, b"<html>Bad Gateway</html>", MartletError, "502: <html>Bad"),
        (503, b"", MartletError, "503"),
    ],
)
def test_errors_carry_the_servers_words(client, server, status, body, kind, says, stream):
    if stream and status == 200:
        body = events(body, done=False)
    server.answer = (status, body)
    with pytest.raises(kind, match=says) as error:
        answer = client.chat(USER, model="m", stream=stream)
        list(answer if stream else [])
    assert error.value.http_status >= 400
    if "bad n" in says:
        assert error.value.param == "n"


@pytest.mark.parametrize("answer", [b"not json", b"[1]"])
def test_an_answer_that_is_no_object_is_named(client, server, answer):
    server.answer = (200, answer)
    with pytest.raises(MartletError, match="not"):
        client.models()


def test_no_server_at_all():
    with Client("http://127.0.0.1:9/v1") as client:
        with pytest.raises(MartletError, match="martlet deploy"):
            client.models()
        with pytest.raises(MartletError, match="no server answers"):
            list(client.chat(USER, model="m", stream=True))


def test_a_silent_server_is_given_up(server):
    hold = threading.Event()
    server.seen, server.answer = [], (200, {})
    slow = type("Slow", (Handler,), {"do_GET": lambda self: hold.wait(5)})
    server.RequestHandlerClass, kept = slow, server.RequestHandlerClass
    try:
        client = Client(f"http://127.0.0.1:{server.server_port}/v1", timeout=0.2)
        with client, pytest.raises(MartletError, match=r"within 0\.2 s"):
            client.models()
    finally:
        server.RequestHandlerClass = kept
        hold.set()


def test_the_asynchronous_client_does_the_same(client, server):
    async def talk():
        async with AsyncClient(client.base_url) as other:
            server.answer = (200, {"data": [{"id": "m"}]})
            assert (await other.models()).data[0].id == "m"
            server.answer = (200, {"choices": [{"message": {"content": "a"}}]})
            assert (await other.chat(USER, model="m")).choices[0].message.content == "a"
            server.answer = (200, {"choices": [{"text": "a"}]})
            assert (await other.completions("b", model="m")).choices[0].text == "a"
            server.answer = (200, events(chunk(content="a"), chunk("stop")))
            stream = await other.chat(USER, model="m", stream=True)
            assert [c.choices[0].delta.content async for c in stream] == ["a", ""]
            server.answer = (404, {"error": {"message": "no model"}})
            with pytest.raises(ModelNotFound, match="no model"):
                await other.models()
            with pytest.raises(ModelNotFound, match="no model"):
                [c async for c in await other.completions("a", model="m", stream=True)]
        async with AsyncClient("http://127.0.0.1:9/v1") as nobody:
            with pytest.raises(MartletError, match="martlet deploy"):
                await nobody.models()

    asyncio.run(talk())
