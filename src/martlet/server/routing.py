"""JSON in and out. A body has a bottom: no recursion (ours, a template's, a library's) is at a client's mercy."""

from __future__ import annotations

import re
from collections.abc import Callable, Coroutine, Sequence
from typing import Any

import orjson
from fastapi import Request
from fastapi.routing import APIRoute
from starlette.exceptions import HTTPException
from starlette.responses import Response

MAX_DEPTH = 100


class JsonRoute(APIRoute):
    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()

        async def handle_json(request: Request) -> Response:
            return await handle(_JsonRequest(request.scope, request.receive))

        return handle_json


class _JsonRequest(Request):
    async def json(self) -> Any:
        body = await self.body()
        found = await super().json()
        if body.count(b"{") + body.count(b"[") > MAX_DEPTH and _deeper(found, MAX_DEPTH):
            raise HTTPException(400, f"the body is nested more than {MAX_DEPTH} levels deep")
        return found


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
