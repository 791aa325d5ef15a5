"""GET /health, /ready, /version and /metrics: for whoever runs the server."""

from __future__ import annotations

from fastapi import APIRouter, Request
from starlette.responses import PlainTextResponse, Response

from martlet._version import __version__
from martlet.engine.request import Stats
from martlet.server.answers import State, Version, answers
from martlet.server.metrics import TEXT
from martlet.server.routing import json_answer
from martlet.server.service import Service

router = APIRouter()

_STATES = answers(State) | {503: {"model": State}}

STUCK_SECONDS = 60.0  # no step takes this long on any machine that can serve


@router.head("/health", include_in_schema=False)
@router.get("/health", summary="200 when requests will be answered, else 503 with the reason", responses=_STATES)
async def health(http: Request) -> Response:
    service: Service = http.app.state.service
    return _state(*condition(service.backend.stats(), service.draining))


@router.head("/ready", include_in_schema=False)
@router.get("/ready", summary="200 when a new request would be taken now, else 503 with the reason", responses=_STATES)
async def ready(http: Request) -> Response:
    service: Service = http.app.state.service
    stats, most = service.backend.stats(), service.max_num_queued
    state, detail = condition(stats, service.draining)
    if state == "ok" and most is not None and stats.waiting >= most:
        state, detail = "busy", f"{stats.waiting} requests wait, and at most {most} may"
    return _state(state, detail)


def _state(state: str, detail: str) -> Response:
    return json_answer({"status": state} | ({"detail": detail} if detail else {}), 200 if state == "ok" else 503)


@router.get("/version", summary="The server's version", responses=answers(Version))
async def version() -> Response:
    return json_answer({"version": __version__})


def condition(stats: Stats, draining: bool) -> tuple[str, str]:
    """(state, detail): "ok", "error", "stuck" or "draining"."""
    if stats.error is not None:
        return "error", stats.error
    if stats.busy_seconds > STUCK_SECONDS:
        return "stuck", f"the step under way has taken {stats.busy_seconds:.0f} s"
    return ("draining", "") if draining else ("ok", "")


@router.get("/metrics", summary="Prometheus metrics", response_class=PlainTextResponse)
async def metrics(http: Request) -> Response:
    service: Service = http.app.state.service
    return Response(service.metrics.text(), media_type=TEXT)
