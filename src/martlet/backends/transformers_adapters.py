"""LoRA adapters of the transformers backend: PEFT's own layers, one adapter a batch."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import Any

from martlet.backends.base import check_adapter_name
from martlet.errors import BackendUnavailable, InvalidRequest, ModelNotFound
from martlet.hub import peft as folders
from martlet.hub.card import ModelCard
from martlet.model import adapters


class PeftAdapters:
    """Puts adapters into a model's layers. PEFT knows them by keys, a new one each time a name is loaded."""

    def __init__(self, card: ModelCard, model: Any, max_lora_rank: int):
        self._card, self._model, self._max_rank = card, model, max_lora_rank
        self._peft: Any = None
        self._keys: dict[str, str] = {}  # by name
        self._numbers = count(1)
        self._lock = threading.Lock()  # held while the model runs or changes

    def names(self) -> Sequence[str]:
        return tuple(self._keys)

    def key(self, name: str | None) -> str | None:
        return None if name is None else self._keys[name]

    def load(self, name: str, path: str | Path) -> None:
        """Raises InvalidRequest, naming tensor and shapes where they do not fit; then nothing has changed."""
        check_adapter_name(name)
        try:
            import peft
        except ImportError as error:
            raise BackendUnavailable(
                "adapters on the transformers backend need peft; pip install peft", param="adapters"
            ) from error
        folder, key = folders.find(path), str(next(self._numbers))
        self._check(path)
        with self._lock:
            try:
                if self._peft is None:
                    self._peft = peft.PeftModel.from_pretrained(self._model, folder, adapter_name=key)
                else:
                    self._peft.load_adapter(folder, adapter_name=key)
            except (RuntimeError, ValueError, KeyError) as error:
                if self._peft is not None and key in self._peft.peft_config:
                    self._peft.delete_adapter(key)
                raise InvalidRequest(f"adapter {folder}: peft cannot load it: {error}", param="adapters") from error
            self._peft.eval()
            self._keys[name] = key

    def _check(self, path: str | Path) -> None:
        """What our own engine asks; it says it better. What only PEFT serves beside others is PEFT's to refuse."""
        found = folders.read(path)
        if not found.saved and all(lora.magnitude is None for lora in found.loras.values()):
            adapters.check(path, self._card, self._max_rank)

    def unload(self, name: str) -> None:
        if self._keys.pop(name, None) is None:
            raise ModelNotFound(f"no adapter is called {name!r}", param="model")

    def forget(self, used: set[str | None]) -> None:
        """Drop the adapters that no name and none of `used` stands for."""
        if self._peft is None:
            return
        with self._lock:
            for key in self._peft.peft_config.keys() - used - set(self._keys.values()):
                if len(self._peft.peft_config) > 1:  # PEFT keeps at least one
                    self._peft.delete_adapter(key)

    @contextmanager
    def using(self, key: str | None) -> Iterator[None]:
        """The model runs with this adapter, or with none."""
        with self._lock:
            if self._peft is None:
                yield
            elif key is None:
                with self._peft.disable_adapter():
                    yield
            else:
                self._peft.set_adapter(key)
                yield
