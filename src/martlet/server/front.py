"""What clients of several replicas meet: connections, keys, limits and signals are the front's, answers a replica's.

A request is passed on as one value; the replica answers with ASGI messages, which are sent as they come. A request that
no replica took is asked again; one that died with its replica gets a 503, or an error event where its stream had begun.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import orjson
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Mount
from starlette.types import Message, Receive, Scope, Send

from martlet.server.affinity import beginnings
from martlet.server.app import cors
from martlet.server.errors import Problem, anthropic_body, describe, problem
from martlet.server.gate import Gate
from martlet.server.metrics import TEXT, Rejections, merged
from martlet.server.options import Limits, ServerOptions
from martlet.server.routing import json_answer, leaves
from martlet.server.service import Traffic

log = logging.getLogger("martlet.server")

_ATTEMPTS = 5  # at requests that died with a replica before it took them
_PAUSE_SECONDS = 0.2  # between them
_METRICS_SECONDS = 5.0
_PRIVATE = (b"authorization", b"x-api-key")  # the front has read them
_PASSED_ON = ("type", "asgi", "http_version", "method", "scheme", "path", "raw_path", "query_string")
_PASSED_ON += ("client", "server")


@dataclass(frozen=True, slots=True)
class Call:
    """One HTTP request on its way to a replica. digests: of the beginnings of its prompt, for the router."""

    id: str
    scope: dict[str, Any]
    body: bytes
    digests: tuple[bytes, ...]


class _Counts:
    """What the front's gate counts; the replicas measure the rest."""

    def __init__(self, model_name: str):
        self.rejections = Rejections(model_name)


class FrontService(Traffic):
    def __init__(self, limits: Limits, model_name: str):
        super().__init__(limits)
        self.metrics = _Counts(model_name)
        self.stopping = asyncio.Event()

    def abort_all(self) -> None:
        self.stopping.set()


def create_front(handle: Any, options: ServerOptions, running: Callable[[], int]) -> Starlette:
    """The application that listens. handle.remote(Call) gives the replica's messages, handle.broadcast what a method of
    all says; running() counts replicas."""
    name = options.model if isinstance(options.model, str) else options.model.name
    service = FrontService(options.limits, (*options.served_model_names, name)[0])
    middleware = [Middleware(CORSMiddleware, **cors(options.cors_origins))] if options.cors_origins else []
    middleware.append(Middleware(Gate, service=service, api_keys=options.api_keys))

    async def front(scope: Scope, receive: Receive, send: Send) -> None:
        path = scope.get("raw_path") or b""
        if path in (b"/health", b"/ready"):
            await _health(await asyncio.to_thread(running), options.replicas, service)(scope, receive, send)
        elif path == b"/metrics":
            await (await _metrics(handle, service))(scope, receive, send)
        else:
            await _forward(handle, service, scope, receive, send)

    app = Starlette(routes=[Mount("", app=front)], middleware=middleware)
    app.state.service = service
    return app


def _health(count: int, wanted: int, service: FrontService) -> Response:
    state = "draining" if service.draining else "ok" if count else "error"
    body = {"status": state, "detail": f"{count} of {wanted} replicas run"}
    return json_answer(body, 200 if state == "ok" else 503)


async def _metrics(handle: Any, service: FrontService) -> Response:
    """Every replica's, told apart by the label engine; one that is just dying or starting is left out."""
    asked = handle.broadcast("metrics")
    found = await asked.results_async(timeout_s=_METRICS_SECONDS, return_exceptions=True)
    texts = dict(sorted(each for each in found if not isinstance(each, BaseException)))
    return Response(merged(texts) + service.metrics.rejections.text(), media_type=TEXT)


async def _forward(handle: Any, service: FrontService, scope: Scope, receive: Receive, send: Send) -> None:
    """Pass a request on, until it is answered, its client leaves, its replicas die or the server stops."""
    record = scope["martlet.record"]
    try:
        body = await Request(scope, receive).body()
    except ClientDisconnect:
        return
    except Exception as error:
        await describe(error, record.id).response(scope)(scope, receive, send)
        return
    plain = {name: scope.get(name) for name in _PASSED_ON} | {"root_path": ""}
    plain["headers"] = [(name, value) for name, value in scope["headers"] if name not in _PRIVATE]
    passage = Passage(handle, Call(record.id, plain, body, beginnings(body)), send)
    asking, leaving, stopping = (
        asyncio.ensure_future(work) for work in (passage.ask(), leaves(receive), service.stopping.wait())
    )
    try:
        await asyncio.wait((asking, leaving, stopping), return_when=asyncio.FIRST_COMPLETED)
        gone = leaving.done()
    finally:
        for task in (asking, leaving, stopping):
            task.cancel()
        await asyncio.gather(asking, leaving, stopping, return_exceptions=True)
    if passage.ended or gone:
        return
    record.finish = "error"
    if service.stopping.is_set():
        lost = problem(503, "The server is shutting down.", code="shutting_down", retry_after="5")
    else:
        said = "The replica that answered this request died; ask again."
        lost = problem(503, said, code="replica_died", retry_after="1")
    if not passage.started:
        await lost.response(scope)(scope, receive, send)
    elif passage.streaming:
        await send({"type": "http.response.body", "body": _event(lost, scope), "more_body": False})
    # else: an answer cut short, which the closed connection tells


class Passage:
    """A request's way to the replicas, and how much of the answer has come: its head (`started`), that of a stream
    (`streaming`), all of it (`ended`)."""

    def __init__(self, handle: Any, call: Call, send: Send):
        self.started = self.streaming = self.ended = False
        self._handle = handle
        self._call = call
        self._send = send

    async def ask(self) -> None:
        """Ends when a replica has answered, or died in the middle, or none takes the request."""
        for _ in range(_ATTEMPTS):
            if await self._taken():
                return
            await asyncio.sleep(_PAUSE_SECONDS)

    async def _taken(self) -> bool:
        """Whether a replica took the request: what it never took may be asked of another."""
        taken = False
        answer = self._handle.remote(self._call)
        try:
            async for messages in answer:
                taken = True
                for message in messages:
                    await self._pass(message)
        except asyncio.CancelledError:
            answer.cancel()
            raise
        except Exception as error:
            log.warning("request %s lost its replica: %s", self._call.id, type(error).__name__)
            return taken
        return True

    async def _pass(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.started = True
            headers = [(bytes(name), bytes(value)) for name, value in message["headers"]]
            headers = [(name, value) for name, value in headers if name != b"x-request-id"]  # the gate writes it
            self.streaming = any(k == b"content-type" and v.startswith(b"text/event-stream") for k, v in headers)
            message = {**message, "headers": headers}
        else:
            self.ended = not message.get("more_body")
        await self._send(message)


def _event(lost: Problem, scope: Scope) -> bytes:
    """The error inside a stream that has begun, as the called API has it."""
    path = scope.get("raw_path") or b""
    if path.startswith(b"/v1/messages"):
        return b"event: error\ndata: " + orjson.dumps(anthropic_body(lost, scope["martlet.record"].id)) + b"\n\n"
    if path == b"/v1/responses":
        error = lost.body["error"]
        body = {"type": "error", "sequence_number": 0, **{k: error[k] for k in ("code", "message", "param")}}
        return b"event: error\ndata: " + orjson.dumps(body) + b"\n\n"
    return b"data: " + orjson.dumps(lost.body) + b"\n\n"
