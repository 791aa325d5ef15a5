"""What is known about one model: the object every room passes around instead of a name."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

Format = Literal["safetensors", "gguf", "dummy"]


@dataclass(frozen=True, slots=True)
class ModelCard:
    """A resolved model, present on this machine.

    name: what the user calls it (registry name, or the folder's or file's name for a path).
    path: a folder holding config.json (+ *.safetensors, and tokenizer.json, tokenizer.model or *.tiktoken), or a .gguf
    file.
    family: page in martlet.model.families, e.g. "llama". template: named chat template that overrides the checkpoint's
    own, or None to use the one inside the checkpoint. model_type: SWIFT 2.x registry key, when there is one.
    merge: a PEFT folder that is merged into the weights as they are read.
    """

    name: str
    path: Path
    format: Format
    family: str
    source: str = ""
    template: str | None = None
    tool_format: str | None = None
    capabilities: tuple[str, ...] = ("completion",)  # "chat", "completion", "tools", "embedding"
    licence: str = ""
    model_type: str | None = None
    lora_target_modules: tuple[str, ...] = ()
    merge: Path | None = None
    config: dict[str, Any] = field(default_factory=dict, repr=False)  # Hugging Face config.json, also for GGUF
    generation_config: dict[str, Any] = field(default_factory=dict, repr=False)

    def generation_for_transformers(self) -> dict[str, Any]:
        """generation_config with do_sample said, without which transformers leaves settings of sampling alone."""
        samples = any(name in self.generation_config for name in ("temperature", "top_p", "top_k"))
        return {"do_sample": samples, **self.generation_config}

    @property
    def is_chat(self) -> bool:
        return "chat" in self.capabilities
