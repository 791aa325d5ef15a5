"""Norm of the heads, rotary embedding and the write of keys and values, in one pass over q, k and v."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from martlet.kernels.cuda import launch
from martlet.kernels.cuda.fp8 import to_three_bits
from martlet.kernels.cuda.launch import wait
from martlet.kernels.cuda.layers import parts_of, sum_of_parts
from martlet.model.spec import Attention

HEADS_A_PROGRAM = 8  # twice as many where there are tokens enough to fill the GPU
MANY_TOKENS = 1024


@triton.jit(do_not_specialize_on_alignment=["rows", "positions"])
def _rotate(
    qkv, norms, table, rows, positions, block_table, cache, scales, out,
    eps, part_stride, block_stride, cache_stride, value_stride, value_scale_stride,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, DIM: tl.constexpr, ROT: tl.constexpr, INTERLEAVED: tl.constexpr,
    NORM: tl.constexpr, SCALED: tl.constexpr, PARTS: tl.constexpr, COPY: tl.constexpr,
    BLOCK_SIZE: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_P: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    ALL: tl.constexpr = HEADS + 2 * KV_HEADS
    HALF: tl.constexpr = ROT // 2
    t = tl.program_id(0)
    head = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)[:, None]
    row = tl.load(rows + t)
    position = tl.load(positions + t)
    is_qk = head < HEADS + KV_HEADS
    is_v = (head >= HEADS + KV_HEADS).to(tl.int32)
    # A pair of elements is turned together; what is not rotated, if the head has such a part, is `rest`.
    pair = tl.arange(0, BLOCK_R)[None, :]
    if INTERLEAVED:
        one, two = 2 * pair, 2 * pair + 1
    else:
        one, two = pair, pair + HALF
    cos = tl.load(table + position * ROT + pair, mask=pair < HALF, other=1.0)
    sin = tl.load(table + position * ROT + HALF + pair, mask=pair < HALF, other=0.0)
    mask = (head < ALL) & (pair < HALF)
    line = qkv + t.to(tl.int64) * ALL * DIM + head * DIM
    wait(PDL)
    x = sum_of_parts(line + one, part_stride, mask, PARTS)
    y = sum_of_parts(line + two, part_stride, mask, PARTS)
    squares = tl.sum(x * x + y * y, 1)[:, None]
    if BLOCK_P > 0:
        unturned = ROT + tl.arange(0, BLOCK_P)[None, :]
        mask_rest = (head < ALL) & (unturned < DIM)
        rest = sum_of_parts(line + unturned, part_stride, mask_rest, PARTS)
        squares += tl.sum(rest * rest, 1)[:, None]
    if NORM:
        scale = tl.where(is_qk, 1.0 / tl.sqrt(squares / DIM + eps), 1.0)
        gains = norms + head * DIM
        x *= scale * tl.load(gains + one, mask=mask & is_qk, other=1.0)
        y *= scale * tl.load(gains + two, mask=mask & is_qk, other=1.0)
        if BLOCK_P > 0:
            rest *= scale * tl.load(gains + unturned, mask=mask_rest & is_qk, other=1.0)
    x, y = tl.where(is_qk, x * cos - y * sin, x), tl.where(is_qk, y * cos + x * sin, y)

    kind = out.dtype.element_ty
    changed = is_qk | COPY
    line = out + t.to(tl.int64) * ALL * DIM + head * DIM
    tl.store(line + one, x.to(kind), mask=mask & changed)
    tl.store(line + two, y.to(kind), mask=mask & changed)
    if BLOCK_P > 0:
        tl.store(line + unturned, rest.to(kind), mask=mask_rest & changed)
    if row >= 0:
        block = tl.load(block_table + row.to(tl.int64) * block_stride + position // BLOCK_SIZE).to(tl.int64)
        place = cache + block * cache_stride + (position % BLOCK_SIZE) * DIM
        kv_head = head - HEADS - is_v * KV_HEADS
        place += is_v * value_stride + kv_head * (BLOCK_SIZE * DIM)
        kept = cache.dtype.element_ty
        if SCALED:
            most = tl.max(tl.maximum(tl.abs(x), tl.abs(y)), 1)[:, None]
            if BLOCK_P > 0:
                most = tl.maximum(most, tl.max(tl.abs(rest), 1)[:, None])
            unit = tl.maximum(most, 1e-30) * (1.0 / 448.0)
            x, y = to_three_bits(x / unit), to_three_bits(y / unit)
            if BLOCK_P > 0:
                rest = to_three_bits(rest / unit)
            beside = scales + block * (KV_HEADS * BLOCK_SIZE) + kv_head * BLOCK_SIZE + position % BLOCK_SIZE
            tl.store(beside + is_v * value_scale_stride, unit, mask=(head >= HEADS) & (head < ALL))
        tl.store(place + one, x.to(kept), mask=mask & (head >= HEADS))
        tl.store(place + two, y.to(kept), mask=mask & (head >= HEADS))
        if BLOCK_P > 0:
            tl.store(place + unturned, rest.to(kept), mask=mask_rest & (head >= HEADS))


def rotate_and_write(
    qkv: torch.Tensor,
    norms: torch.Tensor | None,
    eps: float,
    table: torch.Tensor,
    rows: torch.Tensor,
    positions: torch.Tensor,
    block_table: torch.Tensor,
    cache: torch.Tensor,
    spec: Attention,
    scales: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Normalise (if norms) and rotate q and k, write k and v to the cache; returns q [T, H, D], part of `out`.

    qkv [T, (H + 2 K) * D]; norms float32 [H + K, D]; table float32 [length, rope.dim], cos then sin; rows, positions
    int32 [T], rows -1 are padding; block_table int32 [rows, P]; cache [2, blocks, K, block_size, D]. With scales
    float32 [2, blocks, K, block_size] the cache is float8_e4m3fn, to be multiplied by them: a scale a token and head.
    out [T, (H + 2 K) * D]: None for qkv itself, or where all of it goes, perhaps in another dtype; qkv may be parts
    [P, T, (H + 2 K) * D] then, to be summed.
    """
    count, heads, rest = qkv.shape[-2], spec.heads + 2 * spec.kv_heads, spec.head_dim - spec.rope.dim
    out = qkv if out is None else out
    block_h = HEADS_A_PROGRAM * (2 if count >= MANY_TOKENS else 1)
    launch.run(
        _rotate, (count, triton.cdiv(heads, block_h)),
        qkv, table if norms is None else norms, table, rows, positions, block_table, cache,
        table if scales is None else scales, out,
        eps, out.numel(), block_table.stride(0), cache.stride(1), cache.stride(0),
        0 if scales is None else scales.stride(0),
        HEADS=spec.heads, KV_HEADS=spec.kv_heads, DIM=spec.head_dim, ROT=spec.rope.dim,
        INTERLEAVED=spec.rope.style == "interleaved", NORM=norms is not None, SCALED=scales is not None,
        PARTS=parts_of(qkv), COPY=out is not qkv, BLOCK_SIZE=cache.shape[3], BLOCK_H=block_h,
        BLOCK_R=triton.next_power_of_2(max(spec.rope.dim // 2, 1)),
        BLOCK_P=triton.next_power_of_2(rest) if rest else 0,
    )  # fmt: skip
    return out[:, : spec.q_size].view(count, spec.heads, spec.head_dim)
