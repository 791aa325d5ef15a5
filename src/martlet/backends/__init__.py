"""One protocol for whatever generates text: our engine, transformers, vLLM."""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Callable, Mapping
from pathlib import Path

from martlet import hub
from martlet.backends.base import Backend, Sink
from martlet.backends.defaults import generation_defaults
from martlet.collection import uncollected
from martlet.engine.options import EngineOptions
from martlet.errors import BackendUnavailable, UsageError, did_you_mean
from martlet.hub.card import ModelCard
from martlet.model import families
from martlet.runners.base import LoadOptions

__all__ = ["NAMES", "Backend", "Sink", "generation_defaults", "load"]

log = logging.getLogger("martlet")

NAMES = {"native": "native", "auto": "native", "pt": "transformers", "transformers": "transformers", "vllm": "vllm"}
"""What users may say (SWIFT's names among them), and what it means."""


@uncollected()
def load(
    model: str | ModelCard,
    *,
    backend: str = "native",
    load: LoadOptions | None = None,
    engine: EngineOptions | None = None,
    progress: Callable[..., None] | None = None,
    adapters: Mapping[str, str | Path] | None = None,
) -> Backend:
    """Load a model, given by anything hub.resolve takes or by its card.

    adapters: name -> folder, to be served beside it from the start; `load.max_adapters` makes room for them.
    progress: called while weights are read, as martlet.runners.load calls it (native only).
    Raises UsageError for an unknown backend, and what resolving and loading raise.
    """
    kind = NAMES.get(backend.lower())
    if kind is None:
        raise UsageError(
            f"there is no backend {backend!r}; there are {', '.join(NAMES)}.{did_you_mean(backend, NAMES)}",
            param="infer_backend",
        )
    if kind == "vllm" and importlib.util.find_spec("vllm") is None:
        log.warning("vllm is not installed here (pip install vllm); the native engine runs the model instead")
        kind = "native"
    if kind == "transformers":
        _need("torch", "transformers")
    card = model if isinstance(model, ModelCard) else hub.resolve(model)
    options, engine = load or LoadOptions(), engine or EngineOptions()
    backend = _load(kind, card, options, engine, progress)
    try:
        for name, path in (adapters or {}).items():
            backend.load_adapter(name, path)
    except BaseException:
        backend.close()
        raise
    return backend


def _load(
    kind: str,
    card: ModelCard,
    options: LoadOptions,
    engine: EngineOptions,
    progress: Callable[..., None] | None,
) -> Backend:
    if card.family in families.ENCODERS:
        if kind != "native":
            raise UsageError(f"{card.name} is an encoder; only the native backend runs those", param="infer_backend")
        from martlet.backends.encoder import load_encoder

        return load_encoder(card, hub.load_tokenizer(card), options, engine)
    if kind == "native":
        from martlet.backends.native import load_native

        return load_native(card, options, engine, progress)
    tokenizer = hub.load_tokenizer(card)
    if kind == "transformers":
        from martlet.backends.transformers_backend import load_transformers

        return load_transformers(card, tokenizer, options, engine)
    from martlet.backends.vllm_backend import load_vllm

    return load_vllm(card, tokenizer, options, engine)


def _need(*modules: str) -> None:
    missing = [name for name in modules if importlib.util.find_spec(name) is None]
    if missing:
        raise BackendUnavailable(
            f"the transformers backend needs {' and '.join(missing)}; pip install 'martlet[transformers]'",
            param="infer_backend",
        )
