"""Products with four-bit weights: a scale and a zero for each group of inputs, as martlet.hub.quantised keeps them.

A word of 32 bits holds eight inputs of an output, the first in the lowest bits: value = scale * (quant - zero).
Few rows multiply what they unpack in registers; many have the matrix unpacked once and go to cuBLAS.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from martlet.kernels.cuda import launch
from martlet.kernels.cuda.launch import wait

FEW_ROWS = 64  # beyond, unpacking costs less than it saves


@dataclass(frozen=True, slots=True)
class Groups:
    """size: inputs of a group. scales: float16 [out, in / size]. zeros: uint8, alike."""

    size: int
    scales: torch.Tensor
    zeros: torch.Tensor

    def __getitem__(self, rows: slice) -> Groups:
        return Groups(self.size, self.scales[rows], self.zeros[rows])


@triton.jit
def word_products(words, x, gain, word, inside, scales, zeros, row, groups, acc, squares,
                  SIZE: tl.constexpr, NORM: tl.constexpr):  # fmt: skip
    """acc [N, W] += the products of words [N, W], numbers `word` [W] of their rows, with the inputs they stand for."""
    partial = tl.zeros_like(acc)
    total = tl.sum(partial, 0)
    for i in tl.static_range(8):
        at = word * 8 + i
        v = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
        if NORM:
            squares += v * v
            v *= tl.load(gain + at, mask=inside, other=0.0).to(tl.float32)
        partial += ((words >> (4 * i)) & 15).to(tl.float32) * v[None, :]
        total += v
    at = row[:, None] * groups + (word * 8 // SIZE)[None, :]
    scale = tl.load(scales + at, mask=inside[None, :], other=0.0).to(tl.float32)
    zero = tl.load(zeros + at, mask=inside[None, :], other=0).to(tl.float32)
    return acc + scale * (partial - zero * total[None, :]), squares


@triton.jit
def _few_rows(
    x, words, scales, zeros, bias, out, T, N, K,
    SIZE: tl.constexpr, BIAS: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr, FLOAT32: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    # A piece of 32 inputs lies in one group, so a scale serves all of it; its products are made of rounded weights.
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    t = tl.program_id(1) * BLOCK_T + tl.arange(0, BLOCK_T)
    k = tl.arange(0, 32)
    row = tl.minimum(n, N - 1).to(tl.int64)
    at_x = x + tl.minimum(t, T - 1).to(tl.int64)[:, None] * K + k[None, :]
    at_w = words + row[None, :] * (K // 8) + (k // 8)[:, None]
    groups = K // SIZE
    wait(PDL)
    acc = tl.zeros([BLOCK_T, BLOCK_N], tl.float32)
    for begin in range(0, K, 32):
        quants = (tl.load(at_w + begin // 8) >> ((k % 8) * 4)[:, None]) & 15
        group = row * groups + begin // SIZE
        scale = tl.load(scales + group).to(tl.float32)
        zero = tl.load(zeros + group).to(tl.float32)
        weights = (quants.to(tl.float32) - zero[None, :]) * scale[None, :]
        rows = tl.load(at_x + begin)
        if FLOAT32:
            acc = tl.dot(rows, weights, acc, input_precision="ieee")
        else:
            acc = tl.dot(rows, weights.to(rows.dtype), acc)
    if BIAS:
        acc += tl.load(bias + row).to(tl.float32)[None, :]
    place = out + t.to(tl.int64)[:, None] * N + n[None, :]
    tl.store(place, acc.to(out.dtype.element_ty), mask=(t < T)[:, None] & (n < N)[None, :])


@triton.jit
def _unpack(words, scales, zeros, out, TOTAL, K, SIZE: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    wait(PDL)
    inside = at < TOTAL
    quant = (tl.load(words + at // 8, mask=inside, other=0) >> ((at % 8) * 4).to(tl.int32)) & 15
    group = at // K * (K // SIZE) + at % K // SIZE
    scale = tl.load(scales + group, mask=inside, other=0.0).to(tl.float32)
    zero = tl.load(zeros + group, mask=inside, other=0).to(tl.float32)
    tl.store(out + at, ((quant.to(tl.float32) - zero) * scale).to(out.dtype.element_ty), mask=inside)


def unpacked(words: torch.Tensor, groups: Groups, dtype: torch.dtype) -> torch.Tensor:
    """int32 [out, in / 8] -> [out, in]."""
    rows, columns = words.shape[0], words.shape[1] * 8
    out = torch.empty(rows, columns, dtype=dtype, device=words.device)
    grid = (triton.cdiv(out.numel(), 4096),)
    launch.run(
        _unpack, grid, words, groups.scales, groups.zeros, out, out.numel(), columns, SIZE=groups.size, BLOCK=4096
    )
    return out


def few_rows(
    x: torch.Tensor, words: torch.Tensor, groups: Groups, bias: torch.Tensor | None, out: torch.Tensor
) -> torch.Tensor:
    """x [T, in] @ matrix.T + bias into out [T, out]."""
    count, k = x.shape
    n = len(words)
    block_t = max(16, min(64, triton.next_power_of_2(count)))
    grid = (triton.cdiv(n, 32), triton.cdiv(count, block_t))
    launch.run(
        _few_rows, grid, x, words, groups.scales, groups.zeros, x if bias is None else bias, out, count, n, k,
        SIZE=groups.size, BIAS=bias is not None, BLOCK_T=block_t, BLOCK_N=32, FLOAT32=x.dtype == torch.float32,
        stages=4,
    )  # fmt: skip
    return out
