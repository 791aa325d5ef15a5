"""HTTP/1.1 on one connection: uvicorn's, with a clock on the head of each request and errors in our shape.

h11 reads strictly (a request whose length is told in two ways, or badly, is refused), which is what keeps a request
from being smuggled past a proxy in front of us.
"""

from __future__ import annotations

import asyncio
from typing import Any

import h11
import orjson
from uvicorn.protocols.http.h11_impl import STATUS_PHRASES, H11Protocol

from martlet.server.errors import problem


class Connection(h11.Connection):
    """h11's connection, but for the body of an answer in chunks: a stream is a chunk a token, and putting one through
    h11's states and writers costs as much as all else that the server does for it."""

    _in_chunks = False

    def send(self, event: h11.Event) -> bytes | None:
        if self._in_chunks and type(event) is h11.Data and self.our_state is h11.SEND_BODY:
            return b"%x\r\n%b\r\n" % (len(event.data), event.data) if event.data else b""
        output = super().send(event)
        if type(event) is h11.Response:
            self._in_chunks = output is not None and b"\r\ntransfer-encoding: chunked\r\n" in output.lower()
        return output


class Protocol(H11Protocol):
    """header_seconds: a client that has not sent a whole head by then is holding a connection for nothing."""

    header_seconds = 15.0
    _clock: asyncio.TimerHandle | None = None

    def __init__(self, *args: Any, **more: Any):
        super().__init__(*args, **more)
        self.conn = Connection(h11.SERVER, self.config.h11_max_incomplete_event_size)

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
