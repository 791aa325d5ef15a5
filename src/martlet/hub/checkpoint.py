"""Reading weights as numpy, one tensor at a time, memory-mapped. No pickle, no torch.

`open_checkpoint(card)` gives one of the readers beside this file (safetensors, gguf, dummy) behind `Checkpoint`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np

from martlet.errors import CheckpointError
from martlet.hub.card import ModelCard


@dataclass(frozen=True, slots=True, eq=False)
class PackedTensor:
    """A quantised matrix, its rows in blocks.

    format: name of the block format in lower case: GGML's ("q4_1", "q8_0", ...) or one of martlet.hub.quantised.
    shape: logical [out, in], or a stack of such.
    stored: uint8 [..., bytes per row], the blocks of one row after another (a view of the file), or what makes it.
    unpack: data -> float32 [..., in].
    order: int32 [in], where columns lie in another order (GPTQ's act-order): column j of the data is column order[j] of
    the matrix.
    block: elements of a block; 0 where it is not told, so that only whole rows can be cut out.
    """

    format: str
    shape: tuple[int, ...]
    stored: np.ndarray | Callable[[], np.ndarray]
    unpack: Callable[[np.ndarray], np.ndarray]
    order: np.ndarray | None = None
    block: int = 0

    @property
    def data(self) -> np.ndarray:
        return self.stored() if callable(self.stored) else self.stored

    def dequantise(self) -> np.ndarray:
        values = self.unpack(self.data).reshape(self.shape)
        if self.order is None:
            return values
        whole = np.empty_like(values)
        whole[..., self.order] = values
        return whole

    def rows(self, index: np.ndarray | slice) -> PackedTensor:
        """Some of the rows of a matrix, in any order: blocks run along a row, so rows move whole."""
        count = len(range(self.shape[0])[index]) if isinstance(index, slice) else len(index)
        return replace(self, shape=(count, *self.shape[1:]), stored=lambda: self.data[index])

    def columns(self, span: slice) -> Tensor:
        """Columns span.start ... span.stop - 1 of a matrix: packed if they are whole blocks in order, else unpacked."""
        if self.order is not None or not self.block or span.start % self.block or span.stop % self.block:
            return self.dequantise()[:, span]
        first, end = span.start // self.block, span.stop // self.block
        count = self.shape[-1] // self.block

        def stored() -> np.ndarray:
            data = self.data
            size = data.shape[-1] // count
            return data[:, first * size : end * size]

        return replace(self, shape=(self.shape[0], span.stop - span.start), stored=stored)

    def item_at(self, index: int) -> PackedTensor:
        """One matrix of a stack [items, out, in]."""
        return replace(self, shape=self.shape[1:], stored=lambda: self.data[index])


Tensor = np.ndarray | PackedTensor


class Checkpoint(Protocol):
    """An open checkpoint. Names are the file's own; families translate."""

    def names(self) -> list[str]: ...

    def shape(self, name: str) -> tuple[int, ...]:
        """Logical shape, outermost first. KeyError when the file has no such tensor."""
        ...

    def tensor(self, name: str) -> Tensor:
        """The tensor: a numpy view (float32, float16, ml_dtypes.bfloat16) or a PackedTensor.

        Raises CheckpointError naming file and tensor when the bytes are not all there.
        """
        ...

    def where(self, name: str) -> str:
        """The file that holds the tensor, for error messages."""
        ...

    def close(self) -> None: ...


def has(checkpoint: Checkpoint, name: str) -> bool:
    try:
        checkpoint.shape(name)
    except KeyError:
        return False
    return True


def open_checkpoint(card: ModelCard, *, seed: int = 0) -> Checkpoint:
    """The reader for the card's format; seed is that of dummy weights. With `card.merge`, the adapter is merged in.

    CheckpointError when a header is damaged or a file missing; InvalidRequest for an adapter that does not fit.
    """
    if card.merge is not None:
        from martlet.hub.merged import MergedCheckpoint

        if card.format != "safetensors":
            raise CheckpointError(
                f"{card.name} is a {card.format} checkpoint, and adapters are merged into safetensors only; "
                "serve the adapter beside the model instead, with --adapters NAME=PATH"
            )
        return MergedCheckpoint(open_checkpoint(replace(card, merge=None)), card.merge)
    if card.format == "gguf":
        from martlet.hub.gguf_file import GGUFCheckpoint

        return GGUFCheckpoint(card.path)
    if card.format == "dummy":
        from martlet.hub.dummy import DummyCheckpoint

        return DummyCheckpoint(seed)
    from martlet.hub.safetensors_file import SafetensorsCheckpoint

    checkpoint = SafetensorsCheckpoint(card.path)
    if quantisation := card.config.get("quantization_config"):
        from martlet.hub.quantised import QuantisedCheckpoint

        return QuantisedCheckpoint(checkpoint, quantisation)
    return checkpoint
