"""`martlet deploy`: serve a model over HTTP."""

from __future__ import annotations

import sys
from dataclasses import dataclass

from martlet.cli import swift_flags
from martlet.cli.flags import Command, flag
from martlet.cli.options import EngineFlags, ModelFlags, engine_options, load_options, resolve_model, template_name
from martlet.errors import UsageError

LOCAL = ("127.0.0.1", "localhost", "::1")


@dataclass(frozen=True)
class DeployOptions(EngineFlags, ModelFlags):
    """Server."""

    host: str = flag("address to listen on; 0.0.0.0 lets other machines in", "127.0.0.1", metavar="ADDRESS")
    port: int = flag("port to listen on", 8000)
    served_model_name: tuple[str, ...] = flag(
        "names that clients may ask for; the first is the main one", (), metavar="NAME"
    )
    api_key: tuple[str, ...] = flag(
        "keys, any of which lets a client in (default: no key is asked for)", (), metavar="KEY"
    )
    drain_seconds: float = flag("after SIGTERM, how long running requests may take to finish", 30.0)
    log_level: str = flag("how much to log", "info", choices=("debug", "info", "warning", "error"))


def run(options: DeployOptions) -> int:
    """Serve until SIGTERM or Ctrl-C."""
    if not 0 <= options.port <= 65535:
        raise UsageError(f"--port must be from 0 to 65535, got {options.port}", param="port")
    from martlet import server

    load = load_options(options, options)
    if options.host not in LOCAL and not options.api_key:
        print(
            f"warning: whoever reaches {options.host} may use this server; --api_key KEY asks for a key",
            file=sys.stderr,
        )
    return server.run(
        server.ServerOptions(
            model=resolve_model(options),
            backend=options.infer_backend,
            load=load,
            engine=engine_options(options),
            template=template_name(options),
            host=options.host,
            port=options.port,
            served_model_names=options.served_model_name,
            api_keys=options.api_key,
            drain_seconds=options.drain_seconds,
            log_level=options.log_level,
        )
    )


COMMAND = Command(
    "Serve a model over HTTP, OpenAI-compatible.",
    DeployOptions,
    run,
    not_yet=swift_flags.DEPLOY,
)
