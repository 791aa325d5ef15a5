"""LoRA adapters for the C++ kernels: tables of slots that linears point at, filled while nothing runs."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from martlet.kernels.cpu.library import Executor, panel_bytes
from martlet.kernels.cpu.program import LORA, PANEL, Epilogue, Format
from martlet.runners.cpu_runner.packed_cache import huge_pages

if TYPE_CHECKING:
    from martlet.model.adapters import Adapter, Delta
    from martlet.runners.cpu_runner.decoder import Linear

HALF = PANEL // 2
BLOCK = 32  # inputs of a block of Q8_0
LINE = 64  # bytes


class Packed(NamedTuple):
    """The matrices of one adapter on one linear, as C reads them (Lora in program.hpp, lora.hpp).

    a: uint8, panels. b: uint8, the linear's panels * 2 sides. halves: int32 [panels * 2]. rank: of each part, padded.
    rows: of A.
    """

    a: np.ndarray
    b: np.ndarray
    halves: np.ndarray
    rank: int
    rows: int


class AdapterTables:
    """A table of LORA [slots + 1] for every linear that may carry an adapter; slot 0 stays empty."""

    def __init__(self, linears: Iterable[Linear], slots: int, executor: Executor):
        self._linears = [linear for linear in linears if linear.parts] if slots else []
        self._tables = np.zeros((len(self._linears), slots + 1), LORA)
        self._addresses = {id(one): table.ctypes.data for one, table in zip(self._linears, self._tables, strict=True)}
        self._executor = executor
        self._kept: dict[int, np.ndarray] = {}  # what the entries of a slot point at

    def address(self, linear: Linear) -> int | None:
        """Of a linear's table; None, C's null, where it has none."""
        return self._addresses.get(id(linear))

    def put(self, slot: int, adapter: Adapter) -> None:
        packed = [pack(linear, adapter, self._executor) for linear in self._linears]
        arrays = [array for one in packed if one for array in (one.a, one.b, one.halves)]
        memory = np.frombuffer(huge_pages(max(1, sum(map(_lines, arrays)))), np.uint8)
        at = 0
        for table, one in zip(self._tables, packed, strict=True):
            if one is None:
                table[slot] = 0
                continue
            addresses = []
            for array in (one.a, one.b, one.halves):
                memory[at : at + array.nbytes] = array.view(np.uint8)
                addresses.append(memory.ctypes.data + at)
                at += _lines(array)
            table[slot] = (*addresses, one.rank, one.rows)
        self._kept[slot] = memory


def pack(linear: Linear, adapter: Adapter, executor: Executor) -> Packed | None:
    """One linear's share of an adapter; None where the adapter leaves it alone.

    A takes the activations that the linear's weights take, so it has their precision: float32, bfloat16, one scale a
    row beside int8, else blocks of eight bits. B is float32 or bfloat16 beside those, else eight bits, a scale a row.
    """
    deltas = [adapter.delta(name) for name, _ in linear.parts]
    present = [delta for delta in deltas if delta is not None]
    if not present:
        return None
    largest = max(len(delta.a) for delta in present)
    # C works on whole steps of 4 ranks, and makes products of 16 or 32 ranks integers at once.
    rank, height = -(-largest // 4) * 4, HALF if largest <= HALF else -(-largest // PANEL) * PANEL
    panels = -(-linear.matrix.n // PANEL)
    a = np.zeros((len(present) * height, linear.matrix.k), np.float32)
    b, halves = np.zeros((panels * 2, HALF, rank), np.float32), np.full(panels * 2, -1, np.int32)
    row = begin = 0
    for number, ((_, rows), delta) in enumerate(zip(linear.parts, deltas, strict=True)):
        # The half panels of a part: every second one where gate and up alternate, else those behind the part before.
        mine = slice(number, None, 2) if linear.epilogue == Epilogue.GATED else slice(begin, begin - (-rows // HALF))
        begin -= -rows // HALF
        if delta is None:
            continue
        down, up = _balanced(delta)
        a[row : row + len(down)] = down
        filled = np.zeros((len(halves[mine]) * HALF, rank), np.float32)
        filled[:rows, : len(down)] = up
        b[mine], halves[mine] = filled.reshape(-1, HALF, rank), row
        row += height
    if linear.order is not None:
        a = a[:, linear.order]
    base = Format(linear.matrix.format)
    return Packed(_panels(a, base, executor), _sides(b, base), halves, rank, len(a))


def _balanced(delta: Delta) -> tuple[np.ndarray, np.ndarray]:
    """(A, B) with rows of A brought to about 1, by powers of two: float16 scales have few bits for tiny numbers."""
    _, exponents = np.frexp(np.abs(delta.a).max(axis=1))
    return np.ldexp(delta.a, -exponents[:, None]), np.ldexp(delta.b, exponents)


def _panels(a: np.ndarray, base: Format, executor: Executor) -> np.ndarray:
    """uint8: A [rows, inputs] in panels of the format that suits `base` (lora_format in program.hpp)."""
    source, target = Format.F32, base
    if base not in (Format.F32, Format.BF16, Format.INT8):
        source = target = Format.Q8_0
        a = _q8_0(a)
    rows = np.zeros(-(-len(a) // PANEL) * PANEL, np.uint64)
    rows[: len(a)] = a.ctypes.data + np.arange(len(a)) * a.strides[0]
    inputs = a.shape[1] if source == Format.F32 else a.shape[1] // (BLOCK + 2) * BLOCK
    out = np.empty(len(rows) // PANEL * panel_bytes(target, inputs), np.uint8)
    executor.pack(source, target, rows, inputs, out)
    return out


def _q8_0(a: np.ndarray) -> np.ndarray:
    """uint8 [rows, blocks * 34]: rows in GGML's blocks of 32 quants behind a float16 scale."""
    padded = np.zeros((len(a), -(-a.shape[1] // BLOCK), BLOCK), np.float32)
    padded.reshape(len(a), -1)[:, : a.shape[1]] = a
    scales = (np.abs(padded).max(axis=2, keepdims=True) / 127).astype(np.float16)
    quants = np.rint(padded / np.where(scales, scales, 1).astype(np.float32)).clip(-127, 127).astype(np.int8)
    return np.concatenate([scales.view(np.uint8), quants.view(np.uint8)], axis=2).reshape(len(a), -1)


def _sides(b: np.ndarray, base: Format) -> np.ndarray:
    """uint8: B [halves, 16, rank] as lora.hpp's sides."""
    if base in (Format.F32, Format.BF16):
        import ml_dtypes

        dtype = ml_dtypes.bfloat16 if base == Format.BF16 else np.float32
        return np.ascontiguousarray(b.swapaxes(1, 2).astype(dtype)).view(np.uint8).reshape(-1)
    scales = np.abs(b).max(axis=2) / np.float32(127)
    quants = np.rint(b / np.where(scales, scales, 1)[:, :, None]).astype(np.int32) + 128
    steps = quants.astype(np.uint8).reshape(len(b), HALF, -1, 4).swapaxes(1, 2).reshape(len(b), -1)
    return np.concatenate([scales.view(np.uint8), steps], axis=1).reshape(-1)


def _lines(array: np.ndarray) -> int:
    """Bytes of the whole cache lines that an array takes."""
    return -(-array.nbytes // LINE) * LINE
