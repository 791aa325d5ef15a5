"""`martlet deploy`: load a model, serve it, and leave in good order."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import os
import signal
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import uvicorn
from fastapi import FastAPI

from martlet.collection import uncollected
from martlet.errors import MartletError, UsageError
from martlet.server.app import create_app
from martlet.server.logs import log_throughput, set_up
from martlet.server.options import ServerOptions
from martlet.server.protocol import Protocol
from martlet.server.service import Service
from martlet.server.sockets import address, bind, bind_unix, check_tls

log = logging.getLogger("martlet.server")

_LOOK_SECONDS = 0.25  # between looks at whether the engine is lost
_FAREWELL_SECONDS = 1.5  # in which a lost engine's clients are told, and /health can be asked
_LAST_SECONDS = 5.0  # for aborted requests to tell their clients, and for connections to close


def run(options: ServerOptions) -> int:
    """Serve until a signal; returns the exit code. Raises MartletError when it cannot start."""
    if options.replicas is not None:
        from martlet.server import replicas

        return replicas.run(options)
    set_up(options.log_level, options.log_format)
    check_tls(options.ssl_certfile, options.ssl_keyfile)
    # Before the model loads: minutes later is too late to fail.
    listener = bind(options.host, options.port) if options.uds is None else bind_unix(options.uds)
    with contextlib.ExitStack() as stack:
        stack.enter_context(listener)
        if options.uds is not None:
            stack.callback(Path(options.uds).unlink, missing_ok=True)
        app = open_app(options, stack)
        code = serve(
            app,
            listener,
            drain_seconds=options.drain_seconds,
            log_interval=options.log_interval,
            ssl_certfile=options.ssl_certfile,
            ssl_keyfile=options.ssl_keyfile,
        )
        if app.state.service.backend.failure() is not None:
            logging.shutdown()
            os._exit(code)  # a step that never ends, or a driver behind it, could hold the process
        return code


@uncollected()
def open_app(options: ServerOptions, stack: contextlib.ExitStack) -> FastAPI:
    """Load the model and make the application; `stack` closes the engine."""
    from martlet import backends, chat, hub

    card = hub.resolve(options.model) if isinstance(options.model, str) else options.model
    backend = backends.load(
        card, backend=options.backend, load=options.load, engine=options.engine, adapters=options.adapters
    )
    stack.enter_context(contextlib.closing(backend))
    if taken := set(options.adapters) & set(options.served_model_names or (card.name,)):
        raise UsageError(f"{taken.pop()!r} is the name of both the model and an adapter", param="adapters")
    template = None
    if options.template or card.template or backend.tokenizer.chat_template:
        template = chat.template_for(
            card,
            backend.tokenizer,
            options.template,
            tools=options.tool_format,
            reasoning=options.reasoning_format,
        )
    log.info("chat template: %s", template.name if template else "none, so only /v1/completions")
    if template is not None:
        thoughts = template.reasoning.name if template.reasoning else "none"
        log.info("tool format: %s; reasoning format: %s", template.tool_format.name, thoughts)
    defaults = backends.generation_defaults(card) | options.defaults
    said = ", ".join(f"{name}={value}" for name, value in defaults.items())
    log.info("sampling defaults: %s", said or "none")
    return create_app(
        backend,
        template,
        served_model_names=options.served_model_names,
        owned_by=options.owned_by,
        api_keys=options.api_keys,
        cors_origins=options.cors_origins,
        adapter_dir=options.adapter_dir,
        defaults=defaults,
        limits=options.limits,
        max_num_queued=options.engine.max_num_queued,
    )


class Server(uvicorn.Server):
    """uvicorn, with our own way to stop."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def server_config(app: FastAPI, *, ssl_certfile: str | None = None, ssl_keyfile: str | None = None) -> uvicorn.Config:
    """How uvicorn runs our applications, whoever starts it."""
    return uvicorn.Config(
        app,
        http=Protocol,
        h11_max_incomplete_event_size=app.state.service.limits.max_header_bytes,
        log_config=None,
        access_log=False,
        server_header=False,
        lifespan="off",
        ws="none",
        ssl_certfile=ssl_certfile,
        ssl_keyfile=ssl_keyfile,
        timeout_graceful_shutdown=int(_LAST_SECONDS),
    )


def serve(
    app: FastAPI,
    listener: socket.socket,
    *,
    drain_seconds: float = 30.0,
    log_interval: float = 0.0,
    ssl_certfile: str | None = None,
    ssl_keyfile: str | None = None,
) -> int:
    """Serve `app` on a bound socket until SIGTERM or SIGINT; returns the exit code.

    First signal: new requests get 503, running ones have `drain_seconds` to finish and are then aborted; exit code 0.
    Second signal: stop at once; exit code 128 + its number. Signals are only heard in the main thread. An engine that
    is lost for good ends it too, after its clients have been told: exit code 1.
    """
    logging.getLogger("uvicorn").setLevel(logging.ERROR)  # what clients do wrong is theirs to know
    server = Server(server_config(app, ssl_certfile=ssl_certfile, ssl_keyfile=ssl_keyfile))
    service: Service = app.state.service
    stopping = Stopping(server, service, drain_seconds)

    async def main() -> None:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                asyncio.get_running_loop().add_signal_handler(number, stopping.on_signal, number)
        where = address(listener, tls=ssl_certfile is not None)
        gc.freeze()  # what is loaded stays: collections, which stop every stream, need not look through it
        log.info("serving on %s", where)
        watch = asyncio.ensure_future(stopping.when_lost())
        ticker = asyncio.ensure_future(log_throughput(service.backend, log_interval)) if log_interval > 0 else None
        try:
            await server.serve(sockets=[listener])
        except OSError as error:
            raise MartletError(f"cannot listen on {where}: {error.strerror}", param="port") from None
        finally:
            watch.cancel()
            if ticker is not None:
                ticker.cancel()

    asyncio.run(main())
    return stopping.exit_code


class Stopping:
    """How a server ends: drained after one signal, at once after two."""

    def __init__(self, server: uvicorn.Server, service: Service, drain_seconds: float):
        self.exit_code = 0
        self._server = server
        self._service = service
        self._drain_seconds = drain_seconds
        self._task: asyncio.Task[None] | None = None

    def on_signal(self, number: int) -> None:
        if self._task is None:
            self._task = asyncio.get_running_loop().create_task(self.drain())
        else:
            self.exit_code = 128 + number
            self._service.abort_all()
            self._server.should_exit = self._server.force_exit = True

    async def when_lost(self) -> None:
        """End the server when its engine can answer nothing any more."""
        while (reason := self._service.backend.failure()) is None:
            await asyncio.sleep(_LOOK_SECONDS)
        log.error("nothing can be answered any more, so the server ends: %s", reason)
        self.exit_code = 1
        await _within(_FAREWELL_SECONDS, self._service)
        await asyncio.sleep(_FAREWELL_SECONDS)
        self._server.should_exit = self._server.force_exit = True

    async def drain(self) -> None:
        service = self._service
        service.draining = True
        log.info("draining: %d requests are running, up to %.0f s", len(service.active), self._drain_seconds)
        if not await _within(self._drain_seconds, service):
            log.warning("aborting %d requests that did not finish in time", len(service.active))
            service.abort_all()
            await _within(_LAST_SECONDS, service)
        self._server.should_exit = True


async def _within(seconds: float, service: Service) -> bool:
    try:
        await asyncio.wait_for(service.idle(), seconds)
    except asyncio.TimeoutError:
        return False
    return True
