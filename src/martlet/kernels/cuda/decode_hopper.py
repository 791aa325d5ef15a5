"""Decoding on Hopper: rotation, the write of keys and values, and attention, in one kernel that reads from its start.

A program takes a sequence and a key head with all its query heads. Before it waits for its predecessor, the product
that makes queries, keys and values, it asks for as many pages as its ring in shared memory holds, so memory reads on
while that product ends. Then it norms and rotates its heads, writes the new key and value and goes through the context,
64 tokens' keys and their values in turn. A warp group multiplies 64 rows at least but as few as 8 columns: tokens and
elements of a head are the rows, queries the columns.

FP8 keys and values are copied as they are, two neighbours of a head as one number of 16 bits, and become float16 in
registers, from where a warp group takes its rows as well. Even and odd elements are then two matrices.

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
from martlet.kernels.cuda.fp8 import log2_of, to_three_bits, unpacked
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
def _ask(cache, ring, slot, blocks, tile, t, d, tokens, head, KV_HEADS: gl.constexpr, WIDTH: gl.constexpr,
         PAGE: gl.constexpr):  # fmt: skip
    """Keys or values of a tile into `slot`, zeros behind the sequence's `tokens`. WIDTH numbers a token and head."""
    line = (blocks * KV_HEADS + head) * PAGE + t % PAGE
    places = cache + line.to(gl.int64)[:, None] * WIDTH + d[None, :]
    inside = tile * TILE + t < tokens
    async_copy.async_copy_global_to_shared(ring.index(slot), places, mask=inside[:, None] & (d < WIDTH)[None, :])
    async_copy.commit_group()


@gluon.jit
def _ask_scales(scales, ring, slot, blocks, tile, t, tokens, head, KV_HEADS: gl.constexpr, PAGE: gl.constexpr):
    """As `_ask`, of scales. They count as part of what is asked for next."""
    line = (blocks * KV_HEADS + head) * PAGE + t % PAGE
    async_copy.async_copy_global_to_shared(ring.index(slot), scales + line, mask=tile * TILE + t < tokens)


@gluon.jit
def _fill(
    ring, scale_ring, pages, v_pages, scales, v_scales, table, first, count, tokens, tiles, head, t, d, line,
    KV_HEADS: gl.constexpr, WIDTH: gl.constexpr, PAGE: gl.constexpr, SLOTS: gl.constexpr, SCALED: gl.constexpr,
    EARLY: gl.constexpr,
):  # fmt: skip
    """Ask for keys and values of the first tiles: if EARLY for those before the last tile, else for what is left."""
    for tile in gl.static_range((SLOTS + 1) // 2):
        if (tile < tiles - 1) if EARLY else (tile >= tiles - 1):
            blocks = _blocks(table, first, count, tile, t, PAGE)
            if SCALED:
                line_blocks = _blocks(table, first, count, tile, line, PAGE)
                _ask_scales(scales, scale_ring, 2 * tile, line_blocks, tile, line, tokens, head, KV_HEADS, PAGE)
                _ask_scales(v_scales, scale_ring, 2 * tile + 1, line_blocks, tile, line, tokens, head, KV_HEADS, PAGE)
            _ask(pages, ring, 2 * tile, blocks, tile, t, d, tokens, head, KV_HEADS, WIDTH, PAGE)
            if 2 * tile + 1 < SLOTS:
                _ask(v_pages, ring, 2 * tile + 1, blocks, tile, t, d, tokens, head, KV_HEADS, WIDTH, PAGE)


@gluon.jit
def _halves(one, two, N: gl.constexpr, HALF: gl.constexpr):
    """Even and odd elements [N, HALF] of heads, from their first and their second halves."""
    even_one, odd_one = one.reshape((N, HALF // 2, 2)).split()
    even_two, odd_two = two.reshape((N, HALF // 2, 2)).split()
    even = gl.join(even_one, even_two).permute((0, 2, 1)).reshape((N, HALF))
    return even, gl.join(odd_one, odd_two).permute((0, 2, 1)).reshape((N, HALF))


@gluon.jit
def _logits(scores, at, begin, length, CAP: gl.constexpr):
    """Exponents to base 2, minus infinity where the token is not seen."""
    if CAP > 0:
        scores = CAP * (2.0 / (1.0 + gl.exp2(scores * -2.8853900817779268)) - 1.0)  # 2 / ln 2: tanh
    return gl.where(((at >= begin) & (at < length))[:, None], scores, float("-inf"))


@gluon.jit
def _attend(
    ring, pages, v_pages, q_smem, table, first, count, tokens, tiles, begin, length, head, scale, t, d,
    KV_HEADS: gl.constexpr, DIM: gl.constexpr, PAGE: gl.constexpr, N: gl.constexpr, SLOTS: gl.constexpr,
    CAP: gl.constexpr, mma: gl.constexpr,
):  # fmt: skip
    """Of a context in bfloat16 -> mean of the values [DIM, N]."""
    AHEAD: gl.constexpr = SLOTS // 2
    p_smem = gl.allocate_shared_memory(gl.bfloat16, [N, TILE], gl.NVMMASharedLayout(128, 16, 2))
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
        query = q_smem.index(0).permute((1, 0))
        scores = warpgroup_mma(ring.index(slot), query, nothing, use_acc=False, is_async=True)
        scores = warpgroup_mma_wait(0, deps=(scores,)) * scale
        scores = _logits(scores, tile * TILE + token, begin, length, CAP)
        top = gl.maximum(best, gl.max(scores, 0))
        _ask(
            v_pages if SLOTS % 2 else pages, ring, slot, blocks, tile + AHEAD, t, d, tokens, head,
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
            _ask(pages, ring, slot, following, tile + AHEAD + 1, t, d, tokens, head, KV_HEADS, DIM, PAGE)
        else:
            _ask(v_pages, ring, slot, blocks, tile + AHEAD, t, d, tokens, head, KV_HEADS, DIM, PAGE)
        slot = gl.where(slot == SLOTS - 1, 0, slot + 1)
        blocks = following
        following = _blocks(table, first, count, tile + AHEAD + 2, t, PAGE)
    return acc / gl.sum(weights, 0)[None, :]


@gluon.jit
def _attend_fp8(
    ring, scale_ring, pages, v_pages, scales, v_scales, q_smem, table, first, count, tokens, tiles, begin, length,
    head, factor, t, d, line,
    KV_HEADS: gl.constexpr, DIM: gl.constexpr, PAGE: gl.constexpr, N: gl.constexpr, SLOTS: gl.constexpr,
    CAP: gl.constexpr, mma: gl.constexpr,
):  # fmt: skip
    """Of a context in FP8 -> mean of the values [DIM, N].

    A tile's keys and values leave the ring together, and the next ones are asked for at once. As in the other kernels,
    a value's scale stands in the exponent of its weight.
    """
    AHEAD: gl.constexpr = SLOTS // 2
    left: gl.constexpr = gl.DotOperandLayout(0, mma, 2)
    p_smem = gl.allocate_shared_memory(gl.float16, [N, TILE], gl.NVMMASharedLayout(128, 16, 2))
    best = gl.full([N], float("-inf"), gl.float32, gl.SliceLayout(0, mma))
    weights = gl.zeros([TILE, N], gl.float32, mma)
    acc_even = gl.zeros([DIM // 2, N], gl.float32, mma)
    acc_odd = gl.zeros([DIM // 2, N], gl.float32, mma)
    nothing = gl.zeros([TILE, N], gl.float32, mma)
    token = gl.arange(0, TILE, gl.SliceLayout(1, mma))
    blocks = _blocks(table, first, count, AHEAD, t, PAGE)
    line_blocks = _blocks(table, first, count, AHEAD, line, PAGE)
    slot = 0
    for tile in range(tiles):
        async_copy.wait_group(SLOTS - 2)
        keys = ring.index(slot).load(left)
        values = ring.index(slot + 1).permute((1, 0)).load(left)
        k_scale = scale_ring.index(slot).load(gl.SliceLayout(1, mma))
        v_scale = scale_ring.index(slot + 1).load(gl.SliceLayout(1, mma))
        ahead = tile + AHEAD
        _ask_scales(scales, scale_ring, slot, line_blocks, ahead, line, tokens, head, KV_HEADS, PAGE)
        _ask(pages, ring, slot, blocks, ahead, t, d, tokens, head, KV_HEADS, DIM // 2, PAGE)
        _ask_scales(v_scales, scale_ring, slot + 1, line_blocks, ahead, line, tokens, head, KV_HEADS, PAGE)
        _ask(v_pages, ring, slot + 1, blocks, ahead, t, d, tokens, head, KV_HEADS, DIM // 2, PAGE)
        slot = gl.where(slot == SLOTS - 2, 0, slot + 2)
        blocks = _blocks(table, first, count, ahead + 1, t, PAGE)
        line_blocks = _blocks(table, first, count, ahead + 1, line, PAGE)
        even, odd = unpacked(keys)
        scores = warpgroup_mma(even, q_smem.index(0).permute((1, 0)), nothing, use_acc=False, is_async=True)
        scores = warpgroup_mma(odd, q_smem.index(1).permute((1, 0)), scores, is_async=True)
        scores = warpgroup_mma_wait(0, deps=(scores,)) * factor[None, :] * k_scale[:, None]
        size = log2_of(gl.maximum(v_scale, 1e-33))  # behind the last token it is 0, and its weight
        scores = _logits(scores, first * PAGE + tile * TILE + token, begin, length, CAP) + size[:, None]
        top = gl.maximum(best, gl.max(scores, 0))
        weight = gl.exp2(scores - top[None, :])
        fade = gl.exp2(best - top)
        best = top
        weights = weights * fade[None, :] + weight * gl.exp2(-size)[:, None]
        p_smem.permute((1, 0)).store(weight.to(gl.float16))
        fence_async_shared()
        even, odd = unpacked(values)
        acc_even = warpgroup_mma(even, p_smem.permute((1, 0)), acc_even * fade[None, :], is_async=True)
        acc_odd = warpgroup_mma(odd, p_smem.permute((1, 0)), acc_odd * fade[None, :], is_async=True)
        acc_even, acc_odd = warpgroup_mma_wait(0, deps=(acc_even, acc_odd))
    acc = gl.join(acc_even, acc_odd).permute((0, 2, 1)).reshape((DIM, N))
    total = gl.sum(weights, 0)
    return acc / gl.convert_layout(total, gl.SliceLayout(0, acc.type.layout))[None, :]


@gluon.jit(do_not_specialize_on_alignment=["rows", "positions"])
def _step(
    qkv, norms, rotation, rows, positions, block_table, cache, scales, out, eps, scale, part_stride, block_stride,
    value_stride, value_scale_stride,
    HEADS: gl.constexpr, KV_HEADS: gl.constexpr, DIM: gl.constexpr, WINDOW: gl.constexpr, PAGE: gl.constexpr,
    N: gl.constexpr, SLOTS: gl.constexpr, CAP: gl.constexpr, NORM: gl.constexpr, SCALED: gl.constexpr,
    PARTS: gl.constexpr, PDL: gl.constexpr, num_warps: gl.constexpr,
):  # fmt: skip
    GROUP: gl.constexpr = HEADS // KV_HEADS
    HALF: gl.constexpr = DIM // 2
    WIDTH: gl.constexpr = HALF if SCALED else DIM  # numbers of 16 bits a token and head
    shared: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
    mma: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [num_warps, 1], [16, N, 16])
    wide: gl.constexpr = gl.BlockedLayout([1, 8], [256 // WIDTH, WIDTH // 8], [num_warps, 1], [1, 0])
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
    table = block_table + row.to(gl.int64) * block_stride
    if SCALED:
        pages = cache.to(gl.pointer_type(gl.int16), bitcast=True)
        v_pages = pages + value_stride // 2
        v_scales = scales + value_scale_stride
        ring = gl.allocate_shared_memory(gl.int16, [SLOTS, TILE, WIDTH], shared)
        scale_ring = gl.allocate_shared_memory(gl.float32, [SLOTS, TILE], gl.SwizzledSharedLayout(1, 1, 1, [0]))
        q_smem = gl.allocate_shared_memory(gl.float16, [2, N, HALF], shared)
    else:
        pages, v_pages, v_scales = cache, cache + value_stride, scales
        ring = gl.allocate_shared_memory(gl.bfloat16, [SLOTS, TILE, WIDTH], shared)
        scale_ring = ring
        q_smem = gl.allocate_shared_memory(gl.bfloat16, [1, N, DIM], shared)
    t = gl.arange(0, TILE, gl.SliceLayout(1, wide))
    d = gl.arange(0, WIDTH, gl.SliceLayout(0, wide))
    line = gl.arange(0, TILE, gl.BlockedLayout([1], [32], [num_warps], [0]))
    if PDL:
        tl_cuda.gdc_launch_dependents()
    _fill(
        ring, scale_ring, pages, v_pages, scales, v_scales, table, first, count, tokens, tiles, head, t, d, line,
        KV_HEADS, WIDTH, PAGE, SLOTS, SCALED, True,
    )  # fmt: skip
    # The heads of this program: its queries, the key (row GROUP) and the value (GROUP + 1) of the new token.
    g = gl.arange(0, N, gl.SliceLayout(1, pairs))[:, None]
    pair = gl.arange(0, HALF, gl.SliceLayout(0, pairs))[None, :]
    here = (g < GROUP + 2) & (pair < HALF) & (length > 0)
    turned = here & (g <= GROUP)
    heads = gl.where(g < GROUP, head * GROUP + g, HEADS + head + (g - GROUP) * KV_HEADS) * DIM
    cos = gl.load(rotation + position * DIM + pair)
    sin = gl.load(rotation + position * DIM + HALF + pair)
    if NORM:
        gain = gl.load(norms + heads + pair, mask=turned, other=0.0)
        gain_two = gl.load(norms + heads + HALF + pair, mask=turned, other=0.0)
    newest = gl.load(table + position // PAGE, mask=length > 0, other=0)
    if PDL:
        tl_cuda.gdc_wait()
    heads = qkv + b.to(gl.int64) * ((HEADS + 2 * KV_HEADS) * DIM) + heads
    x = sum_of_parts(heads + pair, part_stride, here, PARTS)
    y = sum_of_parts(heads + HALF + pair, part_stride, here, PARTS)
    if NORM:
        root = 1.0 / gl.sqrt(gl.sum(x * x + y * y, 1) / DIM + eps)[:, None]
        x = gl.where(turned, x * root * gain, x)
        y = gl.where(turned, y * root * gain_two, y)
    x, y = gl.where(turned, x * cos - y * sin, x), gl.where(turned, y * cos + x * sin, y)
    place = (newest * KV_HEADS + head) * PAGE + position % PAGE
    kept = cache + place.to(gl.int64) * DIM + (g - GROUP).to(gl.int64) * value_stride + pair
    is_kept = here & (g >= GROUP)
    if SCALED:
        most = gl.maximum(gl.max(gl.maximum(gl.abs(x), gl.abs(y)), 1), 1e-30)[:, None]
        unit = most * (1.0 / 448.0)
        kind: gl.constexpr = cache.dtype.element_ty
        gl.store(kept, to_three_bits(x / unit).to(kind), mask=is_kept)
        gl.store(kept + HALF, to_three_bits(y / unit).to(kind), mask=is_kept)
        wanted = (g >= GROUP) & (g < GROUP + 2) & (length > 0)
        gl.store(scales + place + (g - GROUP) * value_scale_stride, unit, mask=wanted)
        even, odd = _halves((x / most).to(gl.float16), (y / most).to(gl.float16), N, HALF)
        q_smem.index(0).store(even)
        q_smem.index(1).store(odd)
        flat: gl.constexpr = gl.SliceLayout(0, mma)
        factor = gl.convert_layout(gl.sum(most, 1), flat) * scale
    else:
        one, two = x.to(gl.bfloat16), y.to(gl.bfloat16)
        gl.store(kept, one, mask=is_kept)
        gl.store(kept + HALF, two, mask=is_kept)
        q_smem.index(0).store(gl.join(one, two).permute((0, 2, 1)).reshape((N, DIM)))
    gl.thread_barrier()  # threads read what others have stored
    _fill(
        ring, scale_ring, pages, v_pages, scales, v_scales, table, first, count, tokens, tiles, head, t, d, line,
        KV_HEADS, WIDTH, PAGE, SLOTS, SCALED, False,
    )  # fmt: skip
    if SCALED:
        mean = _attend_fp8(
            ring, scale_ring, pages, v_pages, scales, v_scales, q_smem, table, first, count, tokens, tiles, begin,
            length, head, factor, t, d, line, KV_HEADS, DIM, PAGE, N, SLOTS, CAP, mma,
        )  # fmt: skip
    else:
        mean = _attend(
            ring, pages, v_pages, q_smem, table, first, count, tokens, tiles, begin, length, head, scale, t, d,
            KV_HEADS, DIM, PAGE, N, SLOTS, CAP, mma,
        )  # fmt: skip
    async_copy.wait_group(0)
    if tiles > 0:
        stored: gl.constexpr = gl.BlockedLayout([8, 1], [DIM // 8, 256 // DIM], [1, num_warps], [0, 1])
        result = gl.convert_layout(mean.to(gl.bfloat16), stored)
        query = gl.arange(0, N, gl.SliceLayout(0, stored))[None, :]
        where = (head * GROUP + query) * DIM + gl.arange(0, DIM, gl.SliceLayout(1, stored))[:, None]
        gl.store(out + b.to(gl.int64) * (HEADS * DIM) + where, result, mask=query < GROUP)


def able(batch: int, spec: Attention, dtype: torch.dtype, cache: torch.Tensor) -> bool:
    """Whether `attend` can do a step of so many rows of a model in `dtype`, and is the faster way."""
    dims = (64, 128, 256) if cache.dtype == dtype else (128, 256)  # a warp group's rows are half a head's in FP8
    return (
        launch.has_wgmma() and dtype == torch.bfloat16 and spec.head_dim in dims
        and spec.rope.dim == spec.head_dim and spec.rope.style != "interleaved" and cache.shape[3] in (8, 16, 32, 64)
        and spec.heads <= 30 * spec.kv_heads and decode_attention.tile_for(batch, spec).parts == 1
    )  # fmt: skip


def sizes(batches: Sequence[int], spec: Attention, *, fp8: bool) -> list[int]:
    """One of ascending `batches` for each kernel that `attend` has for them."""
    return list({slots_for(batch, spec, fp8=fp8): batch for batch in batches}.values()) if launch.has_wgmma() else []


def slots_for(batch: int, spec: Attention, *, fp8: bool) -> int:
    """Slots of a ring, each 64 tokens' keys or values of a head: what fits where programs are spread evenly.

    FP8 takes two at a time, a tile's keys and its values, and is no faster with more than 4 where programs are many.
    """
    programs = min(4, triton.cdiv(batch * spec.kv_heads, launch.num_sms()))
    others = 2 * _columns(spec) * (spec.head_dim + TILE.value) + (2 << 10)  # queries and weights; sums, and reserved
    each = TILE.value * (spec.head_dim + 4 if fp8 else 2 * spec.head_dim)
    most = min(8, (SHARED // programs - others) // each)
    return (4 if programs > 2 else max(4, most // 2 * 2)) if fp8 else max(3, most)


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
    scales: torch.Tensor | None = None,
    slots: int | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """`rotary.rotate_and_write` of tokens positions[b] of rows[b], then their attention -> [B, H * D] in bfloat16.

    qkv [B, (H + 2 K) * D] or parts of it [P, B, ...], to be summed; the others as there. Row -1: left undefined. So is
    what a token attends to whose row has other tokens here: their keys may not be written yet.
    out [B, H * D]: where it goes, if not to a tensor of its own.
    """
    batch = len(rows)
    out = qkv.new_empty(batch, spec.q_size, dtype=torch.bfloat16) if out is None else out
    scale, cap = decode_attention.score_scale(spec)
    launch.run(
        _step, (spec.kv_heads, batch),
        qkv, table if norms is None else norms, table, rows, positions, block_table, cache,
        table if scales is None else scales, out, eps, scale,
        qkv.stride(0) if qkv.dim() == 3 else 0, block_table.stride(0), cache.stride(0),
        0 if scales is None else scales.stride(0),
        HEADS=spec.heads, KV_HEADS=spec.kv_heads, DIM=spec.head_dim, WINDOW=spec.window or 0, PAGE=cache.shape[3],
        N=_columns(spec), SLOTS=slots or slots_for(batch, spec, fp8=scales is not None), CAP=cap,
        NORM=norms is not None, SCALED=scales is not None, PARTS=parts_of(qkv), warps=WARPS,
    )  # fmt: skip
    return out
