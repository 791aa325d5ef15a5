"""Products of up to 64 rows with what LoRA adapters add, in one kernel on Hopper: x W^T + B[slot] (A[slot] x).

B is more columns of the matrix, whose inputs are the low-rank values of a row's own slot, and zeros as those of other
slots. A is more rows of it: a product has fewer programs than there are multiprocessors, so some more make A's rows, in
shares of the inputs, and have left their values long before the others come to B. Where there is no room for those, A's
rows lie beside the first steps of all programs.

How sums are cut depends on shapes and the number of slots alone: a row's result depends on no other row.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import triton

from martlet.kernels.cuda import few_rows, launch
from martlet.kernels.cuda.few_rows import HALF, ROWS, Tile, _blocks
from martlet.kernels.cuda.few_rows_adapted import adapted, adapted_beside, adapted_gated
from martlet.kernels.cuda.linear import Linear
from martlet.kernels.cuda.lora import Groups, Stack

SHARES = (4, 2, 1)  # of the inputs of A's rows, each a program's: every one is a value more to add up, for each rank
BESIDE = ((8, 2), (16, 2), (8, 1), (16, 1))  # of A's rows beside a program's steps, and shares of inputs
LEAST_STEPS = 16  # of a program: with fewer, which nobody measured, it would wait for others' low-rank values
RANKS_OF_SLOTS = (16, 32, 64)  # half a step's columns of B are whole slots


@dataclass(frozen=True, slots=True)
class Plan:
    """How a product is made: `few_rows`' tile, and A's rows in how many shares of inputs.

    makers: programs that make A; 0 where it is made beside the others' steps, `ranks` of its rows a program.
    """

    tile: Tile
    shares: int
    makers: int = 0
    ranks: int = 0


def plan_for(x: torch.Tensor, weight: Linear, stack: Stack, groups: Groups, *, gated: bool = False) -> Plan | None:
    """How x [T, K] is multiplied here; None where `few_rows` would not either, or where adapters do not fit in."""
    tile = few_rows.tile_for(x, weight, gated=gated)
    if tile is None or weight.wide is None or not groups.few:
        return None
    outputs = len(weight.matrix) // (2 if gated else 1)
    steps = triton.cdiv(x.shape[1], 2 * HALF.value)
    if steps // tile.split < LEAST_STEPS:
        return None
    return _plan(tile, outputs, steps, tuple(stack.a.shape[:3]), gated, stack.ends, launch.num_sms())


def _plan(
    tile: Tile, outputs: int, steps: int, stack: tuple[int, int, int], gated: bool, ends: tuple[int, ...], sms: int
) -> Plan | None:
    """stack: slots, parts, ranks. All programs run at once, since they wait for each other's low-rank values."""
    blocks, rows = triton.cdiv(outputs, tile.outputs), math.prod(stack)
    more = triton.cdiv(stack[0] * stack[2], 2 * HALF.value)
    if stack[2] not in RANKS_OF_SLOTS or (
        not gated and (any(end % tile.outputs for end in ends) or more > tile.stages)
    ):
        return None
    units = triton.cdiv(rows, tile.outputs * (2 if gated else 1))
    if tile.split == 1:
        for shares in SHARES:
            if units * shares + blocks <= sms and steps >= shares:
                return Plan(tile, shares, makers=units * shares)
    if gated or blocks * tile.split > sms:
        return None
    for ranks, shares in BESIDE:
        if ranks >= 2 * tile.warps and rows // ranks * shares <= blocks and steps // tile.split >= shares:
            return Plan(tile, shares, ranks=ranks)
    return None


def room(parts: int, rank: int) -> int:
    """Numbers of `low` that a product of so many parts wants."""
    return 4 * ROWS.value * parts * rank  # shares, or twice as many with inputs split in two


def product(
    x: torch.Tensor,
    wide: torch.Tensor,
    plan: Plan,
    stack: Stack,
    groups: Groups,
    low: torch.Tensor,
    *,
    gated: bool = False,
    activation: str = "",
) -> torch.Tensor:
    """`few_rows.product` of x [T <= 64, K] with its adapters. wide: the matrix, and A of all slots behind it.

    low: int32 [room], NOTHING everywhere; not afterwards.
    """
    tile, (rows, k), (slots, parts, rank), n = plan.tile, x.shape, stack.a.shape[:3], len(stack.b)
    outputs = n // (2 if gated else 1)
    out = x.new_empty(rows, outputs) if gated else x.new_empty(tile.split, rows, outputs, dtype=torch.float32)
    first, second = (*stack.ends, n, n)[:2]
    of_x, of_b = _blocks(x, max(8, triton.next_power_of_2(rows))), _blocks(stack.b.view(n, -1), tile.outputs)
    places = (out, low, groups.slots, rows, outputs, triton.cdiv(k, 2 * HALF.value))
    programs, more = triton.cdiv(outputs, tile.outputs) * tile.split, triton.cdiv(slots * rank, 2 * HALF.value)
    options = {"R": rank, "STAGES": tile.stages, "warps": tile.warps}
    if gated:
        launch.run(
            adapted_gated, (plan.makers + programs,), of_x, _blocks(wide, tile.outputs), of_b, *places, plan.makers,
            more, SHARES=plan.shares, ACTIVATION=activation, TURN=tile.turn, **options,
        )  # fmt: skip
    elif plan.makers:
        launch.run(
            adapted, (plan.makers + programs,), of_x, _blocks(wide, tile.outputs), of_b, *places, plan.makers, more,
            first, second, P=parts, SHARES=plan.shares, **options,
        )  # fmt: skip
    else:
        launch.run(
            adapted_beside, (programs,), of_x, _blocks(wide[:n], tile.outputs),
            _blocks(stack.a.view(-1, k), plan.ranks), of_b, *places, tile.split, slots * parts * rank // plan.ranks,
            plan.shares, more, first, second, P=parts, SHARES=plan.shares * tile.split, **options,
        )  # fmt: skip
    return out
