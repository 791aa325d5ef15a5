"""From logits to tokens on the device, by the rule of `martlet.kernels.philox`, with no word from the host.

Three launches at most. `_cut` (only where some row wants top_k, top_p or min_p) finds the logit below which tokens go.
`_best` finds each row's winner in slices of the vocabulary. `_choose` joins the slices, writes the token into the
row's token list, so that the next step can read it, and reports it.

The vocabulary is never sorted: `_cut` searches the integers that order float32, four bits a pass.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from martlet.kernels.cuda import launch
from martlet.kernels.cuda.launch import wait

SLICE = 4096  # tokens of the vocabulary a program of `_best` looks at
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
def _prefix(logits, V, floor, best, temperature, target, BY_MASS: tl.constexpr, BLOCK: tl.constexpr):
    """The largest key t such that tokens with key >= max(t, floor) number (weigh, if BY_MASS) at least `target`."""
    # Keys are searched as unsigned numbers, 4 bits a pass from the top: `low` is the prefix found so far.
    low = tl.zeros([], tl.int64)
    digit = tl.arange(0, 16)
    for step in range(8):
        unit = tl.full([], 1, tl.int64) << (28 - 4 * step)
        candidates = low + digit.to(tl.int64) * unit
        weight = tl.zeros([16], tl.float32)
        for begin in range(0, V, BLOCK):
            at = begin + tl.arange(0, BLOCK)
            x = tl.load(logits + at, mask=at < V, other=float("-inf"))
            key = _order(x)
            mass = tl.exp((x - best) / temperature) if BY_MASS else tl.full([BLOCK], 1.0, tl.float32)
            mass = tl.where((key >= floor) & (at < V), mass, 0.0)
            unsigned = key.to(tl.int64) + 2147483648
            weight += tl.sum(tl.where(unsigned[:, None] >= candidates[None, :], mass[:, None], 0.0), 0)
        enough = tl.max(tl.where(weight >= target, digit, 0), 0)
        low += enough.to(tl.int64) * unit
    return tl.maximum((low - 2147483648).to(tl.int32), floor)


@triton.jit
def _cut(logits, rows, settings, cuts, V, SETTINGS: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr):
    b = tl.program_id(0)
    row = tl.load(rows + b)
    wait(PDL)
    mine = settings + tl.maximum(row, 0) * SETTINGS
    temperature = tl.where(row >= 0, _as_float(tl.load(mine)), 0.0)
    top_k = tl.load(mine + 1)
    top_p = _as_float(tl.load(mine + 2))
    min_p = _as_float(tl.load(mine + 3))
    floor = tl.full([], -2147483648, tl.int32)
    if (temperature >= 1e-5) & ((top_k > 0) | (top_p < 1.0) | (min_p > 0.0)):
        line = logits + b.to(tl.int64) * V
        best = tl.full([], float("-inf"), tl.float32)
        for begin in range(0, V, BLOCK):
            at = begin + tl.arange(0, BLOCK)
            best = tl.maximum(best, tl.max(tl.load(line + at, mask=at < V, other=float("-inf")), 0))
        if min_p > 0.0:
            floor = _order(best + tl.log(min_p) * temperature)
        if top_k > 0:
            floor = _prefix(line, V, floor, best, temperature, top_k.to(tl.float32), False, BLOCK)
        if top_p < 1.0:
            total = tl.zeros([], tl.float32)
            for begin in range(0, V, BLOCK):
                at = begin + tl.arange(0, BLOCK)
                x = tl.load(line + at, mask=at < V, other=float("-inf"))
                total += tl.sum(tl.where(_order(x) >= floor, tl.exp((x - best) / temperature), 0.0), 0)
            floor = _prefix(line, V, floor, best, temperature, top_p * total, True, BLOCK)
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


@triton.jit
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
            quad = piece * (BLOCK // 4) + tl.arange(0, BLOCK // 4)
            noise = _gumbel(tl.load(mine + 4), tl.load(mine + 5), tl.load(positions + b) + 1, quad)
            x = tl.where(keep, x / temperature + noise, float("-inf"))
    value, place = tl.max(x, 0, return_indices=True)
    tl.store(values + b * SLICES + piece, value)
    tl.store(places + b * SLICES + piece, piece * BLOCK + place)


@triton.jit
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
    out = torch.empty(count, dtype=torch.int32, device=logits.device) if out is None else out
    slices = triton.cdiv(vocab, SLICE)
    values = logits.new_empty(count, slices)
    places = torch.empty(count, slices, dtype=torch.int32, device=logits.device)
    cuts = places
    if cut and not greedy:
        cuts = torch.empty(count, dtype=torch.int32, device=logits.device)
        _cut[(count,)](
            logits, rows, settings, cuts, vocab, SETTINGS=SETTINGS, BLOCK=2048, **launch.options(num_warps=16)
        )
    _best[(count, slices)](
        logits, rows, positions, settings, cuts, values, places, vocab, slices,
        GREEDY=greedy, CUT=cut and not greedy, SETTINGS=SETTINGS, BLOCK=SLICE, **launch.options(num_warps=8),
    )  # fmt: skip
    _choose[(count,)](
        values, places, rows, positions, tokens, out, slices, tokens.stride(0),
        BLOCK=triton.next_power_of_2(slices), **launch.options(num_warps=1),
    )  # fmt: skip
    return out
