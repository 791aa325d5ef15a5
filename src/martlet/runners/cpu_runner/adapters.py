"""LoRA adapters for the C++ kernels: tables of slots that linears point at, filled while nothing runs."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import ml_dtypes
import numpy as np

from martlet.kernels.cpu.program import LORA, PANEL, Epilogue, Format
from martlet.model.adapters import Adapter

if TYPE_CHECKING:
    from martlet.runners.cpu_runner.decoder import Linear

HALF = PANEL // 2


class AdapterTables:
    """A table of LORA [slots + 1] for every linear that may carry an adapter; slot 0 stays empty."""

    def __init__(self, linears: Iterable[Linear], slots: int):
        self._linears = [linear for linear in linears if linear.parts] if slots else []
        self._tables = np.zeros((len(self._linears), slots + 1), LORA)
        self._addresses = {id(one): table.ctypes.data for one, table in zip(self._linears, self._tables, strict=True)}
        self._kept: dict[int, list[np.ndarray]] = {}  # what the entries of a slot point at

    def address(self, linear: Linear) -> int | None:
        """Of a linear's table; None, C's null, where it has none."""
        return self._addresses.get(id(linear))

    def put(self, slot: int, adapter: Adapter) -> None:
        kept = []
        for linear, table in zip(self._linears, self._tables, strict=True):
            packed = pack(linear, adapter)
            if packed is None:
                table[slot] = 0
                continue
            a, b, halves = packed
            kept += packed
            addresses = (a.ctypes.data, b.ctypes.data, halves.ctypes.data)
            table[slot] = (*addresses, b.shape[1], len(a), a.dtype != np.float32, 0)
        self._kept[slot] = kept


def pack(linear: Linear, adapter: Adapter) -> tuple[np.ndarray, np.ndarray, np.ndarray] | None:
    """(A [parts * rank, inputs], B [panels, rank, 32], halves int32 [panels * 2]) of one linear as C reads them.

    None where the adapter leaves it alone. Float32 beside float32 weights, else bfloat16.
    """
    deltas = [adapter.delta(name) for name, _ in linear.parts]
    present = [delta for delta in deltas if delta is not None]
    if not present:
        return None
    panels, rank = -(-linear.matrix.n // PANEL), max(len(delta.a) for delta in present)
    a = np.zeros((len(present) * rank, -(-linear.matrix.k // 16) * 16), np.float32)
    b, halves = np.zeros((panels * 2, HALF, rank), np.float32), np.full(panels * 2, -1, np.int32)
    row = begin = 0
    for number, ((_, rows), delta) in enumerate(zip(linear.parts, deltas, strict=True)):
        # The half panels of a part: every second one where gate and up alternate, else those behind the part before.
        mine = slice(number, None, 2) if linear.epilogue == Epilogue.GATED else slice(begin, begin - (-rows // HALF))
        begin -= -rows // HALF
        if delta is None:
            continue
        height = len(delta.a)
        a[row : row + height, : linear.matrix.k] = delta.a
        filled = np.zeros((len(halves[mine]) * HALF, rank), np.float32)
        filled[:rows, :height] = delta.b
        b[mine], halves[mine] = filled.reshape(-1, HALF, rank), row
        row += rank
    b = b.reshape(panels, PANEL, rank).swapaxes(1, 2)
    dtype = np.float32 if linear.matrix.format == Format.F32 else ml_dtypes.bfloat16
    return a.astype(dtype), np.ascontiguousarray(b.astype(dtype)), halves
