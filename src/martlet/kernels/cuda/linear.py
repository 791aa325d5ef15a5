"""Matrix products of few rows, with the norm in front and the activation or residual behind fused in.

A decoding step of a few sequences reads every weight once and does little else; its time is the time of that read.
cuBLAS does not see the neighbours of a product, and at these sizes each launch costs as much as the read (measured on
an H200: the products of a 0.6B model alone take 0.96 ms a step at batch 1, its bytes 0.28 ms). So one row is a
vector kernel, a few rows are a tensor-core kernel over narrow slices of the output, and what stands around a product is
part of it. From `MANY_ROWS` on cuBLAS is as good.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from martlet.kernels.cuda import launch
from martlet.kernels.cuda.launch import prefetch, wait
from martlet.kernels.cuda.layers import activate

MANY_ROWS = 64  # most rows these kernels take


@dataclass(frozen=True, slots=True)
class Linear:
    """matrix [out, in] (gated: [2 * out, in], gate rows then up rows), bias of as many entries or None."""

    matrix: torch.Tensor
    bias: torch.Tensor | None = None


@triton.jit
def _one_row(
    x, gain, w, bias, residual, out, eps, N, K,
    NORM: tl.constexpr, GATED: tl.constexpr, ACTIVATION: tl.constexpr, BIAS: tl.constexpr, RESIDUAL: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, EVEN: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    inside = n < N
    at = w + tl.where(inside, n, 0).to(tl.int64)[:, None] * K + k[None, :]
    first = tl.load(at) if EVEN else tl.load(at, mask=(k < K)[None, :], other=0.0)
    if GATED:
        first_up = (
            tl.load(at + N.to(tl.int64) * K)
            if EVEN
            else tl.load(at + N.to(tl.int64) * K, mask=(k < K)[None, :], other=0.0)
        )
    wait(PDL)
    acc = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
    acc_up = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
    squares = tl.zeros([BLOCK_K], tl.float32)
    for begin in range(0, K, BLOCK_K):
        keep = begin + k < K
        more = begin + BLOCK_K + k < K
        weights = first
        first = tl.load(at + begin + BLOCK_K, mask=more[None, :], other=0.0)
        v = tl.load(x + begin + k, mask=keep, other=0.0).to(tl.float32)
        if NORM:
            squares += v * v
            v *= tl.load(gain + begin + k, mask=keep, other=0.0).to(tl.float32)
        acc += weights.to(tl.float32) * v[None, :]
        if GATED:
            weights = first_up
            first_up = tl.load(at + N.to(tl.int64) * K + begin + BLOCK_K, mask=more[None, :], other=0.0)
            acc_up += weights.to(tl.float32) * v[None, :]
    y = tl.sum(acc, 1)
    up = tl.sum(acc_up, 1)
    if NORM:
        scale = 1.0 / tl.sqrt(tl.sum(squares) / K + eps)
        y *= scale
        up *= scale
    if BIAS:
        y += tl.load(bias + n, mask=inside, other=0.0).to(tl.float32)
        if GATED:
            up += tl.load(bias + N + n, mask=inside, other=0.0).to(tl.float32)
    if ACTIVATION != "":
        y = activate(y, ACTIVATION)
    if GATED:
        y *= up
    if RESIDUAL:
        y += tl.load(residual + n, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + n, y.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _few_rows(
    x, gain, w, bias, residual, out, eps, M, N, K,
    NORM: tl.constexpr, GATED: tl.constexpr, ACTIVATION: tl.constexpr, BIAS: tl.constexpr, RESIDUAL: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, STAGES: tl.constexpr, PRECISION: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    m = tl.arange(0, BLOCK_M)
    k = tl.arange(0, BLOCK_K)
    inside = n < N
    at = w + tl.where(inside, n, 0).to(tl.int64)[:, None] * K
    if PDL:  # the whole slice, a line of 128 bytes at a time, is on its way while the previous kernel ends
        LINE: tl.constexpr = 128 // (w.dtype.element_ty.primitive_bitwidth // 8)
        for begin in range(0, K, BLOCK_K):
            line = begin + tl.arange(0, BLOCK_K // LINE) * LINE
            prefetch(at + tl.minimum(line, K - 1)[None, :], PDL)
            if GATED:
                prefetch(at + N.to(tl.int64) * K + tl.minimum(line, K - 1)[None, :], PDL)
    wait(PDL)
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    acc_up = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    squares = tl.zeros([BLOCK_M], tl.float32)
    for begin in tl.range(0, K, BLOCK_K, num_stages=STAGES):
        keep = (begin + k < K)[None, :]
        v = tl.load(x + m[:, None] * K + begin + k[None, :], mask=(m < M)[:, None] & keep, other=0.0)
        weights = tl.load(at + begin + k[None, :], mask=keep, other=0.0)
        if NORM:
            f = v.to(tl.float32)
            squares += tl.sum(f * f, 1)
            v = (f * tl.load(gain + begin + k[None, :], mask=keep, other=0.0).to(tl.float32)).to(v.dtype)
        acc = tl.dot(v, weights.T, acc, input_precision=PRECISION)
        if GATED:
            weights = tl.load(at + N.to(tl.int64) * K + begin + k[None, :], mask=keep, other=0.0)
            acc_up = tl.dot(v, weights.T, acc_up, input_precision=PRECISION)
    if NORM:
        scale = (1.0 / tl.sqrt(squares / K + eps))[:, None]
        acc *= scale
        acc_up *= scale
    if BIAS:
        acc += tl.load(bias + n, mask=inside, other=0.0).to(tl.float32)[None, :]
        if GATED:
            acc_up += tl.load(bias + N + n, mask=inside, other=0.0).to(tl.float32)[None, :]
    if ACTIVATION != "":
        acc = activate(acc, ACTIVATION)
    if GATED:
        acc *= acc_up
    place = m.to(tl.int64)[:, None] * N + n[None, :]
    mask = (m < M)[:, None] & inside[None, :]
    if RESIDUAL:
        acc += tl.load(residual + place, mask=mask, other=0.0).to(tl.float32)
    tl.store(out + place, acc.to(out.dtype.element_ty), mask=mask)


@dataclass(frozen=True, slots=True)
class Tile:
    """How a product is cut: output columns and inputs of a program, warps, loads in flight."""

    block_n: int
    block_k: int
    warps: int
    stages: int = 3


def tile_for(rows: int, n: int, k: int, gated: bool) -> Tile:
    """The tile of a product [rows, k] x [n, k]: enough programs to fill the GPU, as much in flight as fits."""
    sms = launch.num_sms()
    if rows == 1:
        block_n = 8
        while block_n > 1 and n < block_n * sms:
            block_n //= 2
        return Tile(block_n // 2 if gated and block_n > 1 else block_n, min(1024, triton.next_power_of_2(k)), 4)
    block_n = 64
    while block_n > 16 and n < block_n * sms:
        block_n //= 2
    return Tile(block_n, 128, 4, 4)


def linear(
    x: torch.Tensor,
    weight: Linear,
    *,
    gain: torch.Tensor | None = None,
    eps: float = 0.0,
    activation: str = "",
    gated: bool = False,
    residual: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
    dtype: torch.dtype | None = None,
    tile: Tile | None = None,
) -> torch.Tensor:
    """residual + act(norm(x) @ matrix.T + bias) for x [M, K], M <= MANY_ROWS -> [M, N].

    gain [K]: RMSNorm in front. gated: act(gate) * up. residual [M, N] may be `out` itself. dtype: of the result.
    """
    rows, k = x.shape
    n = weight.matrix.shape[0] // (2 if gated else 1)
    out = x.new_empty(rows, n, dtype=dtype or x.dtype) if out is None else out
    tile = tile or tile_for(rows, n, k, gated)
    if x.dtype == torch.float32 and rows > 1:  # for comparing with the reference; no tensor cores, and twice the bytes
        tile = Tile(16, 32, 4, 2)
    arguments = (
        x,
        x if gain is None else gain,
        weight.matrix,
        x if weight.bias is None else weight.bias,
        x if residual is None else residual,
        out,
        eps,
    )
    flags = {
        "NORM": gain is not None,
        "GATED": gated,
        "ACTIVATION": activation,
        "BIAS": weight.bias is not None,
        "RESIDUAL": residual is not None,
    }
    grid = (triton.cdiv(n, tile.block_n),)
    if rows == 1:
        _one_row[grid](
            *arguments, n, k, **flags, BLOCK_N=tile.block_n, BLOCK_K=tile.block_k, EVEN=k % tile.block_k == 0,
            **launch.options(tile.warps),
        )  # fmt: skip
    else:
        precision = "ieee" if x.dtype == torch.float32 else "tf32"  # the latter is what 16-bit inputs are called with
        _few_rows[grid](
            *arguments, rows, n, k, **flags, BLOCK_M=max(16, triton.next_power_of_2(rows)), BLOCK_N=tile.block_n,
            BLOCK_K=tile.block_k, STAGES=tile.stages, PRECISION=precision, **launch.options(tile.warps, tile.stages),
        )  # fmt: skip
    return out
