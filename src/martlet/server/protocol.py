"""HTTP/1.1 on one connection: uvicorn's on llhttp, with a bound and a clock on the head of each request and errors in
our shape.

llhttp reads strictly (a request whose length is told in two ways, or badly, is refused), which is what keeps a request
from being smuggled past a proxy in front of us.
"""

from __future__ import annotations

import asyncio
from functools import partial
from typing import Any

import httptools
import orjson
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol, RequestResponseCycle

from martlet.server.errors import problem


class Joined:
    """A transport that keeps what is written, so that a head and the first of its body go out as one."""

    def __init__(self, transport: asyncio.Transport):
        self._transport = transport
        self._parts: list[bytes] = []

    def write(self, data: bytes) -> None:
        self._parts.append(data)

    def flush(self) -> None:
        data, self._parts = b"".join(self._parts), []
        if data:
            self._transport.write(data)

    def close(self) -> None:
        self.flush()
        self._transport.close()


class Protocol(HttpToolsProtocol):
    """header_seconds: a client that has not sent a whole head by then is holding a connection for nothing."""

    header_seconds = 15.0
    _clock: asyncio.TimerHandle | None = None
    _in_head = False
    _head_bytes = 0  # of the head under way, but for those that came with its first

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: ASGIApp) -> None:
        super()._start_asgi_task(cycle, partial(self._answer, cycle, app))  # type: ignore[arg-type]

    async def _answer(
        self, cycle: RequestResponseCycle, app: ASGIApp, scope: Scope, receive: Receive, send: Send
    ) -> None:
        """Run the application. The middle of a stream is a chunk a token, so it may go past the layers in between."""
        head: Message | None = None

        async def write(message: Message) -> None:
            nonlocal head
            if message["type"] == "http.response.start":
                head = message
            elif head is None:
                await send(message)
            else:
                first, head = head, None
                joined = cycle.transport = Joined(self.transport)
                try:
                    await send(first)
                    await send(message)
                finally:
                    cycle.transport = self.transport
                    joined.flush()

        scope["martlet.send"] = write
        await app(scope, receive, write)

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._watch()

    def data_received(self, data: bytes) -> None:
        self._unset_keepalive_if_required()
        self._head_bytes += len(data) * self._in_head
        try:
            try:
                self.parser.feed_data(data)
            except httptools.HttpParserUpgrade as wish:
                # It is ignored: Java's client has one with its first request. This parser would take the body for that
                # protocol, so another one reads the request without the wish; CONNECT, or a second wish, is an error.
                plain = self._without_upgrade() + data[wish.args[0] :]
                self.parser = httptools.HttpRequestParser(self)
                self.parser.feed_data(plain)
        except (httptools.HttpParserError, httptools.HttpParserUpgrade):
            self.send_400_response("")
            return
        # uvicorn has one name for this bound, h11's, and leaves it to a proxy where h11 does not read.
        if self._in_head and self._head_bytes > (self.config.h11_max_incomplete_event_size or 0):
            self.send_400_response("")
        else:
            self._watch()

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._in_head, self._head_bytes = True, 0

    def on_header(self, name: bytes, value: bytes) -> None:
        if self._in_head:  # what comes behind a body in chunks is nothing that anybody asks for
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        self._in_head = False
        if not self.parser.should_upgrade():
            super().on_headers_complete()

    def on_message_complete(self) -> None:
        if not self.parser.should_upgrade():
            super().on_message_complete()

    def _without_upgrade(self) -> bytes:
        """The head under way, but for its wish for another protocol."""
        tokens = b",".join(value for name, value in self.headers if name == b"connection").lower().split(b",")
        kept = [token for token in map(bytes.strip, tokens) if token in (b"close", b"keep-alive")]
        fields = [(name, value) for name, value in self.headers if name not in (b"upgrade", b"connection")]
        fields += [(b"connection", token) for token in kept]
        first = b"%b %b HTTP/%b" % (self.parser.get_method(), self.url, self.parser.get_http_version().encode())
        return b"\r\n".join([first, *(b"%b: %b" % field for field in fields), b"", b""])

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._stop()

    def send_400_response(self, msg: str) -> None:
        self._refuse(400, "this is no HTTP request, or its head is too large")

    @property
    def _answers(self) -> bool:
        return self.cycle is not None and not self.cycle.response_complete

    def _watch(self) -> None:
        """The clock runs from the first moment a head is due until it is there; more bytes do not turn it back."""
        if self._answers:
            self._stop()
        elif self._clock is None and not self.transport.is_closing():
            self._clock = self.loop.call_later(self.header_seconds, self._expire)

    def _stop(self) -> None:
        if self._clock is not None:
            self._clock.cancel()
            self._clock = None

    def _expire(self) -> None:
        self._clock = None
        if self._in_head:
            self._refuse(408, f"the head of the request did not come within {self.header_seconds:.0f} s")
        else:
            self.transport.close()

    def _refuse(self, status: int, message: str) -> None:
        self._stop()
        if not (self._answers and (self.cycle.response_started or self.pipeline)):  # in no answer's middle
            body: Any = orjson.dumps(problem(status, message).body)
            head = b"content-type: application/json\r\ncontent-length: %d\r\nconnection: close\r\n\r\n" % len(body)
            self.transport.write(STATUS_LINE[status] + head + body)
            if self._answers:  # its body is no body
                self.cycle.disconnected = True
                self.cycle.message_event.set()
        self.transport.close()
