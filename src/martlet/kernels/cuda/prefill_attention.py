"""Paged causal attention for many new tokens a sequence: a prompt, a chunk of one, or what follows a cached prefix.

A program takes one query head and a tile of one sequence's new tokens, and walks that sequence's pages from the first
token they may see to the last of the tile. The tiles of a step are listed on the host, heaviest first, so that the
last ones to run are short.
"""

from __future__ import annotations

import numpy as np
import torch
import triton
import triton.language as tl
from torch.nn.attention import SDPBackend, sdpa_kernel

from martlet.kernels.cuda import launch
from martlet.kernels.cuda.decode_attention import score_scale
from martlet.kernels.cuda.fp8 import in_units, log2_of
from martlet.kernels.cuda.launch import wait
from martlet.model.spec import Attention

QUERIES = 64  # tokens of a tile, in 16 bits
FRESH = 2048  # a whole prompt of at least this many tokens goes to cuDNN, which is faster on long sequences
FRESH_STEP = 1024  # cuDNN builds a plan, for 70 ms, for every length that it has not met: lengths are multiples of this


def takes_fresh(spec: Attention) -> bool:
    """Whether `fresh_attention` can run this (in 16 bits, on a GPU): no window or cap, and a head size cuDNN has."""
    return spec.window is None and spec.softcap is None and spec.head_dim % 8 == 0 and spec.head_dim <= 128


def queries_for(dtype: torch.dtype) -> int:
    """Tokens of a tile. float32, which is for comparing with the reference, has no tensor cores to fill."""
    return QUERIES if dtype.itemsize == 2 else 32


def tiles(start: np.ndarray, count: np.ndarray, queries: int) -> np.ndarray:
    """(sequence, first token within its count) of each tile, int32 [2, tiles], those with most keys first."""
    pieces = -(-count // queries)
    sequence = np.repeat(np.arange(len(count)), pieces)
    first = (np.arange(len(sequence)) - np.repeat(np.cumsum(pieces) - pieces, pieces)) * queries
    order = np.argsort(-(start[sequence] + first), kind="stable")
    return np.stack([sequence[order], first[order]]).astype(np.int32)


@triton.jit(do_not_specialize_on_alignment=["tile_list", "sequences"], do_not_specialize=["num_tiles", "num_sequences"])
def _attend(
    q, k_cache, v_cache, k_scales, v_scales, block_table, tile_list, sequences, out,
    scale, q_stride, block_stride, cache_stride, num_tiles, num_sequences,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, DIM: tl.constexpr, WINDOW: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, STAGES: tl.constexpr,
    SCALED: tl.constexpr, CAP: tl.constexpr, PRECISION: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    tile = tl.program_id(1)
    head = tl.program_id(0)
    sequence = tl.load(tile_list + tile)
    first = tl.load(tile_list + num_tiles + tile)
    row = tl.load(sequences + sequence)
    start = tl.load(sequences + num_sequences + sequence)
    count = tl.load(sequences + 2 * num_sequences + sequence)
    offset = tl.load(sequences + 3 * num_sequences + sequence)
    wait(PDL)
    m = first + tl.arange(0, BLOCK_M)
    d = tl.arange(0, BLOCK_D)
    here = (m < count)[:, None] & (d < DIM)[None, :]
    token = (offset + m).to(tl.int64)[:, None]
    query = tl.load(q + token * q_stride + head * DIM + d[None, :], mask=here, other=0.0)
    if SCALED:
        query, unit = in_units(query)
        factor = unit[:, None] * scale
    position = start + m
    begin = tl.maximum(start + first - (WINDOW - 1), 0) // BLOCK_N * BLOCK_N if WINDOW > 0 else 0
    end = tl.where(first < count, start + tl.minimum(first + BLOCK_M, count), 0)
    table = block_table + row.to(tl.int64) * block_stride
    kv_head = head // (HEADS // KV_HEADS)
    best = tl.full([BLOCK_M], -1e30, tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    t = tl.arange(0, BLOCK_N)
    for key_first in tl.range(begin, end, BLOCK_N, num_stages=STAGES):
        at = key_first + t
        inside = at < end
        block = tl.load(table + at // BLOCK_SIZE, mask=inside, other=0).to(tl.int64)
        slot = block * cache_stride + kv_head * BLOCK_SIZE * DIM + (at % BLOCK_SIZE) * DIM
        mask = inside[:, None] & (d < DIM)[None, :]
        key = tl.load(k_cache + slot[:, None] + d[None, :], mask=mask, other=0.0)
        if SCALED:
            beside = block * (KV_HEADS * BLOCK_SIZE) + kv_head * BLOCK_SIZE + at % BLOCK_SIZE
            key_scale = tl.load(k_scales + beside, mask=inside, other=0.0)
            scores = tl.dot(query, key.to(query.dtype).T, input_precision=PRECISION) * factor * key_scale[None, :]
        else:
            scores = tl.dot(query, key.T, input_precision=PRECISION) * scale
        if CAP > 0:
            scores = CAP * (2.0 * tl.sigmoid(2.0 * scores) - 1.0)
        if SCALED:  # as in decode attention
            size = log2_of(tl.load(v_scales + beside, mask=inside, other=1.0))
            scores += size[None, :]
        seen = at[None, :] <= position[:, None]
        if WINDOW > 0:
            seen &= at[None, :] > position[:, None] - WINDOW
        scores = tl.where(seen, scores, -1e30)
        top = tl.maximum(best, tl.max(scores, 1))
        weight = tl.where(seen, tl.exp2(scores - top[:, None]), 0.0) if WINDOW > 0 else tl.exp2(scores - top[:, None])
        fade = tl.exp2(best - top)
        best = top
        total = total * fade + tl.sum(weight * tl.exp2(-size)[None, :] if SCALED else weight, 1)
        value = tl.load(v_cache + slot[:, None] + d[None, :], mask=mask, other=0.0)
        kind: tl.constexpr = query.dtype if SCALED else value.dtype
        acc = tl.dot(weight.to(kind), value.to(kind), acc * fade[:, None], input_precision=PRECISION)
    place = out + token * (HEADS * DIM) + head * DIM + d[None, :]
    tl.store(place, (acc / total[:, None]).to(out.dtype.element_ty), mask=here)


def prefill_attention(
    q: torch.Tensor,
    cache: torch.Tensor,
    block_table: torch.Tensor,
    tile_list: torch.Tensor,
    sequences: torch.Tensor,
    spec: Attention,
    out: torch.Tensor,
    *,
    scales: torch.Tensor | None = None,
    block_m: int | None = None,
    block_n: int | None = None,
    warps: int = 4,
    stages: int | None = None,
) -> torch.Tensor:
    """Attention of the tokens of `sequences` over the cache, which holds their keys already; written to `out`.

    q [T, H, D], the heads of a token together; out [T, H * D]; cache [2, blocks, K, block_size, D]; block_table int32
    [rows, P]; tile_list int32 [2, tiles] from `tiles`, cut in block_m queries, and any that begin past their sequence's
    end; sequences int32 [4, B]: row, start, count, and where the sequence's tokens begin in q. scales: as in
    `rotary.rotate_and_write`.
    """
    block_m = block_m or queries_for(q.dtype)
    # measured on an H200: e4m3 passes through registers before it is multiplied, and loads ahead gain nothing
    block_n = block_n or (64 if scales is None else 128)
    stages = stages or (3 if scales is None else 1)
    if q.dtype == torch.float32:
        block_n, warps = min(block_n, 32), 4
    bytes_a_row = 2 * triton.next_power_of_2(spec.head_dim) * q.element_size()
    while block_n * bytes_a_row * stages + block_m * bytes_a_row // 2 > 200 << 10 and block_n > 16:
        block_n //= 2  # keys and values of all stages, and the queries, share 227 KiB
    num_tiles = tile_list.shape[1]
    factor, cap = score_scale(spec)
    launch.run(
        _attend, (spec.heads, num_tiles),
        q, *cache, *(cache if scales is None else scales), block_table, tile_list, sequences, out,
        factor, q.stride(0), block_table.stride(0), cache.stride(1), num_tiles, sequences.shape[1],
        HEADS=spec.heads, KV_HEADS=spec.kv_heads, DIM=spec.head_dim, WINDOW=spec.window or 0, BLOCK_SIZE=cache.shape[3],
        BLOCK_M=block_m, BLOCK_N=block_n, BLOCK_D=triton.next_power_of_2(spec.head_dim), STAGES=stages,
        SCALED=scales is not None, CAP=cap, PRECISION="ieee" if q.dtype == torch.float32 else "tf32",
        warps=warps, stages=stages,
    )  # fmt: skip
    return out


def fresh_attention(qkv: torch.Tensor, count: int, spec: Attention) -> torch.Tensor:
    """Causal attention of one whole prompt with no window, by cuDNN -> [count, H * D].

    qkv [L, (H + 2 K) * D], rotated, the prompt in its first `count` rows, L a multiple of FRESH_STEP. What lies behind
    the prompt is never seen, but must be finite.
    """
    heads = qkv.view(len(qkv), -1, spec.head_dim).transpose(0, 1)[None]
    q, k, v = heads.split([spec.heads, spec.kv_heads, spec.kv_heads], 1)
    with sdpa_kernel([SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION], set_priority=True):
        result = torch.nn.functional.scaled_dot_product_attention(
            q, k, v, is_causal=True, scale=spec.scale, enable_gqa=True
        )
    return result[0, :, :count].transpose(0, 1).reshape(count, -1)
