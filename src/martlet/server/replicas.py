"""Several engines behind one address, under Ray Serve: each replica holds the whole application, the front is ours.

Ray places replicas, looks after their health and replaces them. What clients meet is the front (front.py).
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import functools
import logging
import signal
import threading
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

from starlette.types import Message

from martlet.errors import BackendUnavailable, MartletError
from martlet.server.cores import cpus_each, keep_to, share
from martlet.server.deploy import open_app, serve
from martlet.server.front import Call, create_front
from martlet.server.logs import set_up
from martlet.server.operations import condition
from martlet.server.options import ServerOptions
from martlet.server.sockets import bind, bind_unix, check_tls

log = logging.getLogger("martlet.server")

_APP = "martlet"


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
        answer = handle.options(method_name="answer", stream=True)
        return serve(
            create_front(answer, options, functools.partial(_running, ray_serve)),
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


def _running(ray_serve: Any) -> int:
    """Replicas that run."""
    application = ray_serve.status().applications.get(_APP)
    return application.deployments["Replica"].replica_states.get("RUNNING", 0) if application else 0
