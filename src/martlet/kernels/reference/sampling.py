"""From logits to tokens, the whole batch at once, in torch. The vocabulary is never sorted.

What top_k, min_p and top_p leave is always a prefix of the tokens ranked by (logit descending, id ascending). Nearly
always it lies within the few likeliest, which one small topk finds, and only they are given noise. Rows whose prefix
is longer find the logit at its end by radix select.
"""

from __future__ import annotations

import numpy as np
import torch

from martlet.kernels.ops import Penalties, Sampling
from martlet.kernels.reference.philox import gumbel

GREEDY_BELOW = 1e-5
CANDIDATES = (64, 1024)  # sizes of the topk to try before radix select
DIGITS = ((21, 11), (10, 11), (0, 10))  # (shift, width) of the digits of a 32-bit number, highest first


def sample(logits: torch.Tensor, sampling: Sampling) -> torch.Tensor:
    _restrict(logits, sampling)
    if sampling.penalties is not None:
        _penalise(logits, sampling.penalties)
    greedy = sampling.temperature < GREEDY_BELOW
    if greedy.all():
        return logits.argmax(-1)
    tokens = logits.argmax(-1) if greedy.any() else torch.empty(len(logits), dtype=torch.int64, device=logits.device)
    cut = (sampling.top_k > 0) | (sampling.top_p < 1) | (sampling.min_p > 0)
    for rows, draw in ((np.flatnonzero(~greedy & ~cut), _draw_all), (np.flatnonzero(~greedy & cut), _draw_cut)):
        if len(rows):
            draw(logits, sampling, rows, tokens)
    return tokens


def _restrict(logits: torch.Tensor, sampling: Sampling) -> None:
    device = logits.device
    if sampling.masks is not None:
        rows, bits = sampling.masks
        kept = np.unpackbits(bits.view(np.uint8), axis=1, bitorder="little", count=logits.shape[1]).astype(bool)
        index = torch.from_numpy(rows).to(device)
        logits[index] = logits[index].masked_fill_(~torch.from_numpy(kept).to(device), float("-inf"))
    if sampling.allowed is not None:
        rows, ids = (torch.from_numpy(a).to(device) for a in sampling.allowed)
        kept = logits[rows, ids]
        logits[rows.unique()] = float("-inf")
        logits[rows, ids] = kept
    if sampling.bias is not None:
        rows, ids, values = (torch.from_numpy(a).to(device) for a in sampling.bias)
        logits.index_put_((rows, ids), values, accumulate=True)
    if sampling.banned is not None:
        rows, ids = (torch.from_numpy(a).to(device) for a in sampling.banned)
        logits[rows, ids] = float("-inf")


def _penalise(logits: torch.Tensor, penalties: Penalties) -> None:
    device = logits.device

    def column(values: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(values).to(device)[:, None]

    rows, tokens = (torch.from_numpy(a).to(device) for a in (penalties.rows, penalties.tokens))
    is_token = tokens >= 0
    is_output = is_token & (torch.arange(tokens.shape[1], device=device) >= column(penalties.prompt_len))
    tokens = tokens.clamp(min=0)
    x = logits[rows]
    counts = torch.zeros_like(x).scatter_add_(1, tokens, is_output.to(x.dtype))
    seen = torch.zeros_like(x).scatter_add_(1, tokens, is_token.to(x.dtype)) > 0
    factor = column(penalties.repetition)
    x = torch.where(seen, torch.where(x > 0, x / factor, x * factor), x)
    x -= column(penalties.frequency) * counts + column(penalties.presence) * (counts > 0)
    logits[rows] = x


def _draw_all(logits: torch.Tensor, sampling: Sampling, rows: np.ndarray, tokens: torch.Tensor) -> None:
    """Rows that nothing cuts: every token takes part."""
    index, temperature, *_ = _columns(sampling, rows, logits.device)
    x = logits.index_select(0, index) / temperature
    x += gumbel(sampling.seed[rows], sampling.position[rows], None, x.shape[1], x.device)
    tokens[index] = x.argmax(-1)


def _draw_cut(logits: torch.Tensor, sampling: Sampling, rows: np.ndarray, tokens: torch.Tensor) -> None:
    """Rows cut by min_p, top_k or top_p, by ever larger candidate sets."""
    vocab = logits.shape[1]
    for size in CANDIDATES:
        if size >= vocab or not len(rows):
            continue
        index, temperature, top_k, top_p, min_p = _columns(sampling, rows, logits.device)
        x = logits.index_select(0, index) / temperature
        top, ids = x.topk(size, dim=-1)
        ids, order = ids.sort(dim=-1)
        top, order = top.gather(-1, order).sort(dim=-1, descending=True, stable=True)
        ids = ids.gather(-1, order)

        floor = top[:, :1] + min_p.log()
        mass = (top - top[:, :1]).exp()
        limited = (top >= floor) & ((top_k == 0) | (torch.arange(size, device=x.device) < top_k))
        # The candidates hold all of a prefix that ends above their last logit; tokens left out may equal that one.
        above = top > top[:, -1:]
        ends = (top[:, -1:] < floor) | ((top_k > 0) & (above.sum(-1, keepdim=True) >= top_k))
        total = torch.where(ends, (mass * limited).sum(-1, keepdim=True), (x - top[:, :1]).exp().sum(-1, keepdim=True))
        before = mass.cumsum(-1) - mass
        keep = limited & (before < top_p * total)
        found = ends | ((top_k == 0) & (min_p == 0) & ((mass * above).sum(-1, keepdim=True) >= top_p * total))

        noisy = top + gumbel(sampling.seed[rows], sampling.position[rows], ids, vocab, x.device)
        drawn = ids.gather(-1, noisy.masked_fill_(~keep, float("-inf")).argmax(-1, keepdim=True))
        done = found.squeeze(-1)
        tokens[index[done]] = drawn[done, 0]
        rows = rows[~done.cpu().numpy()]
    if len(rows):
        index, temperature, top_k, top_p, min_p = _columns(sampling, rows, logits.device)
        x = logits.index_select(0, index) / temperature
        keep = _survivors(x, top_k, top_p, min_p)
        x += gumbel(sampling.seed[rows], sampling.position[rows], None, vocab, x.device)
        tokens[index] = x.masked_fill_(~keep, float("-inf")).argmax(-1)


def _columns(sampling: Sampling, rows: np.ndarray, device: torch.device) -> tuple[torch.Tensor, ...]:
    """(rows [R], then temperature, top_k, top_p, min_p, each [R, 1])."""
    columns = (sampling.temperature, sampling.top_k, sampling.top_p, sampling.min_p)
    return torch.from_numpy(rows).to(device), *(torch.from_numpy(c[rows]).to(device)[:, None] for c in columns)


def _survivors(x: torch.Tensor, top_k: torch.Tensor, top_p: torch.Tensor, min_p: torch.Tensor) -> torch.Tensor:
    """Which tokens of x [R, V] the three cuts leave, exactly; bool [R, V]."""
    best = x.amax(-1, keepdim=True)
    keep = (x >= best + min_p.log()) & (x > float("-inf"))
    if (top_k > 0).any():
        keep &= _prefix(x, keep.double(), torch.where(top_k > 0, top_k, x.shape[1]).double())
    mass = (x - best).exp().double() * keep
    return keep & _prefix(x, mass, top_p.double() * mass.sum(-1, keepdim=True))


def _prefix(x: torch.Tensor, weight: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """The shortest prefix of the ranked tokens whose weight reaches `target` (all, if none does); bool [R, V].

    Radix select: the logit at its end is found digit by digit, each by one histogram of the tokens still in question.
    """
    bits = (x + 0.0).view(torch.int32).long()  # + 0.0 makes -0.0 equal 0.0 in bits as well
    key = torch.where(bits >= 0, bits, bits ^ 0x7FFFFFFF) + (1 << 31)  # ordered like x, 0 ... 2**32 - 1
    tied = torch.ones_like(x, dtype=torch.bool)  # tokens that share the digits found so far
    above = torch.zeros_like(target)  # weight of the tokens that rank before those
    last = torch.zeros_like(target, dtype=torch.int64)
    for shift, width in DIGITS:
        digit = (key >> shift) & ((1 << width) - 1)
        histogram = weight.new_zeros(len(x), 1 << width).scatter_add_(1, digit, weight * tied)
        reached = histogram.flip(-1).cumsum(-1).flip(-1)  # weight of this digit and higher ones
        found = ((above + reached >= target).sum(-1, keepdim=True) - 1).clamp(min=0)
        above += (reached - histogram).gather(-1, found)
        tied &= digit == found
        last += found << shift
    equal = weight * tied
    return (key > last) | (tied & (equal.cumsum(-1) - equal < target - above))
