"""`martlet deploy`: serve a model over HTTP."""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from martlet.cli import swift_flags
from martlet.cli.adapters import AdapterFlags, choose, with_slots
from martlet.cli.flags import Command, flag
from martlet.cli.options import EngineFlags, ModelFlags, engine_options, load_options, resolve_model, template_name
from martlet.collection import uncollected
from martlet.errors import UsageError

LOCAL = ("127.0.0.1", "localhost", "::1")


@dataclass(frozen=True)
class AccessFlags:
    """Access."""

    api_key: tuple[str, ...] = flag(
        "keys, any of which lets a client in (default: no key is asked for)", (), metavar="KEY"
    )
    api_key_file: str | None = flag("a file of more keys, one a line; # begins a comment", None, metavar="PATH")
    cors_origins: tuple[str, ...] = flag(
        "web origins whose pages may call this server, * for all (default: none)", (), metavar="ORIGIN"
    )
    ssl_certfile: str | None = flag("certificate chain (PEM), for HTTPS", None, metavar="PATH")
    ssl_keyfile: str | None = flag("its private key (PEM), when it is not in the same file", None, metavar="PATH")
    adapter_dir: str | None = flag(
        "lets clients load and unload adapters that lie below this folder (default: they may not)", None, metavar="DIR"
    )


@dataclass(frozen=True)
class LimitFlags:
    """Limits."""

    max_num_queued: int = flag("requests that may wait; more are refused with 429 and Retry-After", 4096)
    max_body_mb: float = flag("size of a request's body, in MiB", 16.0)
    max_requests_per_key: int | None = flag("requests that one key may have running (default: no limit)", None)
    request_timeout: float | None = flag(
        "seconds an answer may take before it is stopped (default: no limit)", None, metavar="SECONDS"
    )


@dataclass(frozen=True)
class DefaultsFlags:
    """Sampling, where a request says nothing (default: the model's generation_config)."""

    temperature: float | None = flag("0 always takes the likeliest token", None)
    top_k: int | None = flag("draw from the k likeliest tokens; 0 or -1: from all", None)
    top_p: float | None = flag("draw from the likeliest tokens that add up to p", None)
    repetition_penalty: float | None = flag("above 1 discourages tokens that already occurred", None)
    do_sample: bool | None = flag("false is greedy", None)
    seed: int | None = flag("makes the server's answers to the same requests in the same order repeatable", None)


@dataclass(frozen=True)
class ReplicaFlags:
    """Replicas, under Ray Serve."""

    replicas: int = flag("engines behind one address, each with the whole model; SIGHUP restarts them in turn", 1)
    router: bool = flag("run under Ray Serve even with one replica", False)
    replica_cpus: float | None = flag(
        "CPUs that each takes of Ray's and computes on (default: an equal share of the cores)", None
    )
    replica_gpus: float | None = flag("GPUs that each takes (default: 1 with --device cuda, else 0)", None)
    ray_address: str | None = flag(
        "a running Ray cluster to join, auto for this machine's (default: one is started here)", None, metavar="ADDRESS"
    )


@dataclass(frozen=True)
class DeployOptions(ReplicaFlags, DefaultsFlags, LimitFlags, AccessFlags, AdapterFlags, EngineFlags, ModelFlags):
    """Server."""

    host: str = flag("address to listen on; 0.0.0.0 lets other machines in", "127.0.0.1", metavar="ADDRESS")
    port: int = flag("port to listen on", 8000)
    uds: str | None = flag("a Unix socket to listen on instead", None, metavar="PATH")
    served_model_name: tuple[str, ...] = flag(
        "names that clients may ask for; the first is the main one", (), metavar="NAME"
    )
    tool_format: str | None = flag(
        "how the model writes tool calls: hermes, llama3, mistral, pythonic, react or chatglm3 (default: as its card "
        "or chat template says, else hermes)",
        None,
        metavar="NAME",
    )
    reasoning_format: str | None = flag(
        "how the model marks its thoughts: think, magistral, granite, seed or none (default: as its template says)",
        None,
        metavar="NAME",
    )
    owned_by: str = flag("owner that /v1/models tells of", "martlet", metavar="NAME")
    drain_seconds: float = flag("after SIGTERM, how long running requests may take to finish", 30.0)
    log_level: str = flag("how much to log", "info", choices=("debug", "info", "warning", "error"))
    log_format: str = flag("json is one object a line", "text", choices=("text", "json"))
    log_interval: float = flag("seconds between lines about the throughput; 0 for none", 10.0)


def run(options: DeployOptions) -> int:
    """Serve until SIGTERM or Ctrl-C."""
    if not 0 <= options.port <= 65535:
        raise UsageError(f"--port must be from 0 to 65535, got {options.port}", param="port")
    if options.adapter_dir is not None and not Path(options.adapter_dir).is_dir():
        raise UsageError(f"--adapter_dir: there is no folder {options.adapter_dir}", param="adapter_dir")
    replicas = _replicas(options)
    keys = (*options.api_key, *_read_keys(options.api_key_file))
    limits = _limits(options, keys)
    with uncollected():
        from martlet import chat, server

    chosen = choose(options, options)
    more = options.adapter_dir is not None
    load = with_slots(load_options(options, options), options, chosen, more_may_come=more)
    if options.tool_format is not None:
        chat.tool_format(options.tool_format)  # unknown names are told before the model loads
    if options.reasoning_format is not None:
        chat.reasoning_format(options.reasoning_format)
    if options.uds is None and options.host not in LOCAL and not keys:
        print(
            f"warning: whoever reaches {options.host} may use this server; --api_key KEY asks for a key",
            file=sys.stderr,
        )
    return server.run(
        server.ServerOptions(
            model=resolve_model(options, chosen),
            backend=options.infer_backend,
            load=load,
            engine=replace(engine_options(options, options.seed), max_num_queued=options.max_num_queued),
            template=template_name(options),
            tool_format=options.tool_format,
            reasoning_format=options.reasoning_format,
            host=options.host,
            port=options.port,
            uds=options.uds,
            ssl_certfile=options.ssl_certfile,
            ssl_keyfile=options.ssl_keyfile,
            served_model_names=options.served_model_name,
            owned_by=options.owned_by,
            api_keys=keys,
            cors_origins=options.cors_origins,
            adapters=chosen.beside,
            adapter_dir=options.adapter_dir,
            defaults=_defaults(options),
            limits=limits,
            drain_seconds=options.drain_seconds,
            log_level=options.log_level,
            log_format=options.log_format,
            log_interval=options.log_interval,
            **replicas,
        )
    )


def _read_keys(path: str | None) -> list[str]:
    if path is None:
        return []
    try:
        lines = Path(path).read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"--api_key_file {path} cannot be read: {error}", param="api_key_file") from None
    keys = [key for line in lines if (key := line.partition("#")[0].strip())]
    if not keys:
        raise UsageError(f"--api_key_file {path} holds no key", param="api_key_file")
    return keys


def _replicas(options: DeployOptions) -> dict[str, Any]:
    """The fields of ServerOptions about replicas; none for one engine in this process."""
    if options.replicas < 1:
        raise UsageError(f"--replicas must be at least 1, got {options.replicas}", param="replicas")
    if options.replicas == 1 and not options.router:
        for name in ("ray_address", "replica_cpus", "replica_gpus"):
            if getattr(options, name) is not None:
                raise UsageError(f"--{name} needs --replicas above 1, or --router", param=name)
        return {}
    if options.adapter_dir is not None:
        raise UsageError("--adapter_dir: clients cannot load adapters into several replicas yet", param="adapter_dir")
    if options.log_interval not in (0, DeployOptions.log_interval):
        raise UsageError("--log_interval: replicas tell of no throughput yet", param="log_interval")
    gpus = options.replica_gpus if options.replica_gpus is not None else float(options.device == "cuda")
    for name, value in (("replica_cpus", options.replica_cpus), ("replica_gpus", gpus)):
        if value is not None and value < 0:
            raise UsageError(f"--{name} must not be below 0, got {value}", param=name)
    return {
        "replicas": options.replicas,
        "replica_cpus": options.replica_cpus,
        "replica_gpus": gpus,
        "ray_address": options.ray_address,
    }


def _limits(options: DeployOptions, keys: tuple[str, ...]):
    from martlet.server.options import Limits

    for name in ("max_body_mb", "max_requests_per_key", "request_timeout"):
        value = getattr(options, name)
        if value is not None and value <= 0:
            raise UsageError(f"--{name} must be above 0, got {value}", param=name)
    if options.max_requests_per_key is not None and not keys:
        raise UsageError("--max_requests_per_key needs keys: --api_key or --api_key_file", param="max_requests_per_key")
    return Limits(
        max_body_bytes=int(options.max_body_mb * 2**20),
        max_requests_per_key=options.max_requests_per_key,
        request_seconds=options.request_timeout,
    )


def _defaults(options: DeployOptions) -> dict[str, float | int]:
    from martlet.sampling_params import SamplingParams

    names = ("temperature", "top_k", "top_p", "repetition_penalty")
    given = {name: value for name in names if (value := getattr(options, name)) is not None}
    if options.do_sample is False:
        given["temperature"] = 0.0
    SamplingParams(**given)  # raises for what no request could have, before a model is loaded
    return given


COMMAND = Command(
    "Serve a model over HTTP, OpenAI-compatible.",
    DeployOptions,
    run,
    not_yet=swift_flags.DEPLOY,
)
