"""Errors as HTTP: the status, and the body that OpenAI's clients read."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import orjson
from starlette.exceptions import HTTPException
from starlette.responses import Response
from starlette.types import Scope

from martlet.errors import InvalidRequest, MartletError, ModelNotFound, Overloaded

log = logging.getLogger("martlet.server")

_TYPES = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}
_ANTHROPIC_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
}
_CODES = {InvalidRequest: None, ModelNotFound: "model_not_found", Overloaded: "overloaded"}


class ApiError(MartletError):
    """An error that only HTTP has: wrong key, body too large, draining."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ):
        super().__init__(message, param=param)
        self.http_status = status
        self.code = code
        self.headers = dict(headers or {})


def unsupported(field_name: str, why: str = "is not supported by this server") -> ApiError:
    """A field we know and cannot honour: refused by name, never ignored."""
    return ApiError(400, f"{field_name} {why}", param=field_name, code="unsupported_parameter")


@dataclass(frozen=True, slots=True)
class Problem:
    """An error ready to be sent."""

    status: int
    body: dict[str, Any]
    headers: dict[str, str] = field(default_factory=dict)

    def response(self, scope: Scope) -> Response:
        """In the shape of the API that was called."""
        path = scope.get("raw_path") or b""
        anthropic = path == b"/v1/messages" or path.startswith(b"/v1/messages/")
        body = anthropic_body(self, scope["martlet.record"].id) if anthropic else self.body
        return Response(orjson.dumps(body), self.status, self.headers, media_type="application/json")


def problem(status: int, message: str, param: str | None = None, code: str | None = None, **headers: str) -> Problem:
    kind = _TYPES.get(status) or ("invalid_request_error" if status < 500 else "server_error")
    error = {"message": message, "type": kind, "param": param, "code": code}
    return Problem(status, {"error": error}, {name.replace("_", "-"): value for name, value in headers.items()})


def anthropic_body(found: Problem, request_id: str) -> dict[str, Any]:
    """The body that Anthropic's clients read; the field at fault stands in the message."""
    error = found.body["error"]
    kind = _ANTHROPIC_TYPES.get(found.status) or ("invalid_request_error" if found.status < 500 else "api_error")
    param, message = error["param"], error["message"]
    if param and param not in message:
        message = f"{param}: {message}"
    return {"type": "error", "error": {"type": kind, "message": message}, "request_id": request_id}


def describe(error: BaseException, request_id: str) -> Problem:
    """What the client may know of an error. A fault of ours is logged with the id and stays generic outside."""
    if isinstance(error, ApiError):
        found = problem(error.http_status, error.message, error.param, error.code)
        return Problem(found.status, found.body, error.headers)
    if isinstance(error, MartletError) and (error.http_status < 500 or error.http_status == 503):
        headers = {"retry-after": "1"} if error.http_status == 429 else {}
        code = next((code for kind, code in _CODES.items() if isinstance(error, kind)), None)
        found = problem(error.http_status, error.message, error.param, code)
        return Problem(found.status, found.body, headers)
    if isinstance(error, HTTPException):
        return problem(error.status_code, str(error.detail), **(error.headers or {}))
    log.error("request %s failed", request_id, exc_info=error)
    return problem(
        500, f"The server failed on this request; its log has the cause under {request_id}.", code="internal_error"
    )


def describe_validation(errors: Sequence[Mapping[str, Any]]) -> Problem:
    """pydantic's errors as one OpenAI error: about the first field at fault, without repeating its value."""
    # Of the members of a union, the one that was entered furthest is what the client meant.
    first = max(errors[:64], key=lambda error: len(error["loc"]))
    param = field_path(first["loc"])
    if not param:
        return problem(400, "the body must be a JSON object, sent with Content-Type: application/json")
    if first["type"] == "missing":
        return problem(400, f"{param} is required", param, "missing_required_parameter")
    said = dict.fromkeys(_sentence(error["msg"]) for error in errors if field_path(error["loc"]) == param)
    return problem(400, f"{param}: {' or '.join(list(said)[:4])}", param)


def field_path(loc: Sequence[str | int]) -> str:
    """('body', 'messages', 0, 'content', 'str') -> 'messages[0].content': without pydantic's names of union members."""
    path = ""
    for part in loc[1:] if loc and loc[0] == "body" else loc:
        if isinstance(part, int):
            path += f"[{part}]"
        elif "[" not in part and part not in _UNION_MEMBERS:
            path += f".{part}" if path else part
    return path


_UNION_MEMBERS = {"str", "int", "float", "bool", "none"}


def _sentence(message: str) -> str:
    for long, short in (
        ("Value error, ", ""),
        ("Input should", "should"),
        ("List should", "should"),
        (" after validation", ""),
    ):
        message = message.replace(long, short)
    return message
