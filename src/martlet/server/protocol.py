"""HTTP/1.1 on one connection: uvicorn's, with a clock on the head of each request and errors in our shape.

h11 reads strictly (a request whose length is told in two ways, or badly, is refused), which is what keeps a request
from being smuggled past a proxy in front of us.
"""

from __future__ import annotations

import asyncio
from typing import Any

import h11
import orjson
from starlette.types import Message, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import STATUS_PHRASES, H11Protocol

from martlet.server.errors import problem


class Connection(h11.Connection):
    """h11's connection, but that it writes less often: a head goes with the first of its body, and what is said to be
    `ending` a body with its end."""

    ending = False
    _chunked = False
    _held = b""

    def send(self, event: h11.Event) -> bytes | None:
        output = super().send(event)
        if output is None:
            return None
        if type(event) is h11.Response:
            self._chunked = b"\r\ntransfer-encoding: chunked\r\n" in output.lower()
        output = self._held + output
        holds = type(event) is h11.Response or (type(event) is h11.Data and self.ending)
        self._held = output if holds else b""
        return b"" if holds else output

    @property
    def in_chunks(self) -> bool:
        """The head and a chunk have been written, and more chunks may follow."""
        return self._chunked and not self._held and self.our_state is h11.SEND_BODY


def chunk(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data) if data else b""


class Protocol(H11Protocol):
    """header_seconds: a client that has not sent a whole head by then is holding a connection for nothing."""

    header_seconds = 15.0
    _clock: asyncio.TimerHandle | None = None

    def __init__(self, *args: Any, **more: Any):
        super().__init__(*args, **more)
        self.conn = Connection(h11.SERVER, self.config.h11_max_incomplete_event_size)
        self._application, self.app = self.app, self._answer

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Run the application. The middle of a stream is a chunk a token, and putting one through uvicorn's and h11's
        states would cost as much as all else that is done for it."""
        conn, cycle = self.conn, self.cycle
        has_body = scope["method"] != "HEAD"

        async def write(message: Message) -> None:
            more = message.get("more_body", False)
            if more and has_body and conn.in_chunks:
                if self.flow.write_paused:
                    await self.flow.drain()
                if not cycle.disconnected:
                    self.transport.write(chunk(message["body"]))
            else:
                conn.ending = message["type"] == "http.response.body" and not more
                await send(message)

        scope["martlet.send"] = write
        await self._application(scope, receive, write)

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._watch()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._watch()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._stop()

    def send_400_response(self, msg: str) -> None:
        self._refuse(400, "this is no HTTP request, or its head is too large")

    def _watch(self) -> None:
        """The clock runs from the first moment a head is due until it is there; more bytes do not turn it back."""
        if self.conn.their_state is not h11.IDLE:
            self._stop()
        elif self._clock is None:
            self._clock = self.loop.call_later(self.header_seconds, self._expire)

    def _stop(self) -> None:
        if self._clock is not None:
            self._clock.cancel()
            self._clock = None

    def _expire(self) -> None:
        self._clock = None
        if self.conn.trailing_data[0]:
            self._refuse(408, f"the head of the request did not come within {self.header_seconds:.0f} s")
        else:
            self.transport.close()

    def _refuse(self, status: int, message: str) -> None:
        if self.conn.our_state not in (h11.IDLE, h11.SEND_RESPONSE):  # an answer is under way already
            self.transport.close()
            return
        body = orjson.dumps(problem(status, message).body)
        headers = [("content-type", "application/json"), ("content-length", str(len(body))), ("connection", "close")]
        for event in (
            h11.Response(status_code=status, headers=headers, reason=STATUS_PHRASES[status]),
            h11.Data(data=body),
            h11.EndOfMessage(),
        ):
            self.transport.write(self.conn.send(event))
        self.transport.close()
