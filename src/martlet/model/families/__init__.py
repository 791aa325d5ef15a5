"""The families we can run: one page of data each. `get(card.family)` is the way in."""

from __future__ import annotations

from importlib import import_module

from martlet.errors import ModelNotFound, did_you_mean
from martlet.model.families.family import Config, Family, Source

__all__ = ["COMMON", "ENCODERS", "Family", "Source", "example", "get", "names"]

_PAGES = (
    "baichuan", "chatglm", "gemma", "gemma2", "gemma3", "gemma3_text", "glm", "glm4", "internlm2", "llama", "mistral",
    "mixtral", "phi3", "qwen", "qwen2", "qwen2_moe", "qwen3", "qwen3_moe", "rwkv5", "rwkv6", "rwkv7",
    "smollm3",
)  # fmt: skip

ENCODERS = ("bert",)
"""Families of martlet.model.encoder, which are no decoders and have no page."""

COMMON: Config = {
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 128,
    "max_position_embeddings": 256,
}
"""A decoder of a few thousand parameters; with a page's `example` it is one of that family."""


def names() -> tuple[str, ...]:
    """The families there are; also the Hugging Face `model_type`s they read."""
    return _PAGES


def get(model_type: str) -> Family:
    """The page of a family. Raises ModelNotFound that lists the families there are."""
    if model_type not in _PAGES:
        hint = did_you_mean(model_type, _PAGES)
        raise ModelNotFound(f"no family {model_type!r}; the native engine runs {', '.join(_PAGES)}.{hint}")
    page: Family = import_module(f"martlet.model.families.{model_type}").FAMILY
    return page


def example(model_type: str) -> Config:
    """A tiny config of a family."""
    return {"model_type": model_type, **COMMON, **get(model_type).example}
