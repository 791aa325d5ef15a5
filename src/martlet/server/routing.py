"""JSON in and out. A body has a bottom: no recursion (ours, a template's, a library's) is at a client's mercy."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from typing import Any, get_type_hints

import orjson
from fastapi import Request
from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute
from pydantic import BaseModel, ValidationError
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

MAX_DEPTH = 100


class JsonRoute(APIRoute):
    """An endpoint(body, http) whose body is JSON. FastAPI documents it and does not run it: every request would pay for
    its dependencies, and nobody here has any."""

    def __init__(self, path: str, endpoint: Callable[..., Any], **more: Any):
        super().__init__(path, endpoint, **more)
        self._body: type[BaseModel] | None = get_type_hints(endpoint).get("body")
        if self._body is not None:
            self.app = self._run

    async def _run(self, scope: Scope, receive: Receive, send: Send) -> None:
        http = Request(scope, receive)
        kind = http.headers.get("content-type", "").partition(";")[0].strip().lower()
        try:
            # Web pages can send other types anywhere without being asked for leave.
            text = await http.body() if kind == "application/json" or kind.endswith("+json") else b"null"
            body = json.loads(text)
            if text.count(b"{") + text.count(b"[") > MAX_DEPTH and _deeper(body, MAX_DEPTH):
                raise RecursionError
            found = self._body.model_validate(body)
        except ClientDisconnect:
            await gone()(scope, receive, send)
            return
        except ValidationError as error:
            raise RequestValidationError(error.errors(include_url=False, include_input=False)) from None
        except RecursionError:
            raise HTTPException(400, f"the body is nested more than {MAX_DEPTH} levels deep") from None
        except ValueError as error:
            raise HTTPException(400, f"the body is not valid JSON: {error}") from None
        await (await self.endpoint(found, http))(scope, receive, send)


async def leaves(receive: Receive) -> None:
    """Ends when the client has closed its connection."""
    while (await receive())["type"] != "http.disconnect":
        pass


def gone() -> Response:
    """To a client that has left. 499 is nginx's word for it; nobody reads it, the log has it."""
    return Response(status_code=499)


def _deeper(value: Any, most: int) -> bool:
    level = [value]
    for _ in range(most + 1):
        level = [
            child
            for node in level
            for child in (node.values() if isinstance(node, dict) else node)
            if isinstance(child, (dict, list))
        ]
        if not level:
            return False
    return True


def json_answer(body: Any, status: int = 200, ignored: Sequence[str] = ()) -> Response:
    return Response(orjson.dumps(body), status, ignored_header(ignored), media_type="application/json")


def ignored_header(names: Sequence[str]) -> dict[str, str]:
    """Tells the client which of its fields had no effect. They are its own words: only plain characters may go into a
    header."""
    plain = [re.sub(r"[^A-Za-z0-9._-]", "?", name[:64]) or "?" for name in names[:32]]
    return {"x-martlet-ignored-fields": ", ".join(plain)} if plain else {}
