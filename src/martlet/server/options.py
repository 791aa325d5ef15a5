"""What `martlet deploy` decides before it starts."""

from __future__ import annotations

from dataclasses import dataclass, field

from martlet.engine.options import EngineOptions
from martlet.hub.card import ModelCard
from martlet.runners.base import LoadOptions


@dataclass(frozen=True, slots=True)
class Limits:
    """What one HTTP request may ask for; more is refused with 400 or 413 and the name of the limit."""

    max_body_bytes: int = 16 * 2**20
    max_prompts: int = 2048  # prompts in one completion request
    max_sequences: int = 4096  # prompts times n
    max_messages: int = 4096


@dataclass(frozen=True, slots=True)
class ServerOptions:
    """model: anything hub.resolve takes, or a card. template: a named chat template instead of the model's own.

    served_model_names: names clients may ask for, the first one is the default (empty: the model's own name).
    api_keys: any of them lets a client in; empty: no keys are asked for. drain_seconds: after SIGTERM, how long
    running requests may take to finish.
    """

    model: str | ModelCard
    backend: str = "native"
    load: LoadOptions = field(default_factory=LoadOptions)
    engine: EngineOptions = field(default_factory=EngineOptions)
    template: str | None = None
    host: str = "127.0.0.1"
    port: int = 8000
    served_model_names: tuple[str, ...] = ()
    api_keys: tuple[str, ...] = ()
    limits: Limits = field(default_factory=Limits)
    drain_seconds: float = 30.0
    log_level: str = "info"
