"""`martlet deploy`: load a model, serve it, and leave in good order."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import signal
import socket
import threading
from collections.abc import Iterator

import uvicorn
from fastapi import FastAPI

from martlet.errors import MartletError
from martlet.server.app import create_app
from martlet.server.options import ServerOptions
from martlet.server.service import Service

log = logging.getLogger("martlet.server")

_LAST_SECONDS = 5.0  # for aborted requests to tell their clients, and for connections to close


def run(options: ServerOptions) -> int:
    """Serve until a signal; returns the exit code. Raises MartletError when it cannot start."""
    from martlet import backends, chat, hub

    logging.basicConfig(format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    logging.getLogger("martlet").setLevel(options.log_level.upper())
    with bind(options.host, options.port) as listener:  # before the model loads: minutes later is too late to fail
        card = hub.resolve(options.model) if isinstance(options.model, str) else options.model
        with contextlib.closing(
            backends.load(card, backend=options.backend, load=options.load, engine=options.engine)
        ) as backend:
            template = None
            if options.template or card.template or backend.tokenizer.chat_template:
                template = chat.template_for(card, backend.tokenizer, options.template)
            log.info("chat template: %s", template.name if template else "none, so only /v1/completions")
            defaults = backends.generation_defaults(card)
            said = ", ".join(f"{name}={value}" for name, value in defaults.items())
            log.info("sampling defaults of the model: %s", said or "none")
            app = create_app(
                backend,
                template,
                served_model_names=options.served_model_names,
                api_keys=options.api_keys,
                defaults=defaults,
                limits=options.limits,
            )
            return serve(app, listener, drain_seconds=options.drain_seconds)


def bind(host: str, port: int) -> socket.socket:
    """A socket that owns the address but does not listen yet, so that clients are refused until the model is there."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, protocol)
    except OSError as error:
        raise MartletError(f"cannot use host {host!r}: {error.strerror or error}", param="host") from None
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind(address)
    except OSError as error:
        listener.close()
        if error.errno == errno.EADDRINUSE:
            raise MartletError(
                f"port {port} of {host} is in use; stop the other server or choose another with --port", param="port"
            ) from None
        raise MartletError(f"cannot bind to {host} port {port}: {error.strerror}", param="port") from None
    return listener


class Server(uvicorn.Server):
    """uvicorn, with our own way to stop."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def serve(app: FastAPI, listener: socket.socket, *, drain_seconds: float = 30.0) -> int:
    """Serve `app` on a bound socket until SIGTERM or SIGINT; returns the exit code.

    First signal: new requests get 503, running ones have `drain_seconds` to finish and are then aborted; exit code 0.
    Second signal: stop at once; exit code 128 + its number. Signals are only heard in the main thread.
    """
    config = uvicorn.Config(
        app,
        log_config=None,
        access_log=False,
        server_header=False,
        lifespan="off",
        ws="none",
        timeout_graceful_shutdown=int(_LAST_SECONDS),
    )
    logging.getLogger("uvicorn").setLevel(logging.WARNING)
    server = Server(config)
    stopping = Stopping(server, app.state.service, drain_seconds)

    async def main() -> None:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                asyncio.get_running_loop().add_signal_handler(number, stopping.on_signal, number)
        host, port = listener.getsockname()[:2]
        log.info("serving on http://%s:%d", f"[{host}]" if ":" in host else host, port)
        try:
            await server.serve(sockets=[listener])
        except OSError as error:
            raise MartletError(f"cannot listen on {host} port {port}: {error.strerror}", param="port") from None

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
