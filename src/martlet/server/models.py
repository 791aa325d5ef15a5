"""GET /v1/models."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from martlet.server.answers import ModelCard, ModelList, answers
from martlet.server.routing import json_answer
from martlet.server.service import Service

router = APIRouter()


@router.get("/v1/models", summary="The models that requests may name", responses=answers(ModelList))
async def list_models(http: Request) -> Response:
    service: Service = http.app.state.service
    names = (*service.names, *service.backend.adapters())
    return json_answer({"object": "list", "data": [_card(service, name) for name in names]})


@router.get("/v1/models/{name:path}", summary="One of them", responses=answers(ModelCard))
async def get_model(name: str, http: Request) -> Response:
    service: Service = http.app.state.service
    return json_answer(_card(service, service.model_name(name)))


def _card(service: Service, name: str) -> dict[str, Any]:
    """root is the registry's name of the model, or the adapter's own; never a folder of this machine."""
    adapter = service.adapter(name) is not None
    return {
        "id": name,
        "object": "model",
        "created": service.created,
        "owned_by": service.owned_by,
        "root": name if adapter else service.backend.card.name,
        "parent": service.names[0] if adapter else None,
        "max_model_len": service.backend.max_model_len,
    }
