"""A checkpoint with a PEFT adapter merged into it, tensor by tensor, as they are read. What it takes to serve DoRA and
modules_to_save, and one adapter at no cost a token."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from martlet.errors import InvalidRequest
from martlet.hub import peft
from martlet.hub.checkpoint import Checkpoint, PackedTensor, Tensor


class MergedCheckpoint:
    """Sums in float64, rounded once to the checkpoint's own dtype (a quantised tensor becomes float32)."""

    def __init__(self, checkpoint: Checkpoint, path: Path):
        """Raises InvalidRequest when the adapter holds a tensor that does not fit one of the checkpoint's."""
        self._checkpoint, self._adapter = checkpoint, peft.read(path)
        names = set(checkpoint.names())
        for module, lora in self._adapter.loras.items():
            target = module + ".weight"
            wanted = (len(lora.b), lora.a.shape[1])
            if target not in names:
                raise self._bad(f"tensor {lora.where[0]}: the model has no {target}")
            if tuple(checkpoint.shape(target)) != wanted:
                raise self._bad(
                    f"tensors {lora.where[0]} {list(lora.a.shape)} and {lora.where[1]} {list(lora.b.shape)} fit a "
                    f"matrix {list(wanted)}; {target} is {list(checkpoint.shape(target))}"
                )
            if lora.magnitude is not None and lora.magnitude.shape != wanted[:1]:
                raise self._bad(f"the magnitudes of {module} are {list(lora.magnitude.shape)}, wanted {[wanted[0]]}")
        for name, tensor in self._adapter.saved.items():
            if name not in names:
                hint = "; it is tied to the embedding" if name == "lm_head.weight" else ""
                raise self._bad(f"tensor {name}: the model has none of that name{hint}")
            if tuple(checkpoint.shape(name)) != tensor.shape:
                raise self._bad(f"tensor {name} is {list(tensor.shape)}, the model's {list(checkpoint.shape(name))}")

    def _bad(self, message: str) -> InvalidRequest:
        return InvalidRequest(f"adapter {self._adapter.folder}: {message}", param="adapters")

    def names(self) -> list[str]:
        return self._checkpoint.names()

    def shape(self, name: str) -> tuple[int, ...]:
        return self._checkpoint.shape(name)

    def where(self, name: str) -> str:
        return self._checkpoint.where(name)

    def tensor(self, name: str) -> Tensor:
        if name in self._adapter.saved:
            return self._adapter.saved[name]
        tensor = self._checkpoint.tensor(name)
        lora = self._adapter.loras.get(name.removesuffix(".weight"))
        if lora is None:
            return tensor
        dtype = np.dtype(np.float32) if isinstance(tensor, PackedTensor) else tensor.dtype
        weight = (tensor.dequantise() if isinstance(tensor, PackedTensor) else tensor).astype(np.float64)
        weight += lora.scale * (lora.b.astype(np.float64) @ lora.a.astype(np.float64))
        if lora.magnitude is not None:  # DoRA: directions of the sum, lengths of their own (arXiv 2402.09353, eq. 5)
            lengths = np.linalg.norm(weight, axis=1, keepdims=True)
            weight *= lora.magnitude.astype(np.float64)[:, None] / lengths
        return weight.astype(dtype)

    def close(self) -> None:
        self._checkpoint.close()
