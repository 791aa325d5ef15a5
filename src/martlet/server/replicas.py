"""Several engines behind one address, under Ray Serve: each replica holds the whole application, the front is ours.

The front takes connections, keys, limits and signals, and passes a request on as one value; a replica answers with
ASGI messages, which the front sends as they come. Ray places replicas, looks after their health and replaces them.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
import signal
import threading
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import orjson
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Mount
from starlette.types import Message, Receive, Scope, Send

from martlet.errors import BackendUnavailable, MartletError
from martlet.server.affinity import beginnings
from martlet.server.app import cors
from martlet.server.cores import cpus_each, keep_to, share
from martlet.server.deploy import open_app, serve
from martlet.server.errors import Problem, anthropic_body, describe, problem
from martlet.server.gate import Gate
from martlet.server.logs import set_up
from martlet.server.metrics import TEXT, Rejections, merged
from martlet.server.operations import condition
from martlet.server.options import Limits, ServerOptions
from martlet.server.service import Traffic
from martlet.server.sockets import bind, bind_unix, check_tls

log = logging.getLogger("martlet.server")

_APP = "martlet"
_ATTEMPTS = 5  # at requests that died with a replica before it took them
_METRICS_SECONDS = 5.0
_PRIVATE = (b"authorization", b"x-api-key")  # the front has read them


@dataclasses.dataclass(frozen=True, slots=True)
class Call:
    """One HTTP request on its way to a replica. digests: of the beginnings of its prompt, for the router."""

    id: str
    scope: dict[str, Any]
    body: bytes
    digests: tuple[bytes, ...]


class Replica:
    """The application in a process of Ray's, on its own share of the machine's cores."""

    def __init__(self, options: ServerOptions):
        from ray.serve import get_replica_context

        set_up(options.log_level, options.log_format)
        keep_to(share(get_replica_context().rank.local_rank, options.replica_cpus or 0.0))
        self._stack = contextlib.ExitStack()
        self._app = open_app(options, self._stack)

    async def answer(self, call: Call) -> AsyncIterator[list[Message]]:
        """The ASGI messages of the answer, in lists of what is there at once; first an empty list: it was taken."""
        yield []
        messages: asyncio.Queue[Message | None] = asyncio.Queue()
        left = asyncio.Event()
        asked = False

        async def receive() -> Message:
            nonlocal asked
            if asked:
                await left.wait()
                return {"type": "http.disconnect"}
            asked = True
            return {"type": "http.request", "body": call.body, "more_body": False}

        async def send(message: Message) -> None:
            if not left.is_set():
                messages.put_nowait(message)

        scope = {**call.scope, "martlet.id": call.id}
        task = asyncio.ensure_future(self._app(scope, receive, send))
        task.add_done_callback(lambda _: messages.put_nowait(None))
        try:
            while (message := await messages.get()) is not None:
                ready = [message]
                while not messages.empty() and (message := messages.get_nowait()) is not None:
                    ready.append(message)
                yield ready
                if message is None:
                    break
        finally:
            left.set()  # the application hears that the client left, and aborts what still runs

    def metrics(self) -> tuple[int, str]:
        """(this replica's number, which a successor takes over, what GET /metrics would say)."""
        from ray.serve import get_replica_context

        return get_replica_context().rank.rank, self._app.state.service.metrics.text().decode()

    def check_health(self) -> None:
        """Ray's question; one that fails it three times is replaced."""
        state, detail = condition(self._app.state.service.backend.stats(), False)
        if state != "ok":
            raise RuntimeError(f"{state}: {detail}")

    def __del__(self) -> None:
        if hasattr(self, "_stack"):
            self._stack.close()


def run(options: ServerOptions) -> int:
    """Serve over replicas until a signal; returns the exit code. SIGHUP restarts the replicas one after the other."""
    try:
        import ray
        from ray import serve as ray_serve
    except ImportError:
        raise BackendUnavailable(
            "replicas run under Ray Serve, which is not installed here; pip install 'martlet[ray]'", param="replicas"
        ) from None
    set_up(options.log_level, options.log_format)
    check_tls(options.ssl_certfile, options.ssl_keyfile)
    listener = bind(options.host, options.port) if options.uds is None else bind_unix(options.uds)
    with contextlib.ExitStack() as stack:
        stack.enter_context(listener)
        if options.uds is not None:
            stack.callback(Path(options.uds).unlink, missing_ok=True)
        try:
            ray.init(options.ray_address, include_dashboard=None if options.ray_address else False)
        except (ConnectionError, ValueError) as error:
            raise MartletError(f"no Ray cluster answers: {error}", param="ray_address") from None
        stack.callback(ray.shutdown)
        if options.replica_cpus is None:
            nodes = [node["Resources"].get("CPU", 0.0) for node in ray.nodes() if node["Alive"]]
            options = dataclasses.replace(options, replica_cpus=cpus_each(nodes, options.replicas))
        _check_room(options, ray.cluster_resources())
        ray_serve.start(proxy_location="Disabled")
        stack.callback(ray_serve.shutdown if options.ray_address is None else lambda: ray_serve.delete(_APP))
        application = _deployment(options, ray_serve)
        log.info("starting %d replicas", options.replicas)
        try:
            handle = ray_serve.run(application, name=_APP, route_prefix=None)
        except RuntimeError as error:
            raise MartletError(f"the replicas did not start: {error}", param="replicas") from None

        def restart() -> None:
            log.info("restarting the replicas one after the other")
            try:
                ray_serve.run(application, name=_APP, route_prefix=None)
                log.info("all replicas were restarted")
            except Exception:
                log.exception("the replicas could not all be restarted")

        signal.signal(signal.SIGHUP, lambda *_: threading.Thread(target=restart, daemon=True).start())
        return serve(
            create_front(handle.options(method_name="answer", stream=True), options, _states(ray_serve)),
            listener,
            drain_seconds=options.drain_seconds,
            ssl_certfile=options.ssl_certfile,
            ssl_keyfile=options.ssl_keyfile,
        )


def _check_room(options: ServerOptions, there: dict[str, float]) -> None:
    """Ray would wait for ever for a machine that nobody will bring."""
    for name, flag, each in (
        ("CPU", "replica_cpus", options.replica_cpus),
        ("GPU", "replica_gpus", options.replica_gpus),
    ):
        if each * options.replicas > there.get(name, 0):
            raise MartletError(
                f"{options.replicas} replicas of {each:g} {name} each do not fit: Ray has {there.get(name, 0):g}; "
                f"lower --replicas or --{flag}",
                param=flag,
            )


def _deployment(options: ServerOptions, ray_serve: Any) -> Any:
    limits = dataclasses.replace(options.limits, max_requests_per_key=None)  # counted by the front
    own = dataclasses.replace(options, api_keys=(), cors_origins=(), ssl_certfile=None, ssl_keyfile=None, limits=limits)
    config = ray_serve.config.RequestRouterConfig(request_router_class="martlet.server.ray_router:AffinityRouter")
    deployment = ray_serve.deployment(Replica).options(
        name="Replica",
        num_replicas=options.replicas,
        max_ongoing_requests=1_000_000,  # the engine queues, and says 429
        ray_actor_options={"num_cpus": options.replica_cpus, "num_gpus": options.replica_gpus},
        health_check_period_s=2,
        health_check_timeout_s=30,
        graceful_shutdown_wait_loop_s=0.5,
        graceful_shutdown_timeout_s=options.drain_seconds,
        request_router_config=config,
    )
    return deployment.bind(own)


def _states(ray_serve: Any):
    def states() -> int:
        """Replicas that run."""
        application = ray_serve.status().applications.get(_APP)
        return application.deployments["Replica"].replica_states.get("RUNNING", 0) if application else 0

    return states


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


def create_front(handle: Any, options: ServerOptions, running: Any) -> Starlette:
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
    return Response(orjson.dumps(body), 200 if state == "ok" else 503, media_type="application/json")


async def _metrics(handle: Any, service: FrontService) -> Response:
    """Every replica's, told apart by the label engine; one that is just dying or starting is left out."""
    asked = handle.broadcast("metrics")
    found = await asked.results_async(timeout_s=_METRICS_SECONDS, return_exceptions=True)
    texts = dict(sorted(each for each in found if not isinstance(each, BaseException)))
    return Response(merged(texts) + service.metrics.rejections.text(), media_type=TEXT)


async def _forward(handle: Any, service: FrontService, scope: Scope, receive: Receive, send: Send) -> None:
    record = scope["martlet.record"]
    started = streaming = False
    try:
        body = await Request(scope, receive).body()
    except ClientDisconnect:
        return
    except Exception as error:
        await describe(error, record.id).response(scope)(scope, receive, send)
        return
    plain = {
        name: scope.get(name)
        for name in ("type", "asgi", "http_version", "method", "scheme", "raw_path", "query_string", "client", "server")
    }
    plain |= {"path": scope["path"], "root_path": ""}
    plain["headers"] = [(name, value) for name, value in scope["headers"] if name not in _PRIVATE]
    call = Call(record.id, plain, body, beginnings(body))

    async def attempt() -> bool:
        """Whether the replica took the request: what it never took may be asked of another."""
        nonlocal started, streaming
        taken = False
        answer = handle.remote(call)
        try:
            async for messages in answer:
                taken = True
                for message in messages:
                    if message["type"] == "http.response.start":
                        started = True
                        headers = [(bytes(k), bytes(v)) for k, v in message["headers"] if bytes(k) != b"x-request-id"]
                        streaming = any(k == b"content-type" and v.startswith(b"text/event-stream") for k, v in headers)
                        message = {**message, "headers": headers}
                    await send(message)
        except asyncio.CancelledError:
            answer.cancel()
            raise
        except Exception as error:
            log.warning("request %s lost its replica: %s", record.id, type(error).__name__)
            return taken
        return True

    async def ask() -> None:
        for _ in range(_ATTEMPTS):
            if await attempt():
                break
            await asyncio.sleep(0.2)

    ended = False
    real_send = send

    async def watched(message: Message) -> None:
        nonlocal ended
        ended = message["type"] == "http.response.body" and not message.get("more_body")
        await real_send(message)

    send = watched
    tasks = [
        asyncio.ensure_future(work) for work in (ask(), _disconnected(receive), service.stopping.wait())
    ]  # the first to end decides
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    if ended or (tasks[1].done() and not tasks[1].cancelled()):
        return
    record.finish = "error"
    if service.stopping.is_set():
        lost = problem(503, "The server is shutting down.", code="shutting_down", retry_after="5")
    else:
        lost = problem(
            503, "The replica that answered this request died; ask again.", code="replica_died", retry_after="1"
        )
    if not started:
        await lost.response(scope)(scope, receive, real_send)
    elif streaming:
        await real_send({"type": "http.response.body", "body": _event(lost, scope), "more_body": False})
    # else: an answer cut short, which the closed connection tells


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def _event(lost: Problem, scope: Scope) -> bytes:
    """The error inside a stream that has begun, as the called API has it."""
    if (scope.get("raw_path") or b"").startswith(b"/v1/messages"):
        return b"event: error\ndata: " + orjson.dumps(anthropic_body(lost, scope["martlet.record"].id)) + b"\n\n"
    if scope.get("raw_path") == b"/v1/responses":
        error = lost.body["error"]
        body = {"type": "error", "sequence_number": 0, **{k: error[k] for k in ("code", "message", "param")}}
        return b"event: error\ndata: " + orjson.dumps(body) + b"\n\n"
    return b"data: " + orjson.dumps(lost.body) + b"\n\n"
