"""Recurrences over a whole batch in torch: token shift, the WKV of RWKV 5 and 6, the delta rule of 7.

Sequences advance together in rounds. A round takes some tokens of each sequence that has any left, padded to one length
T: padding has no key and does not decay, so it changes no state. With T > 1 a round computes what T steps would, in
matrix products (a chunk), from w's running products; those are differences of logarithms, never quotients, so a strong
decay overflows nothing. Rounds end where a snapshot is due. All of it is planned once a step, in numpy.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

from martlet.kernels.ops import Layout, Snapshots

CHUNK = 16  # tokens of a round: its decays take CHUNK * width numbers a token


@dataclass(frozen=True, slots=True)
class Round:
    """Tokens int64 [b, T] of the step, padded with N; slots [b] of their states; saved [q] of the b go to `to` [q]."""

    tokens: torch.Tensor
    slots: torch.Tensor
    saved: torch.Tensor | None
    to: torch.Tensor | None


@dataclass(slots=True)
class RecurrencePlan:
    """previous: int64 [N], the token before each in the step, N + b where that is the last one of sequence b's state.

    slots, last: int64 [B], states and last tokens of the sequences. saved: tokens after which snapshots go to `to`.
    first_values: what the first layer leaves for the others (generation 7).
    """

    previous: torch.Tensor
    slots: torch.Tensor
    last: torch.Tensor
    saved: torch.Tensor | None
    to: torch.Tensor | None
    rounds: list[Round]
    first_values: torch.Tensor | None = None


def recurrence_plan(layout: Layout, rows: np.ndarray, snapshots: Snapshots, chunk: int, device: str) -> RecurrencePlan:
    def put(values: object) -> torch.Tensor:
        return torch.from_numpy(np.asarray(values, np.int64)).to(device)

    ends = np.cumsum(layout.count)
    begins, total = ends - layout.count, int(ends[-1])
    previous = np.arange(total) - 1
    previous[begins] = total + np.arange(len(rows))
    due = {(int(b), int(p)): int(slot) for b, p, slot in zip(*snapshots, strict=True)}
    tokens = [begins[b] + p - layout.start[b] - 1 for b, p in due]
    return RecurrencePlan(
        previous=put(previous),
        slots=put(rows),
        last=put(ends - 1),
        saved=put(tokens) if due else None,
        to=put(list(due.values())) if due else None,
        rounds=[
            Round(
                tokens=put(_padded([begins[b] + np.arange(p, q) - layout.start[b] for b, p, q in pieces], total)),
                slots=put([rows[b] for b, _, _ in pieces]),
                saved=put([i for i, (b, _, q) in enumerate(pieces) if (b, q) in due]) if due else None,
                to=put([due[b, q] for b, _, q in pieces if (b, q) in due]) if due else None,
            )
            for pieces in _rounds(layout, due, min(chunk, CHUNK))
        ],
    )


def _rounds(layout: Layout, due: dict[tuple[int, int], int], chunk: int) -> list[list[tuple[int, int, int]]]:
    """For each round its pieces: (sequence, first position, end)."""
    rounds: list[list[tuple[int, int, int]]] = []
    for b, (start, count) in enumerate(zip(layout.start.tolist(), layout.count.tolist(), strict=True)):
        cuts = sorted({p for owner, p in due if owner == b and p < start + count} | {start + count})
        number, begin = 0, start
        for cut in cuts:
            while begin < cut:
                end = min(begin + chunk, cut)
                if number == len(rounds):
                    rounds.append([])
                rounds[number].append((b, begin, end))
                number, begin = number + 1, end
    return rounds


def _padded(pieces: list[np.ndarray], fill: int) -> np.ndarray:
    table = np.full((len(pieces), max(map(len, pieces))), fill)
    for row, piece in zip(table, pieces, strict=True):
        row[: len(piece)] = piece
    return table


def token_shift(x: torch.Tensor, states: torch.Tensor, plan: RecurrencePlan) -> torch.Tensor:
    before = torch.cat([x, states[plan.slots].to(x.dtype)])[plan.previous]
    states[plan.slots] = x[plan.last].float()
    if plan.saved is not None:
        states[plan.to] = x[plan.saved].float()
    return before


def wkv(
    r: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    log_decay: torch.Tensor,
    bonus: torch.Tensor,
    states: torch.Tensor,
    plan: RecurrencePlan,
) -> torch.Tensor:
    r, k, v, log_decay = (_with_padding(x) for x in (r, k, v, log_decay.expand_as(r)))
    y = torch.empty_like(r)
    for part in plan.rounds:
        # [b, H, T, D]
        rs, ks, vs, ws = (x[part.tokens].transpose(1, 2) for x in (r, k, v, log_decay))
        state = states[part.slots]
        through = ws.cumsum(2)  # of the decays up to and with each token
        before = through - ws
        out = (rs * before.exp()) @ state + (rs * bonus.unsqueeze(1) * ks).sum(-1, keepdim=True) * vs
        if rs.shape[2] > 1:
            between = (before.unsqueeze(3) - through.unsqueeze(2)).clamp(max=0).exp_()  # [b, H, T, T, D]
            scores = torch.einsum("bhti,bhsi,bhtsi->bhts", rs, ks, between)
            out += scores.tril(-1) @ vs
        whole = through[:, :, -1:]
        state = state * whole.exp().transpose(-1, -2) + (ks * (whole - through).exp()).transpose(-1, -2) @ vs
        _keep(state, states, part)
        y[part.tokens] = out.transpose(1, 2)
    return y[:-1]


def delta_rule(
    r: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    log_decay: torch.Tensor,
    removed: torch.Tensor,
    rate: torch.Tensor,
    states: torch.Tensor,
    plan: RecurrencePlan,
) -> torch.Tensor:
    inputs = [_with_padding(x) for x in (r, k, v, log_decay, removed, removed * rate)]
    y = torch.empty_like(inputs[0])
    for part in plan.rounds:
        state = states[part.slots]  # [b, H, value, key]
        for tokens in part.tokens.T:
            rs, ks, vs, ws, qs, ps = (x[tokens] for x in inputs)
            taken = state @ qs.unsqueeze(-1)
            state = state * ws.exp().unsqueeze(-2) - taken * ps.unsqueeze(-2) + vs.unsqueeze(-1) * ks.unsqueeze(-2)
            y[tokens] = (state @ rs.unsqueeze(-1)).squeeze(-1)
        _keep(state, states, part)
    return y[:-1]


def head_norm(
    y: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, eps: float, dtype: torch.dtype
) -> torch.Tensor:
    return F.group_norm(y.flatten(1), y.shape[1], weight, bias, eps).to(dtype)


def _with_padding(x: torch.Tensor) -> torch.Tensor:
    """x with a row of zeros behind it, for places of a round where a sequence has no token."""
    return torch.cat([x, x.new_zeros(1, *x.shape[1:])])


def _keep(state: torch.Tensor, states: torch.Tensor, part: Round) -> None:
    states[part.slots] = state
    if part.saved is not None and len(part.saved):
        states[part.to] = state[part.saved]
