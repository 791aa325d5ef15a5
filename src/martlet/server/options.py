"""What `martlet deploy` decides before it starts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from martlet.engine.options import EngineOptions
from martlet.hub.card import ModelCard
from martlet.runners.base import LoadOptions


@dataclass(frozen=True, slots=True)
class Limits:
    """What one HTTP request may ask for; more is refused with a 4xx that names the limit. Times in seconds.

    body_seconds: for a whole body to arrive. request_seconds: for a whole answer; then the request is aborted and told
    so (None: no limit). max_requests_per_key: running at a time (None: no limit).
    """

    max_headers: int = 128
    max_header_bytes: int = 32 * 2**10
    max_body_bytes: int = 16 * 2**20
    max_prompts: int = 2048  # prompts in one completion request
    max_sequences: int = 4096  # prompts times n
    max_requests_per_key: int | None = None
    body_seconds: float = 60.0
    request_seconds: float | None = None


@dataclass(frozen=True, slots=True)
class ServerOptions:
    """model: anything hub.resolve takes, or a card. template: a named chat template instead of the model's own.
    tool_format, reasoning_format: names of chat.tool_format and chat.reasoning_format, None for what is known.

    served_model_names: names clients may ask for, the first one is the default (empty: the model's own name).
    api_keys: any of them lets a client in; empty: no keys are asked for. cors_origins: web origins whose pages may call
    the server, "*" for all. uds: path of a Unix socket to listen on instead of host and port. ssl_certfile,
    ssl_keyfile: PEM files for HTTPS.
    adapters: name -> folder, those served from the start. adapter_dir: lets clients load more from below this folder.
    defaults: SamplingParams fields for requests that leave them open, over the model's own. log_format: "text" or
    "json". log_interval: seconds between lines about the throughput, 0 for none. drain_seconds: after SIGTERM, how
    long running requests may take to finish.

    replicas: engines under Ray Serve, None for one in this process. replica_cpus, replica_gpus: what each takes of
    Ray's, and how many cores it computes on (None: the machines' cores, divided; 0: takes none, computes on all).
    ray_address: a cluster to join, None for one of our own on this machine.
    """

    model: str | ModelCard
    backend: str = "native"
    load: LoadOptions = field(default_factory=LoadOptions)
    engine: EngineOptions = field(default_factory=EngineOptions)
    template: str | None = None
    tool_format: str | None = None
    reasoning_format: str | None = None
    host: str = "127.0.0.1"
    port: int = 8000
    uds: str | None = None
    ssl_certfile: str | None = None
    ssl_keyfile: str | None = None
    served_model_names: tuple[str, ...] = ()
    owned_by: str = "martlet"
    api_keys: tuple[str, ...] = ()
    cors_origins: tuple[str, ...] = ()
    adapters: Mapping[str, str] = field(default_factory=dict)
    adapter_dir: str | None = None
    defaults: Mapping[str, Any] = field(default_factory=dict)
    limits: Limits = field(default_factory=Limits)
    drain_seconds: float = 30.0
    log_level: str = "info"
    log_format: str = "text"
    log_interval: float = 10.0
    replicas: int | None = None
    replica_cpus: float | None = None
    replica_gpus: float = 0.0
    ray_address: str | None = None
