"""Norm of the heads, rotary embedding and the write of keys and values, in one pass over q, k and v."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from martlet.kernels.cuda import launch
from martlet.kernels.cuda.launch import wait
from martlet.model.spec import Attention

HEADS_A_PROGRAM = 8


@triton.jit
def _rotate(
    qkv, norms, table, rows, positions, block_table, q_out, k_cache, v_cache,
    eps, block_stride, cache_stride,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, DIM: tl.constexpr, ROT: tl.constexpr, INTERLEAVED: tl.constexpr,
    NORM: tl.constexpr, BLOCK_SIZE: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_D: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    ALL: tl.constexpr = HEADS + 2 * KV_HEADS
    t = tl.program_id(0)
    head = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    d = tl.arange(0, BLOCK_D)
    row = tl.load(rows + t)
    position = tl.load(positions + t)
    is_qk = (head < HEADS + KV_HEADS)[:, None]
    rotated = (d < ROT)[None, :]
    # Each element meets its partner twice: x cos -/+ partner sin.
    HALF: tl.constexpr = ROT // 2
    if INTERLEAVED:
        partner = tl.where(d < ROT, d ^ 1, d)
        angle, first = d // 2, d % 2 == 0
    else:
        partner = tl.where(d < HALF, d + HALF, tl.where(d < ROT, d - HALF, d))
        angle, first = d % HALF, d < HALF
    cos = tl.load(table + position * ROT + angle, mask=d < ROT, other=1.0)[None, :]
    sin = tl.load(table + position * ROT + HALF + angle, mask=d < ROT, other=0.0)[None, :]
    sin = tl.where(first[None, :], -sin, sin)
    wait(PDL)
    mask = (head < ALL)[:, None] & (d < DIM)[None, :]
    base = qkv + t.to(tl.int64) * ALL * DIM + head[:, None] * DIM
    x = tl.load(base + d[None, :], mask=mask, other=0.0).to(tl.float32)
    y = tl.load(base + partner[None, :], mask=mask, other=0.0).to(tl.float32)
    if NORM:
        scale = 1.0 / tl.sqrt(tl.sum(x * x, 1) / DIM + eps)[:, None]
        gains = norms + head[:, None] * DIM
        x = tl.where(is_qk, x * scale * tl.load(gains + d[None, :], mask=mask & is_qk, other=1.0), x)
        y = tl.where(is_qk, y * scale * tl.load(gains + partner[None, :], mask=mask & is_qk, other=1.0), y)
    x = tl.where(is_qk & rotated, x * cos + y * sin, x)

    q_at = q_out + t.to(tl.int64) * HEADS * DIM + head[:, None] * DIM + d[None, :]
    tl.store(q_at, x.to(q_out.dtype.element_ty), mask=mask & (head < HEADS)[:, None])
    if row >= 0:
        block = tl.load(block_table + row.to(tl.int64) * block_stride + position // BLOCK_SIZE).to(tl.int64)
        at = block * cache_stride + (position % BLOCK_SIZE) * DIM
        is_k = ((head >= HEADS) & (head < HEADS + KV_HEADS))[:, None]
        is_v = ((head >= HEADS + KV_HEADS) & (head < ALL))[:, None]
        k_at = k_cache + at + (head - HEADS)[:, None] * BLOCK_SIZE * DIM + d[None, :]
        v_at = v_cache + at + (head - HEADS - KV_HEADS)[:, None] * BLOCK_SIZE * DIM + d[None, :]
        tl.store(k_at, x.to(k_cache.dtype.element_ty), mask=mask & is_k)
        tl.store(v_at, x.to(v_cache.dtype.element_ty), mask=mask & is_v)


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
) -> torch.Tensor:
    """Normalise (if norms), rotate, write k and v to the cache; returns q [T, H, D].

    qkv [T, (H + 2 K) * D]; norms float32 [H + K, D]; table float32 [length, rope.dim], cos then sin; rows, positions
    int32 [T], rows -1 are padding; block_table int32 [rows, P]; cache [2, blocks, K, block_size, D].
    """
    count = len(qkv)
    q = qkv.new_empty(count, spec.heads, spec.head_dim)
    heads = spec.heads + 2 * spec.kv_heads
    block_h = min(HEADS_A_PROGRAM, triton.next_power_of_2(heads))
    _rotate[(count, triton.cdiv(heads, block_h))](
        qkv, table if norms is None else norms, table, rows, positions, block_table, q, cache[0], cache[1],
        eps, block_table.stride(0), cache.stride(1),
        HEADS=spec.heads, KV_HEADS=spec.kv_heads, DIM=spec.head_dim, ROT=spec.rope.dim,
        INTERLEAVED=spec.rope.style == "interleaved", NORM=norms is not None, BLOCK_SIZE=cache.shape[3],
        BLOCK_H=block_h, BLOCK_D=triton.next_power_of_2(spec.head_dim), **launch.options(num_warps=4),
    )  # fmt: skip
    return q
