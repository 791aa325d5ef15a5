"""Decoding on Hopper: rotation, the write of keys and values, and attention, in one kernel that reads from its start.

A program takes a sequence and a key head with all its query heads. Before it waits for its predecessor, the product
that makes queries, keys and values, it asks for as many pages as its ring in shared memory holds, so memory reads on
while that product ends. Then it norms and rotates its heads, writes the new key and value and goes through the context,
64 tokens' keys and their values in turn. A warp group multiplies 64 rows at least but as few as 8 columns: tokens and
elements of a head are the rows, queries the columns.

Asked for early is what no kernel of the step writes: the step's own token is in the last tile, which is asked for after
the wait. Block tables are read early as well: nothing overlaps the kernel that writes them (the decoder's first norm).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, warpgroup_mma, warpgroup_mma_wait
from triton.language.extra import cuda as tl_cuda

from martlet.kernels.cuda import decode_attention, launch
from martlet.kernels.cuda.layers import parts_of, sum_of_parts
from martlet.model.spec import Attention

TILE = gl.constexpr(64)  # tokens
WARPS = 4
SHARED = 228 << 10  # bytes of a multiprocessor, of which each program takes 1 KB more than it asks for


@gluon.jit
def _blocks(table, first, count, tile, t, PAGE: gl.constexpr):
    """Blocks of the tokens of a tile, of the sequence's `count` from entry `first` of its table on."""
    page = tile * (TILE // PAGE) + t // PAGE
    return gl.load(table + first + page, mask=page < count, other=0)


@gluon.jit
def _ask(cache, ring, slot, blocks, tile, t, d, tokens, head, KV_HEADS: gl.constexpr, DIM: gl.constexpr,
         PAGE: gl.constexpr):  # fmt: skip
    """Keys or values of a tile into `slot`, zeros behind the sequence's `tokens`."""
    line = (blocks * KV_HEADS + head) * PAGE + t % PAGE
    places = cache + line.to(gl.int64)[:, None] * DIM + d[None, :]
    inside = tile * TILE + t < tokens
    async_copy.async_copy_global_to_shared(ring.index(slot), places, mask=inside[:, None] & (d < DIM)[None, :])
    async_copy.commit_group()


@gluon.jit(do_not_specialize_on_alignment=["rows", "positions"])
def _step(
    qkv, norms, rotation, rows, positions, block_table, k_cache, out, eps, scale, part_stride, block_stride,
    value_stride,
    HEADS: gl.constexpr, KV_HEADS: gl.constexpr, DIM: gl.constexpr, WINDOW: gl.constexpr, PAGE: gl.constexpr,
    N: gl.constexpr, SLOTS: gl.constexpr, CAP: gl.constexpr, NORM: gl.constexpr, PARTS: gl.constexpr,
    PDL: gl.constexpr, num_warps: gl.constexpr,
):  # fmt: skip
    GROUP: gl.constexpr = HEADS // KV_HEADS
    HALF: gl.constexpr = DIM // 2
    AHEAD: gl.constexpr = SLOTS // 2
    shared: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
    mma: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [num_warps, 1], [16, N, 16])
    wide: gl.constexpr = gl.BlockedLayout([1, 8], [256 // DIM, DIM // 8], [num_warps, 1], [1, 0])
    pairs: gl.constexpr = gl.BlockedLayout([1, 4], [256 // DIM, DIM // 8], [num_warps, 1], [1, 0])
    head = gl.program_id(0)
    b = gl.program_id(1)
    row = gl.load(rows + b)
    position = gl.load(positions + b)
    length = gl.where(row >= 0, position + 1, 0)
    begin = gl.maximum(length - WINDOW, 0) if WINDOW > 0 else 0
    first = begin // PAGE
    tokens = length - first * PAGE
    tiles = (tokens + TILE - 1) // TILE
    count = (tokens + PAGE - 1) // PAGE
    ring = gl.allocate_shared_memory(gl.bfloat16, [SLOTS, TILE, DIM], shared)
    v_cache = k_cache + value_stride
    q_smem = gl.allocate_shared_memory(gl.bfloat16, [N, DIM], shared)
    p_smem = gl.allocate_shared_memory(gl.bfloat16, [N, TILE], shared)
    table = block_table + row.to(gl.int64) * block_stride
    t = gl.arange(0, TILE, gl.SliceLayout(1, wide))
    d = gl.arange(0, DIM, gl.SliceLayout(0, wide))
    if PDL:
        tl_cuda.gdc_launch_dependents()
    for unit in gl.static_range(SLOTS):  # keys and values in turn
        if unit // 2 < tiles - 1:
            blocks = _blocks(table, first, count, unit // 2, t, PAGE)
            _ask(
                v_cache if unit % 2 else k_cache, ring, unit, blocks, unit // 2, t, d, tokens, head,
                KV_HEADS, DIM, PAGE,
            )  # fmt: skip
    # The heads of this program: its queries, the key (row GROUP) and the value (GROUP + 1) of the new token.
    g = gl.arange(0, N, gl.SliceLayout(1, pairs))[:, None]
    pair = gl.arange(0, HALF, gl.SliceLayout(0, pairs))[None, :]
    here = (g < GROUP + 2) & (pair < HALF) & (length > 0)
    turned = here & (g <= GROUP)
    line = gl.where(g < GROUP, head * GROUP + g, HEADS + head + (g - GROUP) * KV_HEADS) * DIM
    cos = gl.load(rotation + position * DIM + pair)
    sin = gl.load(rotation + position * DIM + HALF + pair)
    if NORM:
        gain = gl.load(norms + line + pair, mask=turned, other=0.0)
        gain_two = gl.load(norms + line + HALF + pair, mask=turned, other=0.0)
    newest = gl.load(table + position // PAGE, mask=length > 0, other=0)
    if PDL:
        tl_cuda.gdc_wait()
    line = qkv + b.to(gl.int64) * ((HEADS + 2 * KV_HEADS) * DIM) + line
    x = sum_of_parts(line + pair, part_stride, here, PARTS)
    y = sum_of_parts(line + HALF + pair, part_stride, here, PARTS)
    if NORM:
        root = 1.0 / gl.sqrt(gl.sum(x * x + y * y, 1) / DIM + eps)[:, None]
        x = gl.where(turned, x * root * gain, x)
        y = gl.where(turned, y * root * gain_two, y)
    one = gl.where(turned, x * cos - y * sin, x).to(gl.bfloat16)
    two = gl.where(turned, y * cos + x * sin, y).to(gl.bfloat16)
    place = ((newest * KV_HEADS + head) * PAGE + position % PAGE).to(gl.int64) * DIM
    kept = k_cache + place + (g - GROUP).to(gl.int64) * value_stride + pair
    gl.store(kept, one, mask=here & (g >= GROUP))
    gl.store(kept + HALF, two, mask=here & (g >= GROUP))
    q_smem.store(gl.join(one, two).permute((0, 2, 1)).reshape((N, DIM)))
    gl.thread_barrier()  # threads read what others have stored
    for unit in gl.static_range(SLOTS):
        if unit // 2 >= tiles - 1:
            blocks = _blocks(table, first, count, unit // 2, t, PAGE)
            _ask(
                v_cache if unit % 2 else k_cache, ring, unit, blocks, unit // 2, t, d, tokens, head,
                KV_HEADS, DIM, PAGE,
            )  # fmt: skip
    blocks = _blocks(table, first, count, AHEAD, t, PAGE)
    following = _blocks(table, first, count, AHEAD + 1, t, PAGE)
    best = gl.full([N], float("-inf"), gl.float32, gl.SliceLayout(0, mma))
    weights = gl.zeros([TILE, N], gl.float32, mma)
    acc = gl.zeros([DIM, N], gl.float32, mma)
    nothing = gl.zeros([TILE, N], gl.float32, mma)
    token = gl.arange(0, TILE, gl.SliceLayout(1, mma)) + first * PAGE
    slot = 0
    for tile in range(tiles):
        async_copy.wait_group(SLOTS - 1)
        fence_async_shared()
        scores = warpgroup_mma(ring.index(slot), q_smem.permute((1, 0)), nothing, use_acc=False, is_async=True)
        scores = warpgroup_mma_wait(0, deps=(scores,)) * scale
        if CAP > 0:
            scores = CAP * (2.0 / (1.0 + gl.exp2(scores * -2.8853900817779268)) - 1.0)  # 2 / ln 2: tanh
        at = tile * TILE + token
        scores = gl.where(((at >= begin) & (at < length))[:, None], scores, float("-inf"))
        top = gl.maximum(best, gl.max(scores, 0))
        _ask(
            v_cache if SLOTS % 2 else k_cache, ring, slot, blocks, tile + AHEAD, t, d, tokens, head,
            KV_HEADS, DIM, PAGE,
        )  # fmt: skip
        slot = gl.where(slot == SLOTS - 1, 0, slot + 1)
        weight = gl.exp2(scores - top[None, :])
        fade = gl.exp2(best - top)
        best = top
        weights = weights * fade[None, :] + weight
        p_smem.permute((1, 0)).store(weight.to(gl.bfloat16))
        async_copy.wait_group(SLOTS - 1)
        fence_async_shared()
        value = ring.index(slot).permute((1, 0))
        acc = warpgroup_mma(value, p_smem.permute((1, 0)), acc * fade[None, :], is_async=True)
        acc = warpgroup_mma_wait(0, deps=(acc,))
        if SLOTS % 2:
            _ask(k_cache, ring, slot, following, tile + AHEAD + 1, t, d, tokens, head, KV_HEADS, DIM, PAGE)
        else:
            _ask(v_cache, ring, slot, blocks, tile + AHEAD, t, d, tokens, head, KV_HEADS, DIM, PAGE)
        slot = gl.where(slot == SLOTS - 1, 0, slot + 1)
        blocks = following
        following = _blocks(table, first, count, tile + AHEAD + 2, t, PAGE)
    async_copy.wait_group(0)
    if tiles > 0:
        stored: gl.constexpr = gl.BlockedLayout([8, 1], [DIM // 8, 256 // DIM], [1, num_warps], [0, 1])
        result = gl.convert_layout((acc / gl.sum(weights, 0)[None, :]).to(gl.bfloat16), stored)
        query = gl.arange(0, N, gl.SliceLayout(0, stored))[None, :]
        where = (head * GROUP + query) * DIM + gl.arange(0, DIM, gl.SliceLayout(1, stored))[:, None]
        gl.store(out + b.to(gl.int64) * (HEADS * DIM) + where, result, mask=query < GROUP)


def able(batch: int, spec: Attention, cache: torch.Tensor, scales: torch.Tensor | None) -> bool:
    """Whether `attend` can do a step of so many rows, and is the faster way."""
    return (
        launch.has_wgmma() and cache.dtype == torch.bfloat16 and scales is None and spec.head_dim in (64, 128, 256)
        and spec.rope.dim == spec.head_dim and spec.rope.style != "interleaved" and cache.shape[3] in (8, 16, 32, 64)
        and spec.heads <= 30 * spec.kv_heads and decode_attention.tile_for(batch, spec).parts == 1
    )  # fmt: skip


def sizes(batches: Sequence[int], spec: Attention) -> list[int]:
    """One of ascending `batches` for each kernel that `attend` has for them."""
    return list({slots_for(batch, spec): batch for batch in batches}.values()) if launch.has_wgmma() else []


def slots_for(batch: int, spec: Attention) -> int:
    """Slots of a ring, each 64 tokens' keys or values of a head: what fits where programs are spread evenly."""
    programs = min(4, triton.cdiv(batch * spec.kv_heads, launch.num_sms()))
    others = 2 * _columns(spec) * (spec.head_dim + TILE.value) + (2 << 10)  # queries and weights; sums, and reserved
    return max(3, min(8, (SHARED // programs - others) // (2 * TILE.value * spec.head_dim)))


def _columns(spec: Attention) -> int:
    """Of the multiplier: a program's queries, and room for the new key and value, which are rotated with them."""
    return max(8, triton.next_power_of_2(spec.heads // spec.kv_heads + 2))


def attend(
    qkv: torch.Tensor,
    norms: torch.Tensor | None,
    eps: float,
    table: torch.Tensor,
    rows: torch.Tensor,
    positions: torch.Tensor,
    block_table: torch.Tensor,
    cache: torch.Tensor,
    spec: Attention,
    slots: int | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """`rotary.rotate_and_write` of tokens positions[b] of rows[b], then their attention -> [B, H * D] in bfloat16.

    qkv [B, (H + 2 K) * D] or parts of it [P, B, ...], to be summed; the others as there. Row -1: left undefined.
    out [B, H * D]: where it goes, if not to a tensor of its own.
    """
    batch = len(rows)
    out = cache.new_empty(batch, spec.q_size) if out is None else out
    scale, cap = decode_attention.score_scale(spec)
    launch.run(
        _step, (spec.kv_heads, batch),
        qkv, table if norms is None else norms, table, rows, positions, block_table, cache, out, eps, scale,
        qkv.stride(0) if qkv.dim() == 3 else 0, block_table.stride(0), cache.stride(0),
        HEADS=spec.heads, KV_HEADS=spec.kv_heads, DIM=spec.head_dim, WINDOW=spec.window or 0, PAGE=cache.shape[3],
        N=_columns(spec), SLOTS=slots or slots_for(batch, spec), CAP=cap,
        NORM=norms is not None, PARTS=parts_of(qkv), warps=WARPS,
    )  # fmt: skip
    return out
