"""POST /v1/embeddings: texts or token ids to vectors of length one."""

from __future__ import annotations

import asyncio
import base64
from typing import Any

import numpy as np
from fastapi import APIRouter
from fastapi import Request as HttpRequest
from starlette.responses import Response

from martlet.errors import InvalidRequest
from martlet.server.answers import Embeddings, answers
from martlet.server.prompts import completion_prompts
from martlet.server.routing import JsonRoute, json_answer
from martlet.server.sampling import extra_fields
from martlet.server.schema import EmbeddingBody
from martlet.server.service import Service

router = APIRouter(route_class=JsonRoute)


@router.post("/v1/embeddings", summary="Vectors that tell what texts are about", responses=answers(Embeddings))
async def embeddings(body: EmbeddingBody, http: HttpRequest) -> Response:
    service: Service = http.app.state.service
    backend, record = service.backend, http.scope["martlet.record"]
    model = service.model_name(body.model)
    ignored = extra_fields(body)
    prompts = await completion_prompts(body.input, service, "input")
    ids = [ids for ids, _ in prompts]
    vectors = fit(await asyncio.to_thread(backend.embed, ids), body.dimensions)
    form = _base64 if body.encoding_format == "base64" else np.ndarray.tolist
    record.prompt_tokens = sum(map(len, ids))
    answer = {
        "object": "list",
        "data": [
            {"object": "embedding", "index": index, "embedding": form(vector)} for index, vector in enumerate(vectors)
        ],
        "model": model,
        "usage": {"prompt_tokens": record.prompt_tokens, "total_tokens": record.prompt_tokens},
    }
    return json_answer(answer, ignored=ignored)


def fit(vectors: np.ndarray, dimensions: int | None) -> np.ndarray:
    """Float32 [B, W] to [B, dimensions], rows of length one: the first components carry the most (Matryoshka)."""
    width = vectors.shape[1]
    if dimensions is not None and not 1 <= dimensions <= width:
        raise InvalidRequest(f"dimensions must be from 1 to {width}, got {dimensions}", param="dimensions")
    vectors = vectors[:, :dimensions].astype(np.float32)
    return vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), np.float32(1e-12))


def _base64(vector: np.ndarray) -> Any:
    return base64.b64encode(vector.astype("<f4").tobytes()).decode()
