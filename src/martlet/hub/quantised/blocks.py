"""Block formats that quantised safetensors become: rows of blocks, whatever layout the file has.

    int4_32, int4_64, int4_128   a block of so many weights: float16 scale, uint8 zero, a byte unused, then the quants,
                                 two a byte, the earlier one in the low half. value = scale * (quant - zero)
    q8_0       GGML's: 32 weights, float16 scale, int8 quants
    int8_row   the whole row: float32 scale, int8 quants
    fp8_row    the whole row: float32 scale, e4m3
    int, fp8, nf4   anything else: nobody multiplies with it; it is unpacked

The first four lose nothing: a scale that is no float16 sends a matrix to `int`. A group of any size becomes blocks of
the largest size above that divides it and the row, scale and zero repeated; so the last group may be a short one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from martlet.hub.checkpoint import PackedTensor

SIZES = (128, 64, 32)
HEAD = 4  # bytes in front of a block's quants
INTEGERS = ("int4_32", "int4_64", "int4_128")


@dataclass(frozen=True, slots=True)
class Grouped:
    """A matrix of integers with a scale and a zero for each group of columns.

    quants: makes uint8 [out, in], unsigned, or with `pairs` uint8 [out, in / 2], two of them a byte as above.
    scales: [out, groups]. zeros: int [out, groups]. group_of: int [in], the group of each column.
    """

    shape: tuple[int, int]
    bits: int
    quants: Callable[[], np.ndarray]
    scales: np.ndarray
    zeros: np.ndarray
    group_of: np.ndarray
    pairs: bool = False

    def packed(self) -> PackedTensor:
        """In blocks of four or eight bits where that loses nothing, else as `int`."""
        order = None
        if (np.diff(self.group_of) < 0).any():
            order = np.argsort(self.group_of, kind="stable").astype(np.int32)
        groups = self.group_of if order is None else self.group_of[order]
        size = next((n for n in SIZES if self._fits(groups, n)), None)
        exact = np.array_equal(self.scales.astype(np.float16).astype(np.float32), self.scales.astype(np.float32))
        if size is None or not exact or (self.bits == 8 and (self.zeros != 128).any()):
            return PackedTensor("int", self.shape, self._values, lambda data: data.view(np.float32), block=1)
        if self.bits == 8:
            block_of = groups[::32]
            return PackedTensor("q8_0", self.shape, once(lambda: self._bytes(block_of, order)), unpack_q8_0, order, 32)
        block_of = groups[::size]
        make = once(lambda: self._nibbles(size, block_of, order))
        return PackedTensor(f"int4_{size}", self.shape, make, lambda data: unpack_int4(data, size), order, size)

    def _fits(self, groups: np.ndarray, size: int) -> bool:
        """Whether all columns of a block of this size are of one group."""
        if len(groups) % size:
            return False
        blocks = groups.reshape(-1, size)
        return bool((blocks == blocks[:, :1]).all())

    def _bytes(self, block_of: np.ndarray, order: np.ndarray | None) -> np.ndarray:
        quants = self.quants()
        quants = (quants if order is None else quants[:, order]) ^ np.uint8(0x80)
        out = np.empty((self.shape[0], len(block_of), 34), np.uint8)
        out[..., :2] = as_bytes(self.scales[:, block_of].astype(np.float16))
        out[..., 2:] = quants.reshape(self.shape[0], -1, 32)
        return out.reshape(self.shape[0], -1)

    def _nibbles(self, size: int, block_of: np.ndarray, order: np.ndarray | None) -> np.ndarray:
        quants = self.quants()
        if order is not None:
            quants = in_pairs((unpaired(quants) if self.pairs else quants)[:, order])
        elif not self.pairs:
            quants = in_pairs(quants)
        out = np.zeros((self.shape[0], len(block_of), HEAD + size // 2), np.uint8)
        out[..., :2] = as_bytes(self.scales[:, block_of].astype(np.float16))
        out[..., 2] = self.zeros[:, block_of]
        out[..., HEAD:] = quants.reshape(self.shape[0], -1, size // 2)
        return out.reshape(self.shape[0], -1)

    def _values(self) -> np.ndarray:
        quants = unpaired(self.quants()) if self.pairs else self.quants()
        zeros, scales = self.zeros[:, self.group_of], self.scales[:, self.group_of].astype(np.float32)
        return ((quants.astype(np.float32) - zeros.astype(np.float32)) * scales).view(np.uint8)


def in_pairs(quants: np.ndarray) -> np.ndarray:
    """uint8 [..., n] below 16 -> [..., n / 2], the earlier of two in the low half."""
    return quants[..., ::2] | quants[..., 1::2] << 4


def unpaired(pairs: np.ndarray) -> np.ndarray:
    return np.stack([pairs & 15, pairs >> 4], -1).reshape(*pairs.shape[:-1], -1)


def split_int4(data: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Rows of int4 blocks as (pairs uint8 [out, in / 2], scales float16 [out, blocks], zeros uint8 [out, blocks])."""
    blocks = data.reshape(len(data), -1, HEAD + size // 2)
    scales = np.ascontiguousarray(blocks[..., :2]).view(np.float16)[..., 0]
    return np.ascontiguousarray(blocks[..., HEAD:]).reshape(len(data), -1), scales, blocks[..., 2]


def unpack_int4(data: np.ndarray, size: int) -> np.ndarray:
    pairs, scales, zeros = split_int4(data, size)
    quants = unpaired(pairs).reshape(*scales.shape, size).astype(np.float32)
    return ((quants - zeros[..., None]) * scales[..., None].astype(np.float32)).reshape(len(data), -1)


def unpack_q8_0(data: np.ndarray) -> np.ndarray:
    blocks = data.reshape(len(data), -1, 34)
    scales = np.ascontiguousarray(blocks[..., :2]).view(np.float16).astype(np.float32)
    return (blocks[..., 2:].view(np.int8) * scales).reshape(len(data), -1)


def rows_with_scale(format: str, values: np.ndarray, scales: np.ndarray) -> PackedTensor:
    """int8_row or fp8_row: values [out, in] of one byte each, scales one a row or one for all."""

    def make() -> np.ndarray:
        each = np.broadcast_to(scales.reshape(-1).astype(np.float32), len(values))
        return np.concatenate([as_bytes(each), values.view(np.uint8)], 1)

    dtype = values.dtype

    def unpack(data: np.ndarray) -> np.ndarray:
        plain = np.ascontiguousarray(data[:, HEAD:]).view(dtype).astype(np.float32)
        return plain * np.ascontiguousarray(data[:, :HEAD]).view(np.float32)

    return PackedTensor(format, values.shape, once(make), unpack)


def unpacked(format: str, shape: tuple[int, int], values: Callable[[], np.ndarray]) -> PackedTensor:
    """A matrix in a format that is only ever unpacked; values: makes it, float32 [out, in]."""
    make = once(lambda: np.ascontiguousarray(values(), np.float32).view(np.uint8))
    return PackedTensor(format, shape, make, lambda data: np.ascontiguousarray(data).view(np.float32))


def as_bytes(array: np.ndarray) -> np.ndarray:
    """[...] -> uint8 [..., itemsize]."""
    return np.ascontiguousarray(array)[..., None].view(np.uint8)


def once(make: Callable[[], np.ndarray]) -> Callable[[], np.ndarray]:
    """`make`, called at the first call only."""
    made: list[np.ndarray] = []

    def get() -> np.ndarray:
        if not made:
            made.append(make())
        return made[0]

    return get
