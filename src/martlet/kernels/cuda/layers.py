"""Embedding, RMSNorm and gated activation: what stands between the matrix products of a wide step."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from martlet.kernels.cuda import launch
from martlet.kernels.cuda.fp8 import Fp8, room_for, to_three_bits
from martlet.kernels.cuda.launch import wait


@triton.jit
def activate(x, ACTIVATION: tl.constexpr):
    """silu, gelu_tanh or gelu of float32 x; "" leaves it."""
    if ACTIVATION == "":
        return x
    elif ACTIVATION == "silu":
        return x * tl.sigmoid(x)
    elif ACTIVATION == "gelu_tanh":
        inner = 0.7978845608028654 * (x + 0.044715 * x * x * x)
        return x * tl.sigmoid(2.0 * inner)  # 0.5 (1 + tanh(a)) = sigmoid(2 a)
    else:
        tl.static_assert(ACTIVATION == "gelu")
        return 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))


@triton.jit
def sum_of_parts(at, stride, mask, PARTS: tl.constexpr):
    """float32 sum of what is `at`, and at PARTS - 1 places further on, `stride` apart."""
    total = tl.load(at, mask=mask, other=0.0).to(tl.float32)
    for part in tl.static_range(1, PARTS):
        total += tl.load(at + part * stride, mask=mask, other=0.0).to(tl.float32)
    return total


@triton.jit
def _store_fp8(out, scales, t, k, x, mask, WIDTH):
    """Row t of out, e4m3, and its scale: the largest of x comes to 448."""
    unit = tl.maximum(tl.max(tl.where(mask, tl.abs(x), 0.0), 0), 1e-30) * (1.0 / 448.0)
    tl.store(out + t.to(tl.int64) * WIDTH + k, to_three_bits(x / unit).to(out.dtype.element_ty), mask=mask)
    tl.store(scales + t, unit)


@triton.jit(do_not_specialize_on_alignment=["rows", "positions", "changes"], do_not_specialize=["changes_stride"])
def _embed(
    tokens, rows, positions, changes, state, table, out, scale, WIDTH, tokens_stride, changes_stride, FIRST, COUNT,
    CHANGES: tl.constexpr, SCALED: tl.constexpr, PART: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    t = tl.program_id(0)
    row = tl.load(rows + t)
    position = tl.load(positions + t)
    wait(PDL)
    if CHANGES:
        at = tl.load(changes + t)
        if at >= 0:
            tl.store(state + at, tl.load(changes + changes_stride + t))
    token = tl.load(tokens + row.to(tl.int64) * tokens_stride + position, mask=row >= 0, other=0)
    token = tl.maximum(token, 0).to(tl.int64) - FIRST
    here = tl.where((token >= 0) & (token < COUNT), WIDTH, 0)
    for begin in range(0, WIDTH, BLOCK):
        k = begin + tl.arange(0, BLOCK)
        if PART:
            value = tl.load(table + token * WIDTH + k, mask=k < here, other=0.0)
        else:
            value = tl.load(table + token * WIDTH + k, mask=k < WIDTH)
        if SCALED:
            value = value.to(tl.float32) * scale
        tl.store(out + t.to(tl.int64) * WIDTH + k, value.to(out.dtype.element_ty), mask=k < WIDTH)


def embed(
    tokens: torch.Tensor,
    rows: torch.Tensor,
    positions: torch.Tensor,
    table: torch.Tensor,
    *,
    scale: float = 1.0,
    changes: torch.Tensor | None = None,
    state: torch.Tensor | None = None,
    first: int | None = None,
    dtype: torch.dtype | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Embeddings [T, W] of tokens[rows[t], positions[t]], times scale; rows -1 are padding. dtype: the table's if None.

    tokens int32 [rows, length]; rows, positions int32 [T]; table [V, W]. changes: int32 [2, T], places in the flat
    int32 `state` and what to write there, place -1 for nothing; the kernels behind this one see them.
    first: where the table is part of a larger one, the token of its first row; other tokens' embeddings are zeros.
    """
    count, width = len(rows), table.shape[1]
    out = table.new_empty(count, width, dtype=dtype) if out is None else out
    launch.run(
        _embed, (count,),
        tokens, rows, positions, rows if changes is None else changes, rows if state is None else state, table, out,
        scale, width, tokens.stride(0), 0 if changes is None else changes.stride(0), first or 0, len(table),
        CHANGES=changes is not None, SCALED=scale != 1.0, PART=first is not None,
        BLOCK=min(triton.next_power_of_2(width), 2048),
    )  # fmt: skip
    return out


@triton.jit(do_not_specialize_on_alignment=["changes"], do_not_specialize=["num_changes"])
def _scatter(state, changes, num_changes, BLOCK: tl.constexpr, PDL: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = i < num_changes
    wait(PDL)
    at = tl.load(changes + i, mask=mask)
    tl.store(state + at, tl.load(changes + num_changes + i, mask=mask), mask=mask)


def scatter(state: torch.Tensor, changes: torch.Tensor) -> None:
    """state[changes[0]] = changes[1]; state int32 [any], changes int32 [2, n], no place twice."""
    count = changes.shape[1]
    launch.run(_scatter, (triton.cdiv(count, 1024),), state, changes, count, BLOCK=1024)


@triton.jit(do_not_specialize_on_alignment=["picks"])
def _norm(x, delta, gain, out, scales, picks, WIDTH, eps, part_stride, PARTS: tl.constexpr, PICK: tl.constexpr,
          FP8: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr):  # fmt: skip
    t = tl.program_id(0)
    k = tl.arange(0, BLOCK)
    mask = k < WIDTH
    g = tl.load(gain + k, mask=mask).to(tl.float32)
    source = (tl.load(picks + t) if PICK else t).to(tl.int64)
    wait(PDL)
    v = tl.load(x + source * WIDTH + k, mask=mask, other=0.0)
    if PARTS > 0:
        change = sum_of_parts(delta + source * WIDTH + k, part_stride, mask, PARTS)
        v = (v.to(tl.float32) + change).to(v.dtype)
        if not PICK:
            tl.store(x + source * WIDTH + k, v, mask=mask)
    v = v.to(tl.float32)
    scale = 1.0 / tl.sqrt(tl.sum(v * v) / WIDTH + eps)
    if FP8:
        _store_fp8(out, scales, t, k, v * scale * g, mask, WIDTH)
    else:
        tl.store(out + t.to(tl.int64) * WIDTH + k, (v * scale * g).to(out.dtype.element_ty), mask=mask)


def add_rms_norm(
    x: torch.Tensor,
    delta: torch.Tensor | None,
    gain: torch.Tensor,
    eps: float,
    picks: torch.Tensor | None = None,
    fp8: bool = False,
    dtype: torch.dtype | None = None,
    overlap: bool = True,
) -> torch.Tensor | Fp8:
    """RMSNorm of x + delta, where x [T, W] becomes that sum. With picks int32 [S]: of those rows only, x left alone.

    delta [T, W], or [P, T, W] to be summed. fp8: as Fp8; else in `dtype`, the gain's if None, whatever x is kept in.
    overlap: as in `launch.run`.
    """
    count, width = len(x) if picks is None else len(picks), x.shape[1]
    out = room_for(count, width, x.device) if fp8 else gain.new_empty(count, width, dtype=dtype)
    if count:
        block = triton.next_power_of_2(width)
        launch.run(
            _norm, (count,),
            x, x if delta is None else delta, gain, *_places(out), gain if picks is None else picks, width, eps,
            x.numel(), PARTS=parts_of(delta), PICK=picks is not None, FP8=fp8, BLOCK=block,
            warps=min(max(block // (512 if parts_of(delta) < 2 else 256), 1), 16), overlap=overlap,
        )  # fmt: skip
    return out


def parts_of(delta: torch.Tensor | None) -> int:
    """Of how many parts [T, W] it is the sum."""
    return 0 if delta is None else len(delta) if delta.dim() == 3 else 1


def _places(out: torch.Tensor | Fp8) -> tuple[torch.Tensor, torch.Tensor]:
    """(values, scales) for a kernel; without scales the values stand in for them."""
    return (out.values, out.scales) if isinstance(out, Fp8) else (out, out)


@triton.jit
def _activation(x, out, scales, HIDDEN, GATED: tl.constexpr, ACTIVATION: tl.constexpr, FP8: tl.constexpr,
                BLOCK: tl.constexpr, PDL: tl.constexpr):  # fmt: skip
    t = tl.program_id(0).to(tl.int64)
    k = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = k < HIDDEN
    wait(PDL)
    y = activate(tl.load(x + t * HIDDEN * (2 if GATED else 1) + k, mask=mask).to(tl.float32), ACTIVATION)
    if GATED:
        y *= tl.load(x + t * HIDDEN * 2 + HIDDEN + k, mask=mask).to(tl.float32)
    if FP8:
        _store_fp8(out, scales, t, k, y, mask, HIDDEN)
    else:
        tl.store(out + t * HIDDEN + k, y.to(out.dtype.element_ty), mask=mask)


def activation(
    x: torch.Tensor, kind: str, gated: bool, fp8: bool = False, dtype: torch.dtype | None = None
) -> torch.Tensor | Fp8:
    """Gated: x [T, 2 * hidden] is gate then up -> act(gate) * up [T, hidden]; else act(x).

    fp8: as Fp8; else in `dtype`, x's if None.
    """
    count, hidden = x.shape[0], x.shape[1] // (2 if gated else 1)
    out = room_for(count, hidden, x.device) if fp8 else x.new_empty(count, hidden, dtype=dtype)
    block = triton.next_power_of_2(hidden)
    block = block if fp8 else min(block, 1024)  # a row's scale takes all of it
    launch.run(
        _activation, (count, triton.cdiv(hidden, block)), x, *_places(out), hidden,
        GATED=gated, ACTIVATION=kind, FP8=fp8, BLOCK=block, warps=min(max(block // 512, 4), 16),
    )  # fmt: skip
    return out


def in_fp8(x: torch.Tensor) -> Fp8:
    """x [T, K] as it is, in FP8."""
    return activation(x, "", False, fp8=True)
