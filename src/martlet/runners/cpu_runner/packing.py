"""From checkpoint tensors to packed matrices: which format each runs in, and memory to hold them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np

from martlet.errors import BackendUnavailable
from martlet.hub.checkpoint import PackedTensor, Tensor
from martlet.kernels.cpu.library import Executor, panel_bytes
from martlet.kernels.cpu.program import PANEL, CacheKind, Format, HeadOp, Matrix
from martlet.runners.cpu_runner.packed_cache import Entry, PackedCache, huge_pages

REGION = 32 << 20  # bytes taken from the system at a time
_ARRAYS = {"float32": Format.F32, "float16": Format.F16, "bfloat16": Format.BF16}
_BLOCKS = {form.name.lower(): form for form in Format if form.name.startswith(("Q", "INT4_"))}
_BLOCKS |= {"int8_row": Format.INT8}
# What has no kernel of its own here is unpacked. Floats of 4 and 8 bits times a scale are made for 16 bits; integers
# that fit no block of ours keep every bit.
WIDENED = {"fp8": Format.BF16, "fp8_row": Format.BF16, "nf4": Format.BF16, "int": Format.F32}
SUPER_BLOCK = 256
# A head gets a screen where a greedy step then reads so much less: of all weights, and in bytes.
SCREEN_SHARE, SCREEN_BYTES = 0.02, 2 << 20
MOST_SCREENED = 16384  # inputs that csrc/cpu/screen.hpp bounds the rounding of


def source_format(tensor: Tensor) -> Format:
    """The layout in which a tensor's rows are packed from. Raises BackendUnavailable for one that C++ cannot read."""
    if isinstance(tensor, PackedTensor):
        found = Format.F32 if tensor.format in WIDENED else _BLOCKS.get(tensor.format)
    else:
        found = _ARRAYS.get(tensor.dtype.name)
    if found is None:
        kind = tensor.format if isinstance(tensor, PackedTensor) else tensor.dtype
        raise BackendUnavailable(f"the native CPU kernels do not read {kind} weights")
    if found in (Format.Q4_K, Format.Q5_K, Format.Q6_K) and tensor.shape[-1] % SUPER_BLOCK:
        raise BackendUnavailable(f"{found.name} rows of {tensor.shape[-1]} are no whole blocks of {SUPER_BLOCK}")
    return found


class Precision(NamedTuple):
    """What runs in which format. name: of the choice, for reports.

    matrix: of linears, table: of the head and the embedding; None keeps the blocks or bf16 the file holds (float32
    where it holds that). kv: how keys and values are kept.
    """

    name: str
    matrix: Format | None = None
    table: Format | None = None
    kv: CacheKind = CacheKind.BF16

    def target(self, tensor: Tensor, *, table: bool = False) -> Format:
        chosen = self.table if table else self.matrix
        if chosen is not None:
            return chosen
        source = source_format(tensor)
        if isinstance(tensor, PackedTensor):
            return WIDENED.get(tensor.format, source)
        return Format.BF16 if source == Format.F16 else source


PRECISIONS = {
    "stored": Precision("stored"),
    "float32": Precision("float32", Format.F32, Format.F32, CacheKind.F32),
    "bf16": Precision("bf16", Format.BF16, Format.BF16),
    "int8": Precision("int8", Format.INT8, Format.INT8, CacheKind.INT8),  # rounds less than the weights do already
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


class Screen(NamedTuple):
    """What a HeadOp has beside its matrix: panels of Format.SCREEN, for steps of up to `rows` queries; 0 for none."""

    rows: int = 0
    matrix: Matrix | None = None

    def put(self, head: HeadOp) -> HeadOp:
        if self.matrix is not None:
            head.screen_rows, head.screen = self.rows, self.matrix.panels
        return head


class Packer:
    """Packs matrices into an arena with the executor's threads, or takes them from `cache`.

    bytes: of all so far. widened: what was unpacked for want of a kernel, and what it runs as.
    """

    def __init__(self, executor: Executor, cache: PackedCache | None = None):
        self.executor, self.cache = executor, cache
        self.arena = Arena()
        self.bytes = 0
        self.widened: dict[str, Format] = {}

    def stack(self, parts: Sequence[Tensor], target: Format) -> Matrix:
        """One matrix of all rows of `parts`, which share width, source format and order of columns."""
        count = sum(part.shape[0] for part in parts)

        def lay(addresses: Sequence[np.ndarray]) -> np.ndarray:
            padded = np.zeros(-(-count // PANEL) * PANEL, np.uint64)
            padded[:count] = np.concatenate(addresses)
            return padded

        return self._pack(parts, lay, count, target)

    def interleave(self, gate: Tensor, up: Tensor, target: Format) -> Matrix:
        """One matrix whose panels hold 16 rows of `gate`, then the same 16 of `up`: what Epilogue.GATED reads."""
        half = PANEL // 2
        panels = -(-gate.shape[0] // half)

        def lay(addresses: Sequence[np.ndarray]) -> np.ndarray:
            padded = np.zeros((2, panels * half), np.uint64)
            for side, part in zip(padded, addresses, strict=True):
                side[: len(part)] = part
            return np.ascontiguousarray(padded.reshape(2, panels, half).swapaxes(0, 1)).reshape(-1)

        return self._pack((gate, up), lay, panels * PANEL, target)

    def screen(self, head: Matrix) -> Screen:
        """The screen of a packed head."""
        panels = -(-head.n // PANEL)
        size = panels * panel_bytes(Format.SCREEN, head.k)
        saved = panels * panel_bytes(Format(head.format), head.k) - size
        rows = self.executor.screen_rows(head.format)
        if not rows or head.k > MOST_SCREENED or saved < max(SCREEN_BYTES, SCREEN_SHARE * self.bytes):
            return Screen()
        entry = (Format(head.format), Format.SCREEN, head.n, head.k)
        return Screen(rows, self._keep(entry, size, lambda out: self.executor.screen(head, out)))

    def _pack(
        self,
        parts: Sequence[Tensor],
        lay: Callable[[Sequence[np.ndarray]], np.ndarray],
        outputs: int,
        target: Format,
    ) -> Matrix:
        """lay: addresses of each part's rows -> those of the panels' rows, in order, 0 for a row of zeros."""
        inputs, sources = parts[0].shape[1], {source_format(part) for part in parts}
        if len(sources) != 1 or any(part.shape[1] != inputs for part in parts):
            raise ValueError(f"matrices of {sources} and widths {[part.shape[1] for part in parts]} do not stack")
        entry = (source := sources.pop(), target, outputs, inputs)

        def fill(out: np.ndarray) -> None:
            rows = [stored_rows(part) for part in parts]
            self.executor.pack(source, target, lay([_addresses(part) for part in rows]), inputs, out)

        for part in parts:
            if isinstance(part, PackedTensor) and part.format in WIDENED:
                self.widened[part.format] = target
        return self._keep(entry, -(-outputs // PANEL) * panel_bytes(target, inputs), fill)

    def _keep(self, entry: Entry, size: int, fill: Callable[[np.ndarray], object]) -> Matrix:
        """The matrix of an entry: the cache's, or one of so many bytes that `fill` makes of zeros."""
        out = None if self.cache is None else self.cache.take(entry)
        if out is None:
            out = self.arena.take(size)
            fill(out)
        if self.cache is not None:
            self.cache.put(entry, out)
        self.bytes += size
        _, target, outputs, inputs = entry
        matrix = Matrix(out.ctypes.data, target, outputs, inputs)
        matrix.memory = out  # a struct of ctypes takes attributes: the panels live as long as the matrix
        return matrix


def stored_rows(tensor: Tensor) -> np.ndarray:
    """The tensor's rows in the layout of its `source_format`, each in one piece; columns in the order they lie in."""
    if not isinstance(tensor, PackedTensor):
        return np.ascontiguousarray(tensor)
    if tensor.format in WIDENED:
        return np.ascontiguousarray(replace(tensor, order=None).dequantise())
    return np.ascontiguousarray(tensor.data)


def in_order(tensor: Tensor) -> Tensor:
    """The tensor with its columns in their own order, for whom none is given; in floats, where they lie otherwise."""
    if isinstance(tensor, PackedTensor) and tensor.order is not None:
        return PackedTensor("int", tensor.shape, tensor.dequantise, lambda values: values)
    return tensor


def order_of(tensor: Tensor) -> np.ndarray | None:
    return tensor.order if isinstance(tensor, PackedTensor) else None


def floats(tensor: Tensor) -> np.ndarray:
    return np.ascontiguousarray(tensor.dequantise() if isinstance(tensor, PackedTensor) else tensor, np.float32)


def _addresses(rows: np.ndarray) -> np.ndarray:
    """uint64 [rows]. The array must outlive them."""
    return np.uint64(rows.ctypes.data) + np.arange(len(rows), dtype=np.uint64) * np.uint64(rows.strides[0])
