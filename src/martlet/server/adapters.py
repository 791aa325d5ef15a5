"""POST /v1/load_lora_adapter and /v1/unload_lora_adapter, where the server was started with a folder of adapters.

A client chooses a path inside that folder and nothing else: links are followed before it is looked where they lead.
"""

from __future__ import annotations

import asyncio
import re
from pathlib import Path

from fastapi import APIRouter
from fastapi import Request as HttpRequest
from starlette.responses import Response

from martlet.errors import InvalidRequest, ModelNotFound, did_you_mean
from martlet.server.answers import State, answers
from martlet.server.errors import ApiError
from martlet.server.routing import JsonRoute, json_answer
from martlet.server.sampling import extra_fields
from martlet.server.schema import LoadAdapterBody, UnloadAdapterBody
from martlet.server.service import Service

router = APIRouter(route_class=JsonRoute)

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")


@router.post("/v1/load_lora_adapter", summary="Serve one more adapter", responses=answers(State))
async def load_adapter(body: LoadAdapterBody, http: HttpRequest) -> Response:
    service: Service = http.app.state.service
    root = _root(service)
    ignored = extra_fields(body)
    name = body.lora_name
    if not _NAME.fullmatch(name):
        raise InvalidRequest(
            "lora_name must be 1 to 128 letters, digits, dots, dashes or underscores, and begin with one of the "
            "first two",
            param="lora_name",
        )
    if name in service.names or (name in service.backend.adapters() and not body.load_inplace):
        raise InvalidRequest(f"the name {name} is taken", param="lora_name")
    path = await asyncio.to_thread(_inside, root, body.lora_path)
    try:
        await asyncio.to_thread(service.backend.load_adapter, name, path)
    except InvalidRequest as error:
        raise InvalidRequest(error.message, param="lora_path") from error  # not the flag's name
    return json_answer({"status": "loaded", "model": name}, ignored=ignored)


@router.post("/v1/unload_lora_adapter", summary="Serve an adapter no longer", responses=answers(State))
async def unload_adapter(body: UnloadAdapterBody, http: HttpRequest) -> Response:
    service: Service = http.app.state.service
    _root(service)
    ignored = extra_fields(body)
    names = service.backend.adapters()
    if body.lora_name not in names:
        near = did_you_mean(body.lora_name, names)
        raise ModelNotFound(f"no adapter {body.lora_name[:200]!r} is loaded.{near}", param="lora_name")
    await asyncio.to_thread(service.backend.unload_adapter, body.lora_name)
    return json_answer({"status": "unloaded", "model": body.lora_name}, ignored=ignored)


def _root(service: Service) -> Path:
    if service.adapter_dir is None:
        raise ApiError(403, "adapters cannot be changed here: the server was started without --adapter_dir")
    return Path(service.adapter_dir).resolve()


def _inside(root: Path, asked: str) -> Path:
    """The folder `asked` for, below `root`. Says the same of what is outside and of what is not there."""
    try:
        path = (root / asked).resolve()
        found = path != root and path.is_relative_to(root) and path.is_dir()
    except (OSError, ValueError, RuntimeError):  # a null byte, a name too long, links in a circle
        found = False
    if not found:
        raise InvalidRequest("lora_path is no folder below the server's --adapter_dir", param="lora_path")
    return path
