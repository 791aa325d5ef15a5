"""From logits to tokens on the device, by the rule of `martlet.kernels.philox`, with no word from the host.

`_best` finds each row's winner in slices of the vocabulary; `_choose` joins the slices, writes the token into the row's
token list, so that the next step can read it, and reports it.

Where some row wants top_k, top_p or min_p, five launches come before, which find the logit below which tokens go,
without sorting the vocabulary. `_peaks` finds each row's largest logit; `_count` counts tokens by their distance from
it, in BINS narrow bins. The counts tell in which bin top_k ends, and within bounds the mass of every bin, so in which
few bins top_p may end (`_doubt`). `_refine` weighs what lies outside these few and counts inside them again, in FINE
bins, which narrows top_p to a handful of tokens whatever the distribution (`_fine_doubt`). `_gather` keeps these and
weighs the rest; `_cut` finds the exact logit among the kept, searching the integers that order float32, four bits a
pass.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import triton
import triton.language as tl

from martlet.kernels.cuda import launch
from martlet.kernels.cuda.launch import wait

SLICE = 4096  # tokens of the vocabulary a program looks at
CUT_SLICE = 1024  # the same for `_best` after a cut: where nothing is left, no noise is made
BINS, BINS_A_NAT = 256, 8  # of logit / temperature, down to 32 below the largest
FINE = 1024  # of the bins in which top_p may end
KEPT = 2048  # kept tokens that a program of `_cut` looks at at a time
GREEDY_BELOW = 1e-5
# Columns of a row's settings, int32 (floats by their bits).
TEMPERATURE, TOP_K, TOP_P, MIN_P, SEED_LOW, SEED_HIGH, SETTINGS = range(7)


@triton.jit
def _as_float(x):
    return x.to(tl.float32, bitcast=True)


@triton.jit
def _order(x):
    """int32 that compare as the float32 x do."""
    bits = (x + 0.0).to(tl.int32, bitcast=True)
    return tl.where(bits >= 0, bits, bits ^ 0x7FFFFFFF)


@triton.jit
def _wants(settings, row, SETTINGS: tl.constexpr):
    """(is a cut wanted, temperature, top_k, top_p, min_p) of a row; row -1 wants none."""
    mine = settings + tl.maximum(row, 0) * SETTINGS
    temperature = _as_float(tl.load(mine))
    top_k = tl.load(mine + 1)
    top_p = _as_float(tl.load(mine + 2))
    min_p = _as_float(tl.load(mine + 3))
    some = (row >= 0) & (temperature >= 1e-5) & ((top_k > 0) | (top_p < 1.0) | (min_p > 0.0))
    return some, temperature, top_k, top_p, min_p


@triton.jit
def _top(peaks, SLICES, SLICES_UP: tl.constexpr):
    s = tl.arange(0, SLICES_UP)
    return tl.max(tl.load(peaks + s, mask=s < SLICES, other=float("-inf")), 0)


@triton.jit
def _floor(top, temperature, min_p):
    """The least key that min_p lets pass."""
    least = _order(top + tl.log(tl.maximum(min_p, 1e-30)) * temperature)
    return tl.where(min_p > 0.0, least, tl.full([], -2147483648, tl.int32))


@triton.jit
def _alive(x, top, temperature, min_p, BINS: tl.constexpr, BINS_A_NAT: tl.constexpr):
    """(distance from the top in bins, does it count): the distance grows as x falls, so a bin, whole or fine, holds all
    tokens between two keys. Tokens out of the bins are out of the draw: noise lies within 20 nats."""
    distance = (top - x) * (BINS_A_NAT / temperature)
    alive = (distance < BINS) & (_order(x) >= _floor(top, temperature, min_p))
    return tl.where(alive, distance, 0.0), alive


@triton.jit
def _fine(distance, low, high, FINE: tl.constexpr):
    """Which of the FINE parts of bins low ... high; only for tokens in these."""
    part = (distance - low.to(tl.float32)) * (FINE / (high - low + 1).to(tl.float32))
    return tl.minimum(tl.maximum(part, 0.0), FINE - 1.0).to(tl.int32)


@triton.jit
def _spare(top_p, total):
    """A mass that may be missing behind where top_p ends. Of a peaked distribution it tells more than what is there."""
    return total * ((1.0 - top_p) * 0.9998 - 4e-6)


@triton.jit
def _doubt(counts, top_k, top_p, BINS: tl.constexpr, BINS_A_NAT: tl.constexpr):
    """(low, high, edge): top_k ends in bin `edge`, or nowhere if that is BINS; top_p ends in one of low ... high.

    A bin's mass is its count times exp(-distance), known to within the bin's width. Bounds have room for rounding.
    """
    bin = tl.arange(0, BINS)
    count = tl.load(counts + bin)
    upto = tl.cumsum(count, 0)
    edge = tl.full([], BINS, tl.int32)
    if top_k > 0:
        edge = tl.min(tl.where(upto >= top_k, bin, BINS), 0)
    low = tl.full([], BINS, tl.int32)
    high = tl.full([], -1, tl.int32)
    if top_p < 1.0:
        most = tl.where(bin <= edge, count.to(tl.float32) * tl.exp(-bin.to(tl.float32) / BINS_A_NAT), 0.0)
        least = tl.where(bin < edge, most * tl.exp(-1.0 / BINS_A_NAT), 0.0)
        low = tl.min(tl.where(tl.cumsum(most, 0) >= top_p * tl.sum(least, 0) * 0.9998, bin, BINS), 0)
        high = tl.min(tl.where(tl.cumsum(least, 0) >= top_p * tl.sum(most, 0) * 1.0002, bin, BINS), 0)
        behind = tl.max(tl.where(tl.cumsum(most, 0, reverse=True) > _spare(top_p, tl.sum(least, 0)), bin, 0), 0)
        high = tl.minimum(tl.minimum(high, behind), tl.minimum(edge, BINS - 1))
        low = tl.minimum(low, high)
    return low, high, edge


@triton.jit
def _fine_doubt(fine_counts, counts, above, between, low, high, edge, top_p, FINE: tl.constexpr, BINS: tl.constexpr,
                BINS_A_NAT: tl.constexpr):  # fmt: skip
    """(low, high): top_p ends in one of these fine bins. above, between: exact masses around bins low ... high.

    All of them where there is no top_p, or where top_k ends among them, so that their mass is not known so well.
    """
    first = tl.full([], 0, tl.int32)
    last = tl.full([], FINE - 1, tl.int32)
    if (high >= low) & (high < edge):
        part = tl.arange(0, FINE)
        width = (high - low + 1).to(tl.float32) / FINE
        count = tl.load(fine_counts + part).to(tl.float32)
        most = count * tl.exp(-(low.to(tl.float32) + part * width) / BINS_A_NAT)
        least = count * tl.exp(-(low.to(tl.float32) + (part + 1) * width) / BINS_A_NAT)
        rest = tl.load(counts + tl.minimum(edge, BINS - 1)).to(tl.float32) * tl.exp(-edge.to(tl.float32) / BINS_A_NAT)
        rest = tl.where(edge < BINS, rest, 0.0)  # at most what top_k leaves of its bin
        total = above + between
        from_mass = top_p * (total + tl.sum(least, 0)) * 0.99998 - above
        to_mass = top_p * (total + tl.sum(most, 0) + rest) * 1.00002 - above
        last = tl.minimum(tl.min(tl.where(tl.cumsum(least, 0) >= to_mass, part, FINE), 0), FINE - 1)
        spare = _spare(top_p, total + tl.sum(least, 0)) - between - rest
        last = tl.minimum(last, tl.max(tl.where(tl.cumsum(most, 0, reverse=True) > spare, part, 0), 0))
        first = tl.minimum(tl.min(tl.where(tl.cumsum(most, 0) >= from_mass, part, FINE), 0), last)
    return first, last


@triton.jit
def _total(parts, SLICES, SLICES_UP: tl.constexpr):
    s = tl.arange(0, SLICES_UP)
    return tl.sum(tl.load(parts + s, mask=s < SLICES, other=0.0), 0)


@triton.jit(do_not_specialize_on_alignment=["rows"])
def _peaks(logits, rows, settings, peaks, counts, fine_counts, V, SLICES, SETTINGS: tl.constexpr, BINS: tl.constexpr,
           FINE: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr):  # fmt: skip
    b = tl.program_id(0)
    piece = tl.program_id(1)
    row = tl.load(rows + b)
    wait(PDL)
    some, _, _, _, _ = _wants(settings, row, SETTINGS)
    if some:
        at = piece * BLOCK + tl.arange(0, BLOCK)
        x = tl.load(logits + b.to(tl.int64) * V + at, mask=at < V, other=float("-inf"))
        tl.store(peaks + b * SLICES + piece, tl.max(x, 0))
        if piece == 0:
            tl.store(counts + b * BINS + tl.arange(0, BINS), tl.zeros([BINS], tl.int32))
            tl.store(fine_counts + b * FINE + tl.arange(0, FINE), tl.zeros([FINE], tl.int32))


@triton.jit(do_not_specialize_on_alignment=["rows"])
def _count(logits, rows, settings, peaks, counts, V, SLICES, SETTINGS: tl.constexpr, BINS: tl.constexpr,
           BINS_A_NAT: tl.constexpr, SLICES_UP: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr):  # fmt: skip
    b = tl.program_id(0)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    row = tl.load(rows + b)
    wait(PDL)
    some, temperature, _, _, min_p = _wants(settings, row, SETTINGS)
    if some:
        x = tl.load(logits + b.to(tl.int64) * V + at, mask=at < V, other=float("-inf"))
        top = _top(peaks + b * SLICES, SLICES, SLICES_UP)
        distance, alive = _alive(x, top, temperature, min_p, BINS, BINS_A_NAT)
        where = distance.to(tl.int32)
        found = tl.histogram(where, BINS, mask=alive)
        tl.atomic_add(counts + b * BINS + tl.arange(0, BINS), found, mask=found > 0, sem="relaxed")


@triton.jit(do_not_specialize_on_alignment=["rows"])
def _refine(logits, rows, settings, peaks, counts, fine_counts, masses, V, SLICES, SETTINGS: tl.constexpr,
            BINS: tl.constexpr, FINE: tl.constexpr, BINS_A_NAT: tl.constexpr, SLICES_UP: tl.constexpr,
            BLOCK: tl.constexpr, PDL: tl.constexpr):  # fmt: skip
    b = tl.program_id(0)
    piece = tl.program_id(1)
    row = tl.load(rows + b)
    wait(PDL)
    some, temperature, top_k, top_p, min_p = _wants(settings, row, SETTINGS)
    if some & (top_p < 1.0):
        low, high, edge = _doubt(counts + b * BINS, top_k, top_p, BINS, BINS_A_NAT)
        top = _top(peaks + b * SLICES, SLICES, SLICES_UP)
        at = piece * BLOCK + tl.arange(0, BLOCK)
        x = tl.load(logits + b.to(tl.int64) * V + at, mask=at < V, other=float("-inf"))
        distance, alive = _alive(x, top, temperature, min_p, BINS, BINS_A_NAT)
        where = distance.to(tl.int32)
        mass = tl.exp((x - top) / temperature)
        tl.store(masses + b * SLICES + piece, tl.sum(tl.where(alive & (where < low), mass, 0.0), 0))
        between = alive & (where > high) & (where < edge)
        tl.store(masses + (tl.num_programs(0) + b) * SLICES + piece, tl.sum(tl.where(between, mass, 0.0), 0))
        inside = alive & (where >= low) & (where <= high)
        if tl.max(inside.to(tl.int32), 0) > 0:
            found = tl.histogram(_fine(distance, low, high, FINE), FINE, mask=inside)
            tl.atomic_add(fine_counts + b * FINE + tl.arange(0, FINE), found, mask=found > 0, sem="relaxed")


@triton.jit(do_not_specialize_on_alignment=["rows"])
def _gather(logits, rows, settings, peaks, counts, fine_counts, outer, kept, sizes, masses, V, SLICES,
            SETTINGS: tl.constexpr, BINS: tl.constexpr, FINE: tl.constexpr, BINS_A_NAT: tl.constexpr,
            SLICES_UP: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr):  # fmt: skip
    b = tl.program_id(0)
    piece = tl.program_id(1)
    beside = (tl.num_programs(0) + b) * SLICES
    row = tl.load(rows + b)
    wait(PDL)
    some, temperature, top_k, top_p, min_p = _wants(settings, row, SETTINGS)
    if some:
        low, high, edge = _doubt(counts + b * BINS, top_k, top_p, BINS, BINS_A_NAT)
        first = tl.full([], 0, tl.int32)
        last = tl.full([], FINE - 1, tl.int32)
        if top_p < 1.0:
            first, last = _fine_doubt(
                fine_counts + b * FINE, counts + b * BINS, _total(outer + b * SLICES, SLICES, SLICES_UP),
                _total(outer + beside, SLICES, SLICES_UP), low, high, edge, top_p, FINE, BINS, BINS_A_NAT,
            )  # fmt: skip
        top = _top(peaks + b * SLICES, SLICES, SLICES_UP)
        at = piece * BLOCK + tl.arange(0, BLOCK)
        x = tl.load(logits + b.to(tl.int64) * V + at, mask=at < V, other=float("-inf"))
        distance, alive = _alive(x, top, temperature, min_p, BINS, BINS_A_NAT)
        where = distance.to(tl.int32)
        inside = (where >= low) & (where <= high)
        part = tl.where(inside, _fine(distance, low, tl.maximum(high, low), FINE), 0)
        mass = tl.exp((x - top) / temperature)
        before = alive & ((where < low) | (inside & (part < first)))
        tl.store(masses + b * SLICES + piece, tl.sum(tl.where(before, mass, 0.0), 0))
        behind = alive & (((where > high) & (where < edge)) | (inside & (part > last)))
        tl.store(masses + beside + piece, tl.sum(tl.where(behind, mass, 0.0), 0))
        take = alive & ((inside & (part >= first) & (part <= last)) | (where == edge))
        place = tl.cumsum(take.to(tl.int32), 0) - 1
        tl.store(kept + (b.to(tl.int64) * SLICES + piece) * BLOCK + place, x, mask=take)
        tl.store(sizes + b * SLICES + piece, tl.sum(take.to(tl.int32), 0))


@triton.jit
def _least(kept, sizes, SLICES, longest, floor, top, temperature, target, BY_MASS: tl.constexpr,
           SLICES_UP: tl.constexpr, AT_ONCE: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """The largest key t such that kept tokens with key >= max(t, floor) number, or weigh, at least `target`."""
    i = tl.arange(0, SLICES_UP * AT_ONCE)
    piece = i // AT_ONCE
    size = tl.load(sizes + piece, mask=piece < SLICES, other=0)
    low = tl.full([], -2147483648, tl.int32)  # the keys' first digits, as found so far
    digit = tl.arange(0, 16)
    for step in range(8):
        unit = tl.full([], 1, tl.int32) << (28 - 4 * step)
        candidates = low + digit * unit
        weight = tl.zeros([16], tl.float32)
        for begin in range(0, longest, AT_ONCE):
            at = begin + i % AT_ONCE
            x = tl.load(kept + piece * BLOCK + at, mask=at < size, other=float("-inf"))
            key = _order(x)
            mass = tl.exp((x - top) / temperature) if BY_MASS else tl.full([SLICES_UP * AT_ONCE], 1.0, tl.float32)
            mass = tl.where((at < size) & (key >= floor), mass, 0.0)
            weight += tl.sum(tl.where(key[:, None] >= candidates[None, :], mass[:, None], 0.0), 0)
        low += tl.max(tl.where(weight >= target, digit, 0), 0) * unit
    return tl.maximum(low, floor)


@triton.jit
def _mass(kept, sizes, SLICES, longest, floor, top, temperature, SLICES_UP: tl.constexpr, AT_ONCE: tl.constexpr,
          BLOCK: tl.constexpr):  # fmt: skip
    """What kept tokens with key >= floor weigh."""
    i = tl.arange(0, SLICES_UP * AT_ONCE)
    piece = i // AT_ONCE
    size = tl.load(sizes + piece, mask=piece < SLICES, other=0)
    total = tl.zeros([SLICES_UP * AT_ONCE], tl.float32)
    for begin in range(0, longest, AT_ONCE):
        at = begin + i % AT_ONCE
        x = tl.load(kept + piece * BLOCK + at, mask=at < size, other=float("-inf"))
        total += tl.where((at < size) & (_order(x) >= floor), tl.exp((x - top) / temperature), 0.0)
    return tl.sum(total, 0)


@triton.jit(do_not_specialize_on_alignment=["rows"])
def _cut(rows, settings, peaks, counts, fine_counts, outer, kept, sizes, masses, cuts, SLICES, SETTINGS: tl.constexpr,
         BINS: tl.constexpr, FINE: tl.constexpr, BINS_A_NAT: tl.constexpr, SLICES_UP: tl.constexpr,
         AT_ONCE: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr):  # fmt: skip
    b = tl.program_id(0)
    row = tl.load(rows + b)
    wait(PDL)
    some, temperature, top_k, top_p, min_p = _wants(settings, row, SETTINGS)
    floor = tl.full([], -2147483648, tl.int32)
    if some:
        low, high, edge = _doubt(counts + b * BINS, top_k, top_p, BINS, BINS_A_NAT)
        top = _top(peaks + b * SLICES, SLICES, SLICES_UP)
        floor = _floor(top, temperature, min_p)
        s = tl.arange(0, SLICES_UP)
        longest = tl.max(tl.load(sizes + b * SLICES + s, mask=s < SLICES, other=0), 0)
        mine = kept + b.to(tl.int64) * SLICES * BLOCK
        if edge < BINS:
            bin = tl.arange(0, BINS)
            count = tl.load(counts + b * BINS + bin)
            gone = tl.sum(tl.where((bin < edge) & ((bin < low) | (bin > high)), count, 0), 0)  # in front, and not kept
            if top_p < 1.0:
                first, last = _fine_doubt(
                    fine_counts + b * FINE, counts + b * BINS, _total(outer + b * SLICES, SLICES, SLICES_UP),
                    _total(outer + (tl.num_programs(0) + b) * SLICES, SLICES, SLICES_UP), low, high, edge, top_p,
                    FINE, BINS, BINS_A_NAT,
                )  # fmt: skip
                part = tl.arange(0, FINE)
                fine_count = tl.load(fine_counts + b * FINE + part)
                gone += tl.sum(tl.where((part < first) | (part > last), fine_count, 0), 0)
            target = (top_k - gone).to(tl.float32)
            floor = _least(mine, sizes + b * SLICES, SLICES, longest, floor, top, temperature, target, False, SLICES_UP,
                           AT_ONCE, BLOCK)  # fmt: skip
        if top_p < 1.0:
            above = _total(masses + b * SLICES, SLICES, SLICES_UP)
            between = _total(masses + (tl.num_programs(0) + b) * SLICES, SLICES, SLICES_UP)
            here = _mass(mine, sizes + b * SLICES, SLICES, longest, floor, top, temperature, SLICES_UP, AT_ONCE, BLOCK)
            target = tl.maximum(top_p * (above + here + between) - above, 1e-30)
            floor = _least(mine, sizes + b * SLICES, SLICES, longest, floor, top, temperature, target, True, SLICES_UP,
                           AT_ONCE, BLOCK)  # fmt: skip
    tl.store(cuts + b, floor)


@triton.jit
def _gumbel(seed_low, seed_high, position, quad):
    """Noise of tokens 4 * quad ... 4 * quad + 3 in order, float32 [4 * len(quad)]; the rule of kernels.philox."""
    zero = quad * 0
    w0, w1, w2, w3 = tl.philox_impl(
        quad.to(tl.uint32), zero.to(tl.uint32) + position.to(tl.uint32), zero.to(tl.uint32), zero.to(tl.uint32),
        seed_low.to(tl.uint32, bitcast=True), seed_high.to(tl.uint32, bitcast=True), 10,
    )  # fmt: skip
    word = tl.interleave(tl.interleave(w0, w2), tl.interleave(w1, w3))
    u = ((word >> 9).to(tl.float32) + 0.5) * 1.1920928955078125e-07
    return -tl.log(-tl.log(u))


@triton.jit(do_not_specialize_on_alignment=["rows", "positions", "values", "places", "cuts"])
def _best(
    logits, rows, positions, settings, cuts, values, places, V, SLICES,
    GREEDY: tl.constexpr, CUT: tl.constexpr, SETTINGS: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    b = tl.program_id(0)
    piece = tl.program_id(1)
    row = tl.load(rows + b)
    wait(PDL)
    at = piece * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(logits + b.to(tl.int64) * V + at, mask=at < V, other=float("-inf"))
    if not GREEDY:
        mine = settings + tl.maximum(row, 0) * SETTINGS
        temperature = _as_float(tl.load(mine))
        if temperature >= 1e-5:
            keep = x > float("-inf")
            if CUT:
                keep &= _order(x) >= tl.load(cuts + b)
            noisy = tl.full([BLOCK], float("-inf"), tl.float32)
            if tl.max(keep.to(tl.int32), 0) > 0:
                quad = piece * (BLOCK // 4) + tl.arange(0, BLOCK // 4)
                noise = _gumbel(tl.load(mine + 4), tl.load(mine + 5), tl.load(positions + b) + 1, quad)
                noisy = tl.where(keep, x / temperature + noise, float("-inf"))
            x = noisy
    value, place = tl.max(x, 0, return_indices=True)
    tl.store(values + b * SLICES + piece, value)
    tl.store(places + b * SLICES + piece, piece * BLOCK + place)


@triton.jit(do_not_specialize_on_alignment=["rows", "positions", "values", "places", "out"])
def _choose(values, places, rows, positions, tokens, out, SLICES, tokens_stride, BLOCK: tl.constexpr,
            PDL: tl.constexpr):  # fmt: skip
    b = tl.program_id(0)
    row = tl.load(rows + b)
    position = tl.load(positions + b)
    wait(PDL)
    s = tl.arange(0, BLOCK)
    value = tl.load(values + b * SLICES + s, mask=s < SLICES, other=float("-inf"))
    winner = tl.argmax(value, 0)  # of equal ones the lower slice, hence the lower token
    token = tl.load(places + b * SLICES + winner)
    tl.store(out + b, tl.where(row >= 0, token, -1))
    if row >= 0:
        tl.store(tokens + row.to(tl.int64) * tokens_stride + position + 1, token)


@triton.jit
def _mask(logits, rows, bits, V, WORDS, BLOCK: tl.constexpr):
    row = tl.load(rows + tl.program_id(0)).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    word = tl.load(bits + tl.program_id(0).to(tl.int64) * WORDS + at // 32, mask=at < V, other=-1)
    gone = ((word >> (at % 32)) & 1) == 0
    tl.store(logits + row * V + at, float("-inf"), mask=gone & (at < V))


def mask(logits: torch.Tensor, rows: torch.Tensor, bits: torch.Tensor) -> None:
    """Set logits[rows[m], t] to -inf where bit t % 32 of bits[m, t // 32] is not set; in place.

    logits float32 [S, V], rows int32 [M], bits int32 [M, ceil(V / 32)].
    """
    vocab = logits.shape[1]
    grid = (len(rows), triton.cdiv(vocab, SLICE))
    _mask[grid](logits, rows, bits, vocab, bits.shape[1], BLOCK=SLICE)


def sample(
    logits: torch.Tensor,
    rows: torch.Tensor,
    positions: torch.Tensor,
    settings: torch.Tensor,
    tokens: torch.Tensor,
    *,
    greedy: bool = False,
    cut: bool = True,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Sample from logits float32 [S, V], write each token to tokens[rows[s], positions[s] + 1] and return them all.

    Returns int32 [S].

    rows, positions int32 [S]: the row and its newest computed token; row -1 gives -1. settings int32 [rows, SETTINGS].
    tokens int32 [rows, length]. greedy: all rows are, known to the host. cut: some row may want top_k, top_p or min_p.
    Equal logits at the end of a cut are all kept.
    """
    count, vocab = logits.shape
    cut = cut and not greedy

    def new(*shape: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device=logits.device)

    out = new(count) if out is None else out
    cuts = _find_cuts(logits, rows, settings, new) if cut else out
    block = CUT_SLICE if cut else SLICE
    slices = triton.cdiv(vocab, block)
    values, places = new(count, slices, dtype=torch.float32), new(count, slices)
    launch.run(
        _best, (count, slices), logits, rows, positions, settings, cuts, values, places, vocab, slices,
        GREEDY=greedy, CUT=cut, SETTINGS=SETTINGS, BLOCK=block, warps=block // 512,
    )  # fmt: skip
    launch.run(
        _choose, (count,), values, places, rows, positions, tokens, out, slices, tokens.stride(0),
        BLOCK=triton.next_power_of_2(slices), warps=1,
    )  # fmt: skip
    return out


def _find_cuts(
    logits: torch.Tensor, rows: torch.Tensor, settings: torch.Tensor, new: Callable[..., torch.Tensor]
) -> torch.Tensor:
    """The least key of each row's tokens that stay, int32 [S]."""
    count, vocab = logits.shape
    slices = triton.cdiv(vocab, SLICE)
    slices_up = triton.next_power_of_2(slices)
    peaks, counts, fine_counts = new(count, slices, dtype=torch.float32), new(count, BINS), new(count, FINE)
    kept, sizes = new(count, slices, SLICE, dtype=torch.float32), new(count, slices)
    outer, masses = (new(2, count, slices, dtype=torch.float32) for _ in range(2))  # above tokens in doubt, and behind
    cuts = new(count)
    bins = {"BINS": BINS, "FINE": FINE, "SETTINGS": SETTINGS, "BLOCK": SLICE}
    fine = {"BINS_A_NAT": BINS_A_NAT, "SLICES_UP": slices_up}
    head, grid = (logits, rows, settings, peaks, counts), (count, slices)
    launch.run(_peaks, grid, *head, fine_counts, vocab, slices, **bins, warps=8)
    launch.run(
        _count, grid, *head, vocab, slices, BINS=BINS, SETTINGS=SETTINGS, BLOCK=SLICE, **fine, warps=8
    )  # fmt: skip
    launch.run(_refine, grid, *head, fine_counts, outer, vocab, slices, **bins, **fine, warps=8)
    launch.run(_gather, grid, *head, fine_counts, outer, kept, sizes, masses, vocab, slices, **bins, **fine, warps=8)
    launch.run(
        _cut, (count,), *head[1:], fine_counts, outer, kept, sizes, masses, cuts, slices,
        **bins, **fine, AT_ONCE=max(1, KEPT // slices_up), warps=16,
    )  # fmt: skip
    return cuts
