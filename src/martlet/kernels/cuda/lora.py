"""What LoRA adapters add to a linear: y[token] += B[slot] (A[slot] x[token]), for the slot of each token's row.

Grids depend on the number of tokens and slots alone, and which token has which adapter is read from memory, where
`group` puts it once a step, on the device: a CUDA graph that holds these kernels stays right.

Many tokens are sorted by slot, so that a tile of them shares its adapter and every adapter's matrices are read once
(`shrink`, `expand`); programs that find no token leave at once.

Few tokens cost what the matrices' bytes cost, if launches and short programs cost nothing beside. So A of all slots
lies behind the rows of the linear's matrix, where there are not too many slots, and one product is both: wide [T, N +
S P R], low-rank values of all slots behind the outputs. And a program goes through all slots that some token has, by
ranks of UNIT, for all tokens at once, with the values of others than a token's own slot taken as zero: outputs are read
and written once (`finish`), on the way to the activation where one follows (`finish_activated`).

Matrices of S slots stand in stacks that keep their place: a [S, P, R, K] and b [N, S, R], R being the largest rank, P
the matrices fused into the linear (their outputs end at `ends`), ranks int32 [S] how much of R a slot uses; the rest is
zeros. On Hopper products of up to 64 rows with large matrices are `few_rows_lora`'s.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import triton
import triton.language as tl

from martlet.kernels.cuda import launch
from martlet.kernels.cuda.launch import wait
from martlet.kernels.cuda.layers import activate

UNIT = 16  # ranks are worked on in steps of so many
FEW = 256  # tokens
BESIDE = 512  # ranks of all slots up to which their A lies behind the matrix, and is read whether it has tokens or not
SPLITS = 8  # of the sum over inputs where tokens are few: programs would be idle else
NOTHING = tl.constexpr(-1)  # the bits of a low-rank value that is still to come (`few_rows_lora`)
FILL = 8192  # places of those that a program empties


@dataclass(frozen=True, slots=True)
class Tile:
    """How `finish` is cut: columns of outputs, and ranks at a time, of a program."""

    columns: int
    ranks: int
    warps: int
    stages: int


FINISH = Tile(16, 256, 4, 1)
FINISH_ACTIVATED = Tile(64, 64, 4, 2)


@dataclass(frozen=True, slots=True)
class Groups:
    """tokens: int32 [S, T], those of each slot (numbered from 0 here), counts of them: int32 [S].

    Of few tokens also: slots int32 [T], of each token, -1 for none. units: int32 [1 + S R / UNIT], how many units of
    ranks tokens need, and which: slot * R / UNIT + its number in the slot.
    """

    tokens: torch.Tensor
    counts: torch.Tensor
    slots: torch.Tensor | None = None
    units: torch.Tensor | None = None

    @property
    def few(self) -> bool:
        return self.units is not None


@dataclass(frozen=True, slots=True)
class Stack:
    """The adapters of one linear, in all slots."""

    a: torch.Tensor
    b: torch.Tensor
    ranks: torch.Tensor
    ends: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Low:
    """A x of few tokens: split sums, [split, T, P, R] of each token's own slot, or [1, T, S, P, R] of all."""

    values: torch.Tensor

    @property
    def strides(self) -> tuple[int, int, int]:
        """Of splits, tokens, and slots."""
        split, token, *rest = self.values.stride()
        return split, token, rest[0] if len(rest) == 3 else 0


@triton.jit(do_not_specialize=["T"])
def _group(
    rows, adapters, ranks, tokens, counts, slots, units, room, T, S, ROOM,
    STEPS: tl.constexpr, UNIT: tl.constexpr, BLOCK: tl.constexpr, BLOCK_U: tl.constexpr, FILL: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    slot = tl.program_id(0)
    wait(PDL)
    if slot < S:
        count = 0
        for begin in range(0, T, BLOCK):
            t = begin + tl.arange(0, BLOCK)
            row = tl.load(rows + t, mask=t < T, other=-1)
            mine = (tl.load(adapters + row, mask=row >= 0, other=0) == slot + 1).to(tl.int32)
            place = count + tl.cumsum(mine, 0) - 1
            tl.store(tokens + slot * T + place, t, mask=mine > 0)
            count += tl.sum(mine, 0)
        tl.store(counts + slot, count)
    elif slot > S:
        at = (slot - S - 1) * FILL + tl.arange(0, FILL)
        tl.store(room + at, tl.full([FILL], NOTHING, tl.int32), mask=at < ROOM)
    else:  # where tokens are few: BLOCK holds all
        t = tl.arange(0, BLOCK)
        row = tl.load(rows + t, mask=t < T, other=-1)
        of_token = tl.load(adapters + row, mask=row >= 0, other=0) - 1
        tl.store(slots + t, of_token, mask=t < T)
        count = 0
        for begin in range(0, S * STEPS, BLOCK_U):
            u = begin + tl.arange(0, BLOCK_U)
            of_unit = u // STEPS
            wanted = tl.max((of_token[None, :] == of_unit[:, None]).to(tl.int32), 1)
            wanted *= (u % STEPS * UNIT < tl.load(ranks + of_unit, mask=u < S * STEPS, other=0)).to(tl.int32)
            place = count + tl.cumsum(wanted, 0)
            tl.store(units + place, u, mask=wanted > 0)
            count += tl.sum(wanted, 0)
        tl.store(units, count)


@triton.jit
def _shrink(
    x, a, tokens, counts, ranks, out, T, K, SPAN, X_STRIDE,
    R: tl.constexpr, P: tl.constexpr, SPLIT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
    STEP: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    slot = tl.program_id(1)
    block, split = tl.program_id(0) // SPLIT, tl.program_id(0) % SPLIT
    wait(PDL)
    count = tl.load(counts + slot)
    r = block * STEP + tl.arange(0, STEP)
    if block * STEP % R < tl.load(ranks + slot):
        for first in range(tl.program_id(2) * BLOCK_M, count, tl.num_programs(2) * BLOCK_M):
            m = first + tl.arange(0, BLOCK_M)
            token = tl.load(tokens + slot * T + m, mask=m < count, other=0).to(tl.int64)
            acc = tl.zeros([BLOCK_M, STEP], tl.float32)
            for begin in range(split * SPAN, tl.minimum(K, split * SPAN + SPAN), BLOCK_K):
                k = begin + tl.arange(0, BLOCK_K)
                values = tl.load(
                    x + token[:, None] * X_STRIDE + k[None, :], mask=(m < count)[:, None] & (k < K)[None, :], other=0.0
                )
                at = a + (slot * (P * R) + r).to(tl.int64)[None, :] * K + k[:, None]
                acc = tl.dot(values, tl.load(at, mask=(k < K)[:, None], other=0.0), acc, input_precision="ieee")
            to = out + (split * T + token[:, None]) * (P * R) + r[None, :]
            tl.store(to, acc, mask=(m < count)[:, None])


@triton.jit
def _expand(
    low, b, tokens, counts, ranks, y, T, N, END0, END1, Y_STRIDE,
    R: tl.constexpr, P: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, STEP: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    begin, slot = tl.program_id(0) * BLOCK_N, tl.program_id(1)
    wait(PDL)
    count, rank = tl.load(counts + slot), tl.load(ranks + slot)
    n = begin + tl.arange(0, BLOCK_N)
    for first in range(tl.program_id(2) * BLOCK_M, count, tl.num_programs(2) * BLOCK_M):
        m = first + tl.arange(0, BLOCK_M)
        token = tl.load(tokens + slot * T + m, mask=m < count, other=0).to(tl.int64)
        acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        for part in tl.static_range(P):
            since = 0 if part == 0 else (END0 if part == 1 else END1)
            until = N if part == P - 1 else (END0 if part == 0 else END1)
            if (begin < until) & (begin + BLOCK_N > since):
                inside = (n >= since) & (n < until)
                for step in range(0, rank, STEP):
                    r = step + tl.arange(0, STEP)
                    from_low = low + token[:, None] * (P * R) + part * R + r[None, :]
                    values = tl.load(from_low, mask=(m < count)[:, None], other=0.0)
                    at = b + (n.to(tl.int64) * tl.num_programs(1) + slot)[None, :] * R + r[:, None]
                    weights = tl.load(at, mask=inside[None, :], other=0.0)
                    acc = tl.dot(values.to(weights.dtype), weights, acc, input_precision="ieee")
        to = y + token[:, None] * Y_STRIDE + n[None, :]
        there = (m < count)[:, None] & (n < N)[None, :]
        tl.store(to, (tl.load(to, mask=there, other=0.0) + acc).to(y.dtype.element_ty), mask=there)


@triton.jit
def _units(units, step, count, STEPS: tl.constexpr, UNIT: tl.constexpr, BLOCK_R: tl.constexpr):
    """BLOCK_R ranks from `step` on of those in `units`: their slots, their numbers there, whether there are so many."""
    j = step + tl.arange(0, BLOCK_R)
    some = j < count
    unit = tl.load(units + 1 + j // UNIT, mask=some, other=0)
    return unit // STEPS, unit % STEPS * UNIT + j % UNIT, some


@triton.jit
def _more(
    acc, low, b, t, n, mine, inside, slot, r, part, B_STRIDE, LOW_SPLIT, LOW_TOKEN, LOW_SLOT,
    R: tl.constexpr, SPLIT: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    """acc [T, N] plus B times low-rank values of a part: ranks r of slots, `mine` where that is the token's slot."""
    at = tl.max_contiguous(tl.multiple_of(slot * LOW_SLOT + part * R + r, UNIT), UNIT)
    values = tl.load(low + t[:, None] * LOW_TOKEN + at[None, :], mask=mine, other=0.0)
    for split in tl.static_range(1, SPLIT):
        values += tl.load(low + split * LOW_SPLIT + t[:, None] * LOW_TOKEN + at[None, :], mask=mine, other=0.0)
    at = tl.max_contiguous(tl.multiple_of(slot * R + r, UNIT), UNIT)
    weights = tl.load(b + n.to(tl.int64)[:, None] * B_STRIDE + at[None, :], mask=inside, other=0.0)
    return tl.dot(values.to(weights.dtype), tl.trans(weights), acc, input_precision="ieee")


@triton.jit(do_not_specialize=["T"])
def _finish(
    y, low, b, slots, units, out, T, N, END0, END1, Y_STRIDE, B_STRIDE, LOW_SPLIT, LOW_TOKEN, LOW_SLOT, OUT_STRIDE,
    R: tl.constexpr, SPLIT: tl.constexpr, ADD: tl.constexpr, UNIT: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    begin = tl.program_id(0) * BLOCK_N
    n = begin + tl.arange(0, BLOCK_N)
    t = tl.program_id(1) * BLOCK_T + tl.arange(0, BLOCK_T)
    there = (t < T)[:, None] & (n < N)[None, :]
    wait(PDL)
    of_token = tl.load(slots + t, mask=t < T, other=-1)
    count = tl.load(units) * UNIT
    acc = tl.load(y + t[:, None] * Y_STRIDE + n[None, :], mask=there, other=0.0).to(tl.float32)
    if ADD:
        acc += tl.load(out + t[:, None] * OUT_STRIDE + n[None, :], mask=there, other=0.0).to(tl.float32)
    last = tl.minimum(begin + BLOCK_N, N) - 1
    first_part = (begin >= END0).to(tl.int32) + (begin >= END1).to(tl.int32)
    last_part = (last >= END0).to(tl.int32) + (last >= END1).to(tl.int32)
    for part in range(first_part, last_part + 1):
        since = tl.where(part == 0, 0, tl.where(part == 1, END0, END1))
        until = tl.where(part == 0, END0, tl.where(part == 1, END1, N))
        inside = (n >= since) & (n < until)
        for step in range(0, count, BLOCK_R):
            slot, r, some = _units(units, step, count, R // UNIT, UNIT, BLOCK_R)
            mine = (of_token[:, None] == slot[None, :]) & some[None, :]
            acc = _more(
                acc, low, b, t, n, mine, inside[:, None] & some[None, :], slot, r, part, B_STRIDE,
                LOW_SPLIT, LOW_TOKEN, LOW_SLOT, R, SPLIT, UNIT,
            )  # fmt: skip
    tl.store(out + t[:, None] * OUT_STRIDE + n[None, :], acc.to(out.dtype.element_ty), mask=there)


@triton.jit(do_not_specialize=["T"])
def _finish_activated(
    y, low, b, slots, units, out, T, HIDDEN, Y_STRIDE, B_STRIDE, LOW_SPLIT, LOW_TOKEN, LOW_SLOT,
    R: tl.constexpr, SPLIT: tl.constexpr, GATED: tl.constexpr, ACTIVATION: tl.constexpr, UNIT: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    t = tl.program_id(1) * BLOCK_T + tl.arange(0, BLOCK_T)
    there = (t < T)[:, None] & (n < HIDDEN)[None, :]
    wait(PDL)
    of_token = tl.load(slots + t, mask=t < T, other=-1)
    count = tl.load(units) * UNIT
    line = y + t[:, None] * Y_STRIDE + n[None, :]
    acc = tl.load(line, mask=there, other=0.0).to(tl.float32)
    if GATED:
        acc_up = tl.load(line + HIDDEN, mask=there, other=0.0).to(tl.float32)
    for step in range(0, count, BLOCK_R):
        slot, r, some = _units(units, step, count, R // UNIT, UNIT, BLOCK_R)
        mine = (of_token[:, None] == slot[None, :]) & some[None, :]
        inside = (n < HIDDEN)[:, None] & some[None, :]
        acc = _more(
            acc, low, b, t, n, mine, inside, slot, r, 0, B_STRIDE, LOW_SPLIT, LOW_TOKEN, LOW_SLOT, R, SPLIT, UNIT
        )
        if GATED:
            acc_up = _more(
                acc_up, low, b, t, HIDDEN + n, mine, inside, slot, r, 1, B_STRIDE, LOW_SPLIT, LOW_TOKEN, LOW_SLOT,
                R, SPLIT, UNIT,
            )  # fmt: skip
    result = activate(acc, ACTIVATION)
    if GATED:
        result *= acc_up
    tl.store(out + t[:, None] * HIDDEN + n[None, :], result.to(out.dtype.element_ty), mask=there)


def group(
    rows: torch.Tensor, adapters: torch.Tensor, ranks: torch.Tensor, rank: int, room: torch.Tensor | None = None
) -> Groups:
    """rows: int32 [T], of each token, -1 for none. adapters: int32 [rows], the slot of each row from 1, 0 for none.

    ranks: int32 [S], that slots use of `rank`. room: int32, of few tokens, to be NOTHING everywhere.
    """
    count, slots, steps = len(rows), len(ranks), rank // UNIT
    few = count <= FEW
    tokens = torch.empty(slots, count, dtype=torch.int32, device=rows.device)
    counts = torch.empty(slots, dtype=torch.int32, device=rows.device)
    of_tokens = torch.empty(count, dtype=torch.int32, device=rows.device) if few else None
    units = torch.empty(1 + slots * steps, dtype=torch.int32, device=rows.device) if few else None
    assert few or room is None
    size = 0 if room is None else room.numel()
    launch.run(
        _group, (slots + few + triton.cdiv(size, FILL),),
        rows, adapters, ranks, tokens, counts, counts if of_tokens is None else of_tokens,
        counts if units is None else units, counts if room is None else room, count, slots, size, STEPS=steps,
        UNIT=UNIT, BLOCK=FEW if few else 1024, BLOCK_U=64, FILL=FILL,
    )  # fmt: skip
    return Groups(tokens, counts, of_tokens, units)


def low_ranks(x: torch.Tensor, stack: Stack, groups: Groups) -> Low:
    """A x of x [T, K], for few tokens or many."""
    count, k = x.shape
    slots, parts, rank = stack.a.shape[:3]
    split = SPLITS if groups.units is not None else 1
    tile = 16 if groups.units is not None else 64
    tiles = 1 if groups.units is not None else triton.cdiv(count, tile)
    block_k = 64 if x.dtype == torch.float32 else 128
    span = triton.cdiv(triton.cdiv(k, split), block_k) * block_k
    low = torch.empty(split, count, parts, rank, dtype=torch.float32, device=x.device)
    launch.run(
        _shrink, (parts * rank // UNIT * split, slots, tiles),
        x, stack.a, groups.tokens, groups.counts, stack.ranks, low, count, k, span, x.stride(0),
        R=rank, P=parts, SPLIT=split, BLOCK_M=tile, BLOCK_K=block_k, STEP=UNIT,
    )  # fmt: skip
    return Low(low)


def parted(wide: torch.Tensor, stack: Stack) -> tuple[torch.Tensor, Low]:
    """(outputs [T, N], low-rank values) of few tokens' product with a matrix and A of all slots behind it."""
    slots, parts, rank = stack.a.shape[:3]
    n = len(stack.b)
    return wide[:, :n], Low(wide[:, n:].unflatten(1, (slots, parts, rank))[None])


def lora(x: torch.Tensor, y: torch.Tensor, stack: Stack, groups: Groups) -> None:
    """Add to y [T, N] in place what the adapters make of x [T, K]; x and y may have rows between theirs."""
    low = low_ranks(x, stack, groups)
    if groups.units is not None:
        finish(y, low, stack, groups, out=y)
        return
    count, n = y.shape
    slots, parts, rank = stack.a.shape[:3]
    block_n, tile = 128, 64
    first, second = (*stack.ends, n, n)[:2]
    launch.run(
        _expand, (triton.cdiv(n, block_n), slots, triton.cdiv(count, tile)),
        low.values, stack.b, groups.tokens, groups.counts, stack.ranks, y, count, n, first, second, y.stride(0),
        R=rank, P=parts, BLOCK_M=tile, BLOCK_N=block_n, STEP=UNIT,
    )  # fmt: skip


def finish(
    y: torch.Tensor,
    low: Low,
    stack: Stack,
    groups: Groups,
    out: torch.Tensor | None = None,
    onto: bool = False,
) -> torch.Tensor:
    """y [T, N] of few tokens plus what adapters add, in `out` (y itself perhaps) if given; onto: added to it."""
    assert groups.units is not None and groups.slots is not None
    count, n = y.shape
    out = y.new_empty(count, n) if out is None else out
    first, second = (*stack.ends, n, n)[:2]
    tokens, tile = _tokens(count), FINISH if len(low.values) == 1 else _of_split(FINISH)
    launch.run(
        _finish, (triton.cdiv(n, tile.columns), triton.cdiv(count, tokens)),
        y, low.values, stack.b, groups.slots, groups.units, out, count, n, first, second, y.stride(0),
        stack.b.stride(0), *low.strides, out.stride(0),
        R=stack.b.shape[2], SPLIT=len(low.values), ADD=onto, UNIT=UNIT, BLOCK_T=tokens, BLOCK_N=tile.columns,
        BLOCK_R=tile.ranks, warps=tile.warps, stages=tile.stages,
    )  # fmt: skip
    return out


def finish_activated(y: torch.Tensor, low: Low, stack: Stack, groups: Groups, kind: str, gated: bool) -> torch.Tensor:
    """`layers.activation` of what `finish` gives, in the matrices' dtype."""
    assert groups.units is not None and groups.slots is not None
    count, hidden = y.shape[0], y.shape[1] // (2 if gated else 1)
    out = stack.b.new_empty(count, hidden)
    tokens, tile = _tokens(count), FINISH_ACTIVATED if len(low.values) == 1 else _of_split(FINISH_ACTIVATED)
    launch.run(
        _finish_activated, (triton.cdiv(hidden, tile.columns), triton.cdiv(count, tokens)),
        y, low.values, stack.b, groups.slots, groups.units, out, count, hidden, y.stride(0),
        stack.b.stride(0), *low.strides,
        R=stack.b.shape[2], SPLIT=len(low.values), GATED=gated, ACTIVATION=kind, UNIT=UNIT, BLOCK_T=tokens,
        BLOCK_N=tile.columns, BLOCK_R=tile.ranks, warps=tile.warps, stages=tile.stages,
    )  # fmt: skip
    return out


def _tokens(count: int) -> int:
    """Tokens of a program."""
    return 16 if count <= 16 else 64


def _of_split(tile: Tile) -> Tile:
    """The tile where low-rank values come in parts: these take registers."""
    return replace(tile, ranks=2 * UNIT, stages=1)
