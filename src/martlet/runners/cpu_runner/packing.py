"""From checkpoint tensors to packed matrices: which format each runs in, and memory to hold them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import ml_dtypes
import numpy as np

from martlet.errors import BackendUnavailable
from martlet.hub.checkpoint import PackedTensor, Tensor
from martlet.kernels.cpu.library import Executor, panel_bytes
from martlet.kernels.cpu.program import PANEL, CacheKind, Format, Matrix
from martlet.runners.cpu_runner.packed_cache import PackedCache, huge_pages

REGION = 32 << 20  # bytes taken from the system at a time
_ARRAYS = {
    np.dtype(np.float32): Format.F32,
    np.dtype(np.float16): Format.F16,
    np.dtype(ml_dtypes.bfloat16): Format.BF16,
}
_BLOCKS = {name: Format[name.upper()] for name in ("q4_0", "q4_1", "q5_0", "q5_1", "q8_0", "q4_k", "q5_k", "q6_k")}
SUPER_BLOCK = 256


def source_format(tensor: Tensor) -> Format:
    """The layout in which a tensor's rows lie in its file. Raises BackendUnavailable for one that C++ cannot read."""
    if isinstance(tensor, PackedTensor):
        found = _BLOCKS.get(tensor.format)
    else:
        found = _ARRAYS.get(tensor.dtype)
    if found is None:
        kind = tensor.format if isinstance(tensor, PackedTensor) else tensor.dtype
        raise BackendUnavailable(f"the native CPU kernels do not read {kind} weights")
    if found in (Format.Q4_K, Format.Q5_K, Format.Q6_K) and tensor.shape[-1] % SUPER_BLOCK:
        raise BackendUnavailable(f"{found.name} rows of {tensor.shape[-1]} are no whole blocks of {SUPER_BLOCK}")
    return found


@dataclass(frozen=True, slots=True)
class Precision:
    """What runs in which format. name: of the choice, for reports.

    matrix: of linears, table: of the head and the embedding; None keeps the blocks or bf16 the file holds (float32
    where it holds that). kv: how keys and values are kept.
    """

    name: str
    matrix: Format | None = None
    table: Format | None = None
    kv: CacheKind = CacheKind.BF16

    def target(self, source: Format, *, table: bool = False) -> Format:
        chosen = self.table if table else self.matrix
        if chosen is not None:
            return chosen
        return Format.BF16 if source == Format.F16 else source


PRECISIONS = {
    "stored": Precision("stored"),
    "float32": Precision("float32", Format.F32, Format.F32, CacheKind.F32),
    "bf16": Precision("bf16", Format.BF16, Format.BF16),
    "int8": Precision("int8", Format.INT8, Format.INT8),
    "int4": Precision("int4", Format.Q4_1, Format.INT8),
}


class Arena:
    """Zeroed memory in huge pages, which a stream of weights is read from faster. Freed with the last array in it."""

    def __init__(self) -> None:
        self._free = np.empty(0, np.uint8)

    def take(self, size: int) -> np.ndarray:
        """uint8 [size], at an address that is a multiple of 64."""
        padded = -(-size // 64) * 64
        if padded > len(self._free):
            self._free = np.frombuffer(huge_pages(max(REGION, padded)), np.uint8)
        taken, self._free = self._free[:padded], self._free[padded:]
        return taken[:size]


class Packer:
    """Packs matrices into an arena with the executor's threads, or takes them from `cache`. bytes: of all so far."""

    def __init__(self, executor: Executor, cache: PackedCache | None = None):
        self.executor, self.cache = executor, cache
        self.arena = Arena()
        self.bytes = 0

    def stack(self, parts: Sequence[Tensor], target: Format) -> Matrix:
        """One matrix of all rows of `parts`, which share width and source format."""
        rows = np.concatenate([row_addresses(part) for part in parts])
        padded = np.zeros(-(-len(rows) // PANEL) * PANEL, np.uint64)
        padded[: len(rows)] = rows
        return self._pack(parts, padded, len(rows), target)

    def interleave(self, gate: Tensor, up: Tensor, target: Format) -> Matrix:
        """One matrix whose panels hold 16 rows of `gate`, then the same 16 of `up`: what Epilogue.GATED reads."""
        half = PANEL // 2
        panels = -(-gate.shape[0] // half)
        padded = np.zeros((2, panels * half), np.uint64)
        for side, part in zip(padded, (gate, up), strict=True):
            side[: part.shape[0]] = row_addresses(part)
        rows = np.ascontiguousarray(padded.reshape(2, panels, half).swapaxes(0, 1)).reshape(-1)
        return self._pack((gate, up), rows, len(rows), target)

    def _pack(self, parts: Sequence[Tensor], rows: np.ndarray, outputs: int, target: Format) -> Matrix:
        inputs, sources = parts[0].shape[1], {source_format(part) for part in parts}
        if len(sources) != 1 or any(part.shape[1] != inputs for part in parts):
            raise ValueError(f"matrices of {sources} and widths {[part.shape[1] for part in parts]} do not stack")
        entry = (source := sources.pop(), target, outputs, inputs)
        out = None if self.cache is None else self.cache.take(entry)
        if out is None:
            out = self.arena.take(len(rows) // PANEL * panel_bytes(target, inputs))
            self.executor.pack(source, target, rows, inputs, out)
        if self.cache is not None:
            self.cache.put(entry, out)
        self.bytes += len(out)
        matrix = Matrix(out.ctypes.data, target, outputs, inputs)
        matrix.memory = out  # a struct of ctypes takes attributes: the panels live as long as the matrix
        return matrix


def contiguous(tensor: Tensor) -> Tensor:
    """The tensor with every row in one piece."""
    if isinstance(tensor, PackedTensor):
        return PackedTensor(tensor.format, tensor.shape, np.ascontiguousarray(tensor.data), tensor.unpack)
    return np.ascontiguousarray(tensor)


def row_addresses(tensor: Tensor) -> np.ndarray:
    """uint64 [rows]. The tensor must be `contiguous` and outlive the addresses."""
    data = tensor.data if isinstance(tensor, PackedTensor) else tensor
    return np.uint64(data.ctypes.data) + np.arange(data.shape[0], dtype=np.uint64) * np.uint64(data.strides[0])
