"""The application: routers, one gate in front of them, errors in OpenAI's shape whatever raises them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.middleware.cors import CORSMiddleware
from starlette.exceptions import HTTPException
from starlette.responses import Response

from martlet._version import __version__
from martlet.backends.base import Backend
from martlet.chat import Template
from martlet.errors import MartletError, did_you_mean
from martlet.server import adapters, chat, completions, embeddings, messages, models, operations, responses, tokens
from martlet.server.answers import document
from martlet.server.errors import describe, describe_validation, problem
from martlet.server.gate import Gate
from martlet.server.options import Limits
from martlet.server.service import Service


def create_app(
    backend: Backend,
    template: Template | None = None,
    *,
    served_model_names: Sequence[str] = (),
    owned_by: str = "martlet",
    api_keys: Sequence[str] = (),
    cors_origins: Sequence[str] = (),
    adapter_dir: str | None = None,
    defaults: Mapping[str, Any] | None = None,
    limits: Limits | None = None,
    max_num_queued: int | None = None,
) -> FastAPI:
    """An ASGI application that serves `backend`. It does not own the backend: close it after the last request.

    template: None for a model that cannot chat. served_model_names, cors_origins, adapter_dir: see ServerOptions.
    defaults: SamplingParams fields for requests that leave them open, e.g. `generation_defaults(card)`.
    max_num_queued: the backend's own limit, which /ready reports.
    """
    service = Service(
        backend,
        template,
        tuple(served_model_names) or (backend.card.name,),
        defaults or {},
        limits or Limits(),
        owned_by=owned_by,
        adapter_dir=adapter_dir,
        max_num_queued=max_num_queued,
    )
    app = FastAPI(title="Martlet", version=__version__)
    app.state.service = service
    app.openapi = lambda: document(app)
    for room in (chat, completions, responses, messages, embeddings, tokens, models, adapters, operations):
        app.router.routes.extend(room.router.routes)  # as include_router does, but matched once and in one list
    app.add_exception_handler(RequestValidationError, _on_invalid)
    app.add_exception_handler(HTTPException, _on_error)
    app.add_exception_handler(404, _on_unknown_path)
    app.add_exception_handler(405, _on_wrong_method)
    app.add_exception_handler(MartletError, _on_error)
    app.add_middleware(Gate, service=service, api_keys=tuple(api_keys))
    if cors_origins:  # in front of the gate: a browser asks whether it may call before it sends a key
        app.add_middleware(CORSMiddleware, **cors(cors_origins))
    return app


def cors(origins: Sequence[str]) -> dict[str, Any]:
    """What web pages of `origins` may do, as CORSMiddleware takes it."""
    return {
        "allow_origins": list(origins),
        "allow_methods": ["GET", "POST", "OPTIONS"],
        "allow_headers": ["*"],
        "expose_headers": ["x-request-id", "retry-after", "x-martlet-ignored-fields"],
    }


async def _on_invalid(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    return describe_validation(error.errors()).response(request.scope)


async def _on_error(request: Request, error: Exception) -> Response:
    return describe(error, request.scope["martlet.record"].id).response(request.scope)


async def _on_unknown_path(request: Request, error: Exception) -> Response:
    path = request.url.path[:200]
    near = did_you_mean(path, [route.path for route in request.app.routes if "{" not in route.path])
    return problem(404, f"there is nothing at {path}.{near}", code="not_found").response(request.scope)


async def _on_wrong_method(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    allow = (error.headers or {}).get("Allow", "")
    said = f"{request.url.path[:200]} is asked with {allow}, not with {request.method[:20]}"
    return problem(405, said, code="method_not_allowed", allow=allow).response(request.scope)
