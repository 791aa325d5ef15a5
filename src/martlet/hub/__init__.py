"""Where models come from: names, sources, cards, checkpoints and tokenizers.

Everything is imported when first used, so `import martlet.hub` costs nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

_PUBLIC = {
    "resolve": "resolver",
    "pull": "resolver",
    "remove": "resolver",
    "cached": "resolver",
    "DEFAULT_MODEL": "resolver",
    "registered": "registry",
    "Entry": "registry",
    "cache_dir": "cache",
    "Progress": "cache",
    "ModelCard": "card",
    "Checkpoint": "checkpoint",
    "PackedTensor": "checkpoint",
    "open_checkpoint": "checkpoint",
    "Tokenizer": "tokenizer",
    "load_tokenizer": "tokenizer",
}

if TYPE_CHECKING:
    from martlet.hub.cache import Progress, cache_dir
    from martlet.hub.card import ModelCard
    from martlet.hub.checkpoint import Checkpoint, PackedTensor, open_checkpoint
    from martlet.hub.registry import Entry, registered
    from martlet.hub.resolver import DEFAULT_MODEL, cached, pull, remove, resolve
    from martlet.hub.tokenizer import Tokenizer, load_tokenizer

__all__ = [
    "DEFAULT_MODEL",
    "Checkpoint",
    "Entry",
    "ModelCard",
    "PackedTensor",
    "Progress",
    "Tokenizer",
    "cache_dir",
    "cached",
    "load_tokenizer",
    "open_checkpoint",
    "pull",
    "registered",
    "remove",
    "resolve",
]


def __getattr__(name: str):
    if name in _PUBLIC:
        return getattr(importlib.import_module(f"martlet.hub.{_PUBLIC[name]}"), name)
    raise AttributeError(f"module 'martlet.hub' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
