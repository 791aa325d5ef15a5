"""What was made cheap because it happens for every token says the same as what it stands in for."""

from __future__ import annotations

import asyncio

import pytest
import uvicorn
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol
from uvicorn.server import ServerState

from martlet.server.protocol import Protocol


class Wire(asyncio.Transport):
    def __init__(self):
        super().__init__()
        self.writes: list[bytes] = []
        self.closed = False

    def write(self, data):
        if data:
            self.writes.append(bytes(data))

    def is_closing(self):
        return self.closed

    def close(self):
        self.closed = True

    def resume_reading(self): ...


STREAM = [b"one", b"", b"two", b"three"]


async def streams(scope, receive, send):
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"text/event-stream")]})
    for data in STREAM:
        await send({"type": "http.response.body", "body": data, "more_body": data is not STREAM[-1]})


async def answers_in_one(scope, receive, send):
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"5")]})
    await send({"type": "http.response.body", "body": b"hello"})


def wire(protocol, app, head: bytes) -> list[bytes]:
    """What a server with this protocol writes when two requests come on one connection, if it stays open."""

    async def talk():
        config = uvicorn.Config(
            app, http=protocol, lifespan="off", log_config=None, h11_max_incomplete_event_size=2**16
        )
        config.load()
        connection, transport = protocol(config, ServerState(), {}), Wire()
        connection.connection_made(transport)
        for _ in range(2):
            if not transport.closed:
                connection.data_received(head)
            while connection.server_state.tasks:
                await asyncio.sleep(0)
        connection.connection_lost(ConnectionResetError())  # which stops its clocks
        return transport.writes

    return asyncio.run(talk())


@pytest.mark.parametrize("head", [b"GET / HTTP/1.1", b"HEAD / HTTP/1.1", b"GET / HTTP/1.0"])
@pytest.mark.parametrize("app", [streams, answers_in_one])
def test_fewer_writes_say_what_uvicorn_says(app, head):
    head += b"\r\nhost: here\r\n\r\n"
    theirs, ours = wire(HttpToolsProtocol, app, head), wire(Protocol, app, head)
    assert b"".join(ours) == b"".join(theirs)
    if head.startswith(b"GET / HTTP/1.1"):
        assert len(ours) == 2 * (3 if app is streams else 1)
        assert ours[0].endswith(b"3\r\none\r\n" if app is streams else b"hello")
        assert app is not streams or ours[-1] == b"5\r\nthree\r\n0\r\n\r\n"
