"""What LoRA adapters add to a linear: y[token] += B[slot] (A[slot] x[token]), for the slot of each token's row.

Tokens are grouped by slot once a step, on the device, so that a tile of tokens shares its adapter and every adapter's
matrices are read once. Grids depend on the number of tokens and slots alone, and which token has which adapter is read
from memory: a CUDA graph that holds these kernels stays right. Programs that find no token leave at once.

Matrices of S slots stand in stacks that keep their place: a [S, P, R, K] and b [S, N, R], R being the largest rank, P
the matrices fused into the linear (their outputs end at `ends`), ranks int32 [S] how much of R a slot uses.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from martlet.kernels.cuda import launch
from martlet.kernels.cuda.launch import wait

UNIT = 16  # ranks are worked on in steps of so many
FEW = 64  # up to so many tokens, the sums over inputs are split among programs, which are idle else
SPLITS = 8


@dataclass(frozen=True, slots=True)
class Groups:
    """tokens: int32 [S, T], those of each slot (numbered from 0 here), counts of them: int32 [S]."""

    tokens: torch.Tensor
    counts: torch.Tensor


@dataclass(frozen=True, slots=True)
class Stack:
    """The adapters of one linear, in all slots."""

    a: torch.Tensor
    b: torch.Tensor
    ranks: torch.Tensor
    ends: tuple[int, ...]


@triton.jit
def _group(rows, adapters, tokens, counts, T, BLOCK: tl.constexpr, PDL: tl.constexpr):
    slot = tl.program_id(0)
    wait(PDL)
    count = 0
    for begin in range(0, T, BLOCK):
        t = begin + tl.arange(0, BLOCK)
        row = tl.load(rows + t, mask=t < T, other=-1)
        mine = (tl.load(adapters + row, mask=row >= 0, other=0) == slot + 1).to(tl.int32)
        place = count + tl.cumsum(mine, 0) - 1
        tl.store(tokens + slot * T + place, t, mask=mine > 0)
        count += tl.sum(mine, 0)
    tl.store(counts + slot, count)


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
    R: tl.constexpr, P: tl.constexpr, SPLIT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    STEP: tl.constexpr, PDL: tl.constexpr,
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
                    values = tl.zeros([BLOCK_M, STEP], tl.float32)
                    for split in tl.static_range(SPLIT):
                        values += tl.load(from_low + split * T * (P * R), mask=(m < count)[:, None], other=0.0)
                    at = b + (slot * N + n).to(tl.int64)[None, :] * R + r[:, None]
                    weights = tl.load(at, mask=inside[None, :], other=0.0)
                    acc = tl.dot(values.to(weights.dtype), weights, acc, input_precision="ieee")
        to = y + token[:, None] * Y_STRIDE + n[None, :]
        there = (m < count)[:, None] & (n < N)[None, :]
        tl.store(to, (tl.load(to, mask=there, other=0.0) + acc).to(y.dtype.element_ty), mask=there)


def group(rows: torch.Tensor, adapters: torch.Tensor, slots: int) -> Groups:
    """rows: int32 [T], of each token, -1 for none. adapters: int32 [rows], the slot of each row from 1, 0 for none."""
    tokens = torch.empty(slots, len(rows), dtype=torch.int32, device=rows.device)
    counts = torch.empty(slots, dtype=torch.int32, device=rows.device)
    block = min(1024, triton.next_power_of_2(max(16, len(rows))))
    launch.run(_group, (slots,), rows, adapters, tokens, counts, len(rows), BLOCK=block)
    return Groups(tokens, counts)


def lora(x: torch.Tensor, y: torch.Tensor, stack: Stack, groups: Groups) -> None:
    """Add to y [T, N] in place what the adapters make of x [T, K]; x and y may have rows between theirs."""
    count, k = x.shape
    slots, parts, rank = stack.a.shape[:3]
    split = SPLITS if count <= FEW else 1
    tile = 16 if count <= FEW else 64
    tiles = 1 if count <= FEW else triton.cdiv(count, tile)
    block_k = 64 if x.dtype == torch.float32 else 128
    span = triton.cdiv(triton.cdiv(k, split), block_k) * block_k
    low = torch.empty(split, count, parts * rank, dtype=torch.float32, device=x.device)
    launch.run(
        _shrink, (parts * rank // UNIT * split, slots, tiles),
        x, stack.a, groups.tokens, groups.counts, stack.ranks, low, count, k, span, x.stride(0),
        R=rank, P=parts, SPLIT=split, BLOCK_M=tile, BLOCK_K=block_k, STEP=UNIT,
    )  # fmt: skip
    n = stack.b.shape[1]
    block_n = 128
    first, second = (*stack.ends, n, n)[:2]
    launch.run(
        _expand, (triton.cdiv(n, block_n), slots, tiles),
        low, stack.b, groups.tokens, groups.counts, stack.ranks, y, count, n, first, second, y.stride(0),
        R=rank, P=parts, SPLIT=split, BLOCK_M=tile, BLOCK_N=block_n, STEP=UNIT,
    )  # fmt: skip
