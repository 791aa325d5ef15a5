"""Martlet: fine-tune, accelerate and serve language models.

Public names are imported when first used, so `import martlet` is cheap and brings in no torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from martlet._version import __version__

_PUBLIC = {
    "LLM": "martlet.llm",
    "RequestOutput": "martlet.llm",
    "CompletionOutput": "martlet.llm",
    "LoRARequest": "martlet.lora_request",
    "SamplingParams": "martlet.sampling_params",
    "MartletError": "martlet.errors",
}

if TYPE_CHECKING:
    from martlet.errors import MartletError
    from martlet.llm import LLM, CompletionOutput, RequestOutput
    from martlet.lora_request import LoRARequest
    from martlet.sampling_params import SamplingParams

__all__ = ["LLM", "CompletionOutput", "LoRARequest", "MartletError", "RequestOutput", "SamplingParams", "__version__"]


def __getattr__(name: str):
    if name in _PUBLIC:
        return getattr(importlib.import_module(_PUBLIC[name]), name)
    raise AttributeError(f"module 'martlet' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
