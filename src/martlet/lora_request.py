"""Adapters named by a call instead of a server's operator: vLLM's LoRARequest."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True, slots=True)
class LoRARequest:
    """A LoRA adapter for requests: its name, a number, and the folder that holds it."""

    lora_name: str
    lora_int_id: int
    lora_local_path: str

    @property
    def lora_path(self) -> str:
        return self.lora_local_path


class Adapters(Protocol):
    """What of a backend this page needs; see martlet.backends.base."""

    def adapters(self) -> Sequence[str]: ...

    def load_adapter(self, name: str, path: str) -> None: ...


class LoRARequests:
    """Loads what is asked for when it is asked for the first time, or differs from what last had its name."""

    def __init__(self, backend: Adapters):
        self._backend = backend
        self._loaded: dict[str, LoRARequest] = {}

    def adapter(self, request: LoRARequest | None) -> str | None:
        """What to call it in a Request. Raises InvalidRequest when it cannot be served."""
        if request is None:
            return None
        name = request.lora_name
        if self._loaded.get(name) != request or name not in self._backend.adapters():
            self._backend.load_adapter(name, request.lora_path)
            self._loaded[name] = request
        return name
