"""The gate every HTTP request passes, on raw ASGI: keys, draining, body size, one log line, and no crash behind it.

Decisions rest on the raw path, the bytes that the router's path is made of, so no spelling of a path gets around them.
"""

from __future__ import annotations

import hashlib
import hmac
import logging
from collections.abc import Sequence

from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from martlet.server.errors import ApiError, Problem, describe, problem
from martlet.server.record import Record
from martlet.server.service import Service

log = logging.getLogger("martlet.server")

_OPEN = (b"/health",)  # needs no key
_PROBES = (b"/health", b"/metrics")  # answered while draining, and not worth a line in the log


class Gate:
    def __init__(self, app: ASGIApp, service: Service, api_keys: Sequence[str]):
        self._app = app
        self._service = service
        self._keys = [_digest(key.encode()) for key in api_keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
        elif scope["type"] == "http":
            await self._http(scope, receive, send)
        else:
            await send({"type": "websocket.close", "code": 1008})

    async def _http(self, scope: Scope, receive: Receive, send: Send) -> None:
        service = self._service
        record = scope["martlet.record"] = Record()
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
        try:
            refused = self._refusal(scope, path)
            if refused is not None:
                await refused.response()(scope, receive, tagged_send)
            else:
                await self._app(scope, self._bounded(scope, receive), tagged_send)
        except Exception as error:
            found = describe(error, record.id)
            if status == 0:
                await found.response()(scope, receive, tagged_send)
        finally:
            service.leave(record.id)
            if record.model and record.finish not in ("", "abort", "error"):
                service.metrics.observe(record)
            log.log(
                logging.DEBUG if probe and status == 200 else logging.INFO,
                "%s",
                record.line(scope["method"], path.decode("latin-1")[:200], status),
            )

    def _refusal(self, scope: Scope, path: bytes) -> Problem | None:
        if self._keys and path not in _OPEN and not self._has_key(scope):
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
        length = _header(scope, b"content-length")
        if length.isdigit() and int(length) > self._service.limits.max_body_bytes:
            return describe(self._too_large(), "")
        return None

    def _has_key(self, scope: Scope) -> bool:
        scheme, _, key = _header(scope, b"authorization").partition(b" ")
        given = _digest(key.strip())
        # All keys are compared, always: time tells nothing about which one, or how much of it, was right.
        matches = [hmac.compare_digest(given, known) for known in self._keys]
        return any(matches) and scheme.lower() == b"bearer"

    def _bounded(self, scope: Scope, receive: Receive) -> Receive:
        """A body may come without a length, or lie about it: count what arrives."""
        left = self._service.limits.max_body_bytes

        async def bounded_receive() -> Message:
            nonlocal left
            message = await receive()
            if message["type"] == "http.request":
                left -= len(message.get("body", b""))
                if left < 0:
                    error = self._too_large()
                    raise HTTPException(error.http_status, error.message, error.headers)
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
