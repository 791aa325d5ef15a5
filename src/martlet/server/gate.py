"""The gate every HTTP request passes, on raw ASGI: keys, draining, sizes, one log line, and no crash behind it.

Decisions rest on the raw path, the bytes that the router's path is made of, so no spelling of a path gets around them.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import logging
import re
from collections import Counter
from collections.abc import Sequence

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from martlet.errors import UsageError
from martlet.server.errors import ApiError, Problem, describe, problem
from martlet.server.logs import log_request
from martlet.server.record import Record
from martlet.server.service import Traffic

_OPEN = (b"/health", b"/ready")  # need no key
_PROBES = (*_OPEN, b"/metrics")  # answered while draining, and not worth a line in the log
_TRACEPARENT = re.compile(rb"[0-9a-f]{2}-(?!0{32})([0-9a-f]{32})-(?!0{16})[0-9a-f]{16}-[0-9a-f]{2}")


class Gate:
    def __init__(self, app: ASGIApp, service: Traffic, api_keys: Sequence[str]):
        if not all(key.strip() for key in api_keys):
            raise UsageError("an API key is empty, and would let everybody in", param="api_key")
        self._app = app
        self._service = service
        self._keys = [_digest(key.strip().encode()) for key in api_keys]
        self._running: Counter[int | None] = Counter()  # requests of each key

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
        elif scope["type"] == "http":
            await self._http(scope, receive, send)
        else:
            await send({"type": "websocket.close", "code": 1008})

    async def _http(self, scope: Scope, receive: Receive, send: Send) -> None:
        service = self._service
        record = scope["martlet.record"] = Record(
            client=scope["client"][0] if scope.get("client") else "", trace=_trace(scope), key=self._key(scope)
        )
        record.id = scope.get("martlet.id", record.id)  # a front has named the request
        path = scope.get("raw_path") or b""
        probe = path in _PROBES
        status = 0

        async def tagged_send(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message.get("headers", ()), (b"x-request-id", record.id.encode())]
            await send(message)

        if not probe:
            service.enter(record.id)
        self._running[record.key] += not probe
        try:
            refused = self._refusal(scope, path, record)
            if refused is not None:
                await refused.response(scope)(scope, receive, tagged_send)
            else:
                await self._app(scope, self._bounded(receive), tagged_send)
        except Exception as error:
            found = describe(error, record.id)
            if status == 0:
                await found.response(scope)(scope, receive, tagged_send)
        finally:
            self._running[record.key] -= not probe
            service.leave(record.id)
            if status == 429:
                service.metrics.rejections.inc()
            if record.model and record.finish not in ("", "abort", "error"):
                service.metrics.observe(record)
            quiet = probe and status == 200
            shown = path.decode("latin-1")[:200]
            log_request(logging.DEBUG if quiet else logging.INFO, record, scope["method"], shown, status)

    def _refusal(self, scope: Scope, path: bytes, record: Record) -> Problem | None:
        limits = self._service.limits
        if self._keys and path not in _OPEN and record.key is None:
            return problem(
                401,
                "A valid API key is needed: send it as 'Authorization: Bearer KEY'.",
                code="invalid_api_key",
                www_authenticate="Bearer",
            )
        if self._service.draining and path not in _PROBES:
            return problem(
                503, "The server is shutting down.", code="shutting_down", retry_after="5", connection="close"
            )
        headers = scope["headers"]
        size = len(path) + len(scope["query_string"]) + sum(len(name) + len(value) for name, value in headers)
        if len(headers) > limits.max_headers or size > limits.max_header_bytes:
            said = f"at most {limits.max_headers} headers and {limits.max_header_bytes} bytes"
            return problem(431, f"The head of a request may have {said}.", connection="close")
        length = _header(scope, b"content-length")
        if length and _header(scope, b"transfer-encoding"):  # two lengths: a proxy may have read the other one
            return problem(400, "Content-Length and Transfer-Encoding exclude each other.", connection="close")
        if length.isdigit() and int(length) > limits.max_body_bytes:
            return describe(self._too_large(), "")
        most = limits.max_requests_per_key
        if most is not None and path not in _PROBES and self._running[record.key] > most:
            return problem(
                429, f"At most {most} requests of one key may run at a time.", code="too_many_requests", retry_after="1"
            )
        return None

    def _key(self, scope: Scope) -> int | None:
        """Number of the key that the request brings, from 1; None without a valid one."""
        if not self._keys:
            return None
        scheme, _, key = _header(scope, b"authorization").partition(b" ")
        given = key if scheme.lower() == b"bearer" else b""
        offers = [_digest(text.strip()) for text in (given, _header(scope, b"x-api-key"))]  # the latter is Anthropic's
        # All keys are compared, always: time tells nothing about which one, or how much of it, was right.
        found = [
            number
            for number, known in enumerate(self._keys, 1)
            if sum(hmac.compare_digest(offer, known) for offer in offers)
        ]
        return found[0] if found else None

    def _bounded(self, receive: Receive) -> Receive:
        """A body may lie about its length, or never end: count what arrives, and how long it takes."""
        limits = self._service.limits
        left = limits.max_body_bytes
        loop = asyncio.get_running_loop()
        deadline: float | None = loop.time() + limits.body_seconds

        async def bounded_receive() -> Message:
            nonlocal left, deadline
            if deadline is None:
                return await receive()
            try:
                message = await asyncio.wait_for(receive(), deadline - loop.time())
            except asyncio.TimeoutError:
                said = f"The body did not come within {limits.body_seconds:.0f} s."
                raise ApiError(408, said, headers={"connection": "close"}) from None
            if message["type"] != "http.request" or not message.get("more_body"):
                deadline = None
            if message["type"] == "http.request":
                left -= len(message.get("body", b""))
                if left < 0:
                    raise self._too_large()
            return message

        return bounded_receive

    def _too_large(self) -> ApiError:
        return ApiError(
            413,
            f"The body is larger than {self._service.limits.max_body_bytes} bytes.",
            code="request_too_large",
            headers={"connection": "close"},
        )


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()


def _header(scope: Scope, name: bytes) -> bytes:
    return next((value for key, value in scope["headers"] if key == name), b"")


def _trace(scope: Scope) -> str:
    """The trace id of a W3C traceparent header; it goes into the log, so nothing but hex does."""
    found = _TRACEPARENT.fullmatch(_header(scope, b"traceparent"))
    return found[1].decode() if found else ""
