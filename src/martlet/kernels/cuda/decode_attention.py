"""Paged attention for one new token a sequence: split over the context, heads that share keys together.

Reading keys and values is all that this does, so the grid must keep every multiprocessor reading. A program takes one
sequence, one kv head with all its query heads (so keys are read once), and one part of the context. The last program
of a sequence and head to finish joins the parts; a counter tells it that it is the last, and it sets the counter back,
so one launch does all and a CUDA graph can repeat it. The grid depends on the batch size alone, never on lengths.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from martlet.kernels.cuda import launch
from martlet.kernels.cuda.fp8 import in_units, log2_of, unpacked
from martlet.kernels.cuda.launch import wait
from martlet.model.spec import Attention

MAX_PARTS = 64
JOINED = 4096  # numbers of partial results a program joins at a time
LOG2E = 1.4426950408889634


@triton.jit
def _join(partial, sums, out, start, working, GROUP: tl.constexpr, GROUP_UP: tl.constexpr, DIM: tl.constexpr,
          BLOCK_D: tl.constexpr, MOST: tl.constexpr, AT_ONCE: tl.constexpr):  # fmt: skip
    """The weighted mean of `working` parts, GROUP rows each from row `start` on, into GROUP rows of out."""
    g = tl.arange(0, GROUP_UP)
    d = tl.arange(0, BLOCK_D)
    part = tl.arange(0, MOST)
    row = start + part[:, None] * GROUP + g[None, :]
    here = (part < working)[:, None] & (g < GROUP)[None, :]
    best = tl.load(sums + row * 2, mask=here, other=float("-inf"), cache_modifier=".cg")
    top = tl.where(g < GROUP, tl.max(best, 0), 0.0)
    weight = tl.exp2(best - top[None, :])
    total = tl.sum(weight * tl.load(sums + row * 2 + 1, mask=here, other=0.0, cache_modifier=".cg"), 0)
    acc = tl.zeros([AT_ONCE, GROUP_UP, BLOCK_D], tl.float32)
    for first in range(0, working, AT_ONCE):
        some = first + tl.arange(0, AT_ONCE)
        there = start + some[:, None] * GROUP + g[None, :]
        ours = (some < working)[:, None] & (g < GROUP)[None, :]
        faded = tl.exp2(tl.load(sums + there * 2, mask=ours, other=float("-inf"), cache_modifier=".cg") - top[None, :])
        means = tl.load(partial + there[:, :, None] * DIM + d[None, None, :],
                        mask=ours[:, :, None] & (d < DIM)[None, None, :], other=0.0, cache_modifier=".cg")  # fmt: skip
        acc += means * faded[:, :, None]
    mean = tl.sum(acc, 0) / tl.where(g < GROUP, total, 1.0)[:, None]
    mask = (g < GROUP)[:, None] & (d < DIM)[None, :]
    tl.store(out + g[:, None] * DIM + d[None, :], mean.to(out.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize_on_alignment=["rows", "positions"], do_not_specialize=["PARTS"])
def _attend(
    q, k_cache, v_cache, k_scales, v_scales, block_table, rows, positions, out, partial, sums, counters,
    scale, q_stride, block_stride, PARTS,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, DIM: tl.constexpr, WINDOW: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    BLOCK_G: tl.constexpr, GROUP_UP: tl.constexpr, BLOCK_D: tl.constexpr, TILE: tl.constexpr, STAGES: tl.constexpr,
    SPLIT: tl.constexpr, MOST: tl.constexpr, AT_ONCE: tl.constexpr, SCALED: tl.constexpr, CAP: tl.constexpr,
    PRECISION: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    GROUP: tl.constexpr = HEADS // KV_HEADS
    head = tl.program_id(0)
    b = tl.program_id(1)
    part = tl.program_id(2)
    row = tl.load(rows + b)
    length = tl.where(row >= 0, tl.load(positions + b) + 1, 0)
    begin = tl.maximum(length - WINDOW, 0) if WINDOW > 0 else 0
    share = tl.cdiv(tl.cdiv(length - begin, PARTS), TILE) * TILE
    low = begin + part * share
    high = tl.minimum(low + share, length)
    wait(PDL)
    if low < high:
        g = tl.arange(0, BLOCK_G)
        d = tl.arange(0, BLOCK_D)
        here = (g < GROUP)[:, None] & (d < DIM)[None, :]
        heads = (head * GROUP + g)[:, None] * DIM + d[None, :]
        query = tl.load(q + b.to(tl.int64) * q_stride + heads, mask=here, other=0.0)
        if SCALED:
            # Two neighbours of a head are one number of 16 bits, so memory moves as it does for bfloat16: `e` counts
            # these, and whatever has heads in it comes in two halves, even and odd elements.
            e = tl.arange(0, BLOCK_D // 2)
            query, unit = in_units(query)
            factor = unit * scale
            query_even, query_odd = tl.split(query.reshape(BLOCK_G, BLOCK_D // 2, 2))
            acc_even = tl.zeros([BLOCK_G, BLOCK_D // 2], tl.float32)
            acc_odd = tl.zeros([BLOCK_G, BLOCK_D // 2], tl.float32)
        mine = out + b.to(tl.int64) * HEADS * DIM
        table = block_table + row.to(tl.int64) * block_stride
        best = tl.full([BLOCK_G], float("-inf"), tl.float32)
        weights = tl.zeros([BLOCK_G, TILE], tl.float32)  # summed over tokens at the end: a sum in the loop is a barrier
        acc = tl.zeros([BLOCK_G, BLOCK_D], tl.float32)
        t = tl.arange(0, TILE)
        for first in tl.range(low, high, TILE, num_stages=STAGES):
            at = first + t
            inside = at < high
            block = tl.load(table + at // BLOCK_SIZE, mask=inside, other=0)
            place = (block * KV_HEADS + head) * BLOCK_SIZE + at % BLOCK_SIZE
            token = place.to(tl.int64) * (DIM // 2 if SCALED else DIM)
            if SCALED:
                mask = inside[:, None] & (e < DIM // 2)[None, :]
                even, odd = unpacked(tl.load(k_cache + token[:, None] + e[None, :], mask=mask, other=0))
                key_scale = tl.load(k_scales + place, mask=inside, other=0.0)
                scores = tl.dot(query_even, even.to(query.dtype).T, input_precision=PRECISION)
                scores = tl.dot(query_odd, odd.to(query.dtype).T, scores, input_precision=PRECISION)
                scores *= factor[:, None] * key_scale[None, :]
            else:
                mask = inside[:, None] & (d < DIM)[None, :]
                key = tl.load(k_cache + token[:, None] + d[None, :], mask=mask, other=0.0)
                scores = tl.dot(query, key.T, input_precision=PRECISION) * scale
            if CAP > 0:
                scores = CAP * (2.0 * tl.sigmoid(2.0 * scores) - 1.0)
            if SCALED:
                # A value's scale stands in the exponent: weights stay below 1, as float16 needs, whatever the scales.
                size = log2_of(tl.load(v_scales + place, mask=inside, other=1.0))
                scores += size[None, :]
            scores = tl.where(inside[None, :], scores, float("-inf"))
            top = tl.maximum(best, tl.max(scores, 1))
            weight = tl.exp2(scores - top[:, None])
            fade = tl.exp2(best - top)
            best = top
            if SCALED:
                weights = weights * fade[:, None] + weight * tl.exp2(-size)[None, :]
                even, odd = unpacked(tl.load(v_cache + token[:, None] + e[None, :], mask=mask, other=0))
                weight = weight.to(query.dtype)
                acc_even = tl.dot(weight, even.to(query.dtype), acc_even * fade[:, None], input_precision=PRECISION)
                acc_odd = tl.dot(weight, odd.to(query.dtype), acc_odd * fade[:, None], input_precision=PRECISION)
            else:
                weights = weights * fade[:, None] + weight
                value = tl.load(v_cache + token[:, None] + d[None, :], mask=mask, other=0.0)
                acc = tl.dot(weight.to(value.dtype), value, acc * fade[:, None], input_precision=PRECISION)
        total = tl.sum(weights, 1)
        if SCALED:
            acc = tl.join(acc_even, acc_odd).reshape(BLOCK_G, BLOCK_D)
        if SPLIT:
            # Each part leaves its sum, weighted by exp2 of its scores less their maximum, and that sum's weight.
            slot = ((b * KV_HEADS + head) * PARTS + part).to(tl.int64) * GROUP + g
            tl.store(partial + slot[:, None] * DIM + d[None, :], acc, mask=here)
            tl.store(sums + slot * 2, best, mask=g < GROUP)
            tl.store(sums + slot * 2 + 1, total, mask=g < GROUP)
            tl.debug_barrier()  # the atomic is one thread's: it publishes what all threads have stored by now
            working = tl.cdiv(length - begin, share)
            done = tl.atomic_add(counters + b * KV_HEADS + head, 1, sem="acq_rel")
            if done == working - 1:
                tl.store(counters + b * KV_HEADS + head, 0)
                start = ((b * KV_HEADS + head) * PARTS).to(tl.int64) * GROUP
                _join(partial, sums, mine + head * GROUP * DIM, start, working, GROUP, GROUP_UP, DIM, BLOCK_D, MOST,
                      AT_ONCE)  # fmt: skip
        else:
            tl.store(mine + heads, (acc / total[:, None]).to(out.dtype.element_ty), mask=here)


def score_scale(spec: Attention) -> tuple[float, float]:
    """(factor, cap): exponents to base 2 are products times `factor`, or cap * tanh(products times `factor`).

    cap is 0 where there is no soft cap.
    """
    if spec.softcap is None:
        return spec.scale * LOG2E, 0.0
    return spec.scale / spec.softcap, spec.softcap * LOG2E


@dataclass(frozen=True, slots=True)
class Tile:
    """tokens: context tokens a program takes at once. parts: of a sequence's context, one program each."""

    tokens: int
    parts: int
    warps: int
    stages: int


def tile_for(batch: int, spec: Attention, *, fp8: bool = False) -> Tile:
    """The fastest tile of those measured on an H200. Joining parts costs as much as reading some hundred tokens."""
    programs, sms = batch * spec.kv_heads, launch.num_sms()
    if programs >= 8 * sms and not fp8 and spec.head_dim <= 128 and spec.heads <= 16 * spec.kv_heads:
        return Tile(tokens=128, parts=1, warps=4, stages=3)
    if programs >= 2 * sms:
        return Tile(tokens=64, parts=1, warps=2, stages=5 if fp8 else 4)
    if 4 * programs > sms:
        return Tile(tokens=64, parts=max(1, sms // programs), warps=2, stages=5)
    return Tile(tokens=64, parts=min(MAX_PARTS, triton.cdiv(4 * sms, programs)), warps=2, stages=1)


@dataclass(frozen=True, slots=True)
class Scratch:
    """Where parts are left. partial, sums float32; counters int32, zero between steps."""

    partial: torch.Tensor
    sums: torch.Tensor
    counters: torch.Tensor


def scratch(specs: list[Attention], device: torch.device) -> Scratch:
    """Room for every layer of a decoder and every batch; layers use it one after another."""
    rows = counters = 1
    for spec in specs:
        for batch in range(1, 2 * launch.num_sms() // spec.kv_heads + 1):  # larger ones are not split
            rows = max(rows, tile_for(batch, spec).parts * batch * spec.heads)
            counters = max(counters, batch * spec.kv_heads)
    dim = max(spec.head_dim for spec in specs)
    return Scratch(
        partial=torch.empty(rows * dim, dtype=torch.float32, device=device),
        sums=torch.empty(rows * 2, dtype=torch.float32, device=device),
        counters=torch.zeros(counters, dtype=torch.int32, device=device),
    )


def decode_attention(
    q: torch.Tensor,
    cache: torch.Tensor,
    block_table: torch.Tensor,
    rows: torch.Tensor,
    positions: torch.Tensor,
    spec: Attention,
    room: Scratch,
    *,
    scales: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
    tile: Tile | None = None,
) -> torch.Tensor:
    """Attention of q [B, H, D], token positions[b] of rows[b], over the cache -> [B, H * D]. Row -1: left undefined.

    The heads of a token lie together in q; tokens may lie apart.
    cache [2, blocks, K, block_size, D], contiguous; block_table int32 [rows, P]; rows, positions int32 [B].
    scales: as in `rotary.rotate_and_write`; a key's is applied to its scores, a value's to its weight. No kernel of the
    same step may write rows or positions.
    """
    batch, block_d = len(q), max(16 if scales is None else 32, triton.next_power_of_2(spec.head_dim))
    kept = cache if scales is None else cache.view(torch.int16)
    tile = tile or tile_for(batch, spec, fp8=scales is not None)
    # float32 is for comparing with the reference; without tensor cores large tiles only spill
    tokens = 16 if q.dtype == torch.float32 else tile.tokens
    stages = min(
        tile.stages, max(1, (200 << 10) // (2 * tokens * block_d * cache.element_size()))
    )  # they share 227 KiB
    out = q.new_empty(batch, spec.q_size) if out is None else out
    group = spec.heads // spec.kv_heads
    group_up = triton.next_power_of_2(group)
    factor, cap = score_scale(spec)
    launch.run(
        _attend, (spec.kv_heads, batch, tile.parts),
        q, *kept, *(cache if scales is None else scales), block_table, rows, positions,
        out, room.partial, room.sums, room.counters,
        factor, q.stride(0), block_table.stride(0), tile.parts,
        HEADS=spec.heads, KV_HEADS=spec.kv_heads, DIM=spec.head_dim, WINDOW=spec.window or 0, BLOCK_SIZE=cache.shape[3],
        BLOCK_G=max(16, group_up), GROUP_UP=group_up, BLOCK_D=block_d, TILE=tokens, STAGES=stages,
        SCALED=scales is not None, SPLIT=tile.parts > 1, MOST=MAX_PARTS, AT_ONCE=max(1, JOINED // (group_up * block_d)),
        CAP=cap, PRECISION="ieee" if q.dtype == torch.float32 else "tf32",
        warps=tile.warps, stages=stages,
    )  # fmt: skip
    return out
