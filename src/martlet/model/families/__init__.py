"""The families we can run: one page of data each. `get(card.family)` is the way in."""

from __future__ import annotations

from importlib import import_module

from martlet.errors import ModelNotFound, did_you_mean
from martlet.model.families.family import Family, Source

__all__ = ["Family", "Source", "get", "names"]

_PAGES = ("llama", "mistral", "qwen2", "qwen3")


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
