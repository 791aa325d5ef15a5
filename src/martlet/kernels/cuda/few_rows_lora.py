"""Products of up to 64 rows with what LoRA adapters add, in one kernel on Hopper: x W^T + B[slot] (A[slot] x).

A matrix is read as `few_rows` reads it, and A and B of all slots come through the same ring: A as a few more rows
beside a program's first steps, for the inputs that these steps have in shared memory anyway; B as more columns at
its end, with the low-rank values of a row's own slot as their inputs, and zeros as those of other slots.

Low-rank values go from program to program without a barrier: a place that holds no value yet holds bits that none has,
and who needs it asks again until it has another. All programs run at once, and each has as many steps to make between
leaving its values and needing those of others that it should not have to ask twice.

How sums are cut depends on shapes and the number of slots alone: a row's result depends on no other row.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import triton
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.language.extra import cuda as tl_cuda

from martlet.kernels.cuda import few_rows, launch
from martlet.kernels.cuda.few_rows import HALF, ROWS, Tile, _ask_rows, _ask_weights, _blocks, _copy, _input, _store
from martlet.kernels.cuda.layers import activate
from martlet.kernels.cuda.linear import Linear
from martlet.kernels.cuda.lora import Groups, Stack

SHARES = 2  # of the inputs of A's rows, each a program's: every one is a float32 value more to add up, for each rank
MOST = 16  # of A's rows a program
NOTHING = gl.constexpr(-1)  # the bits of a low-rank value that is still to come
NAN = gl.constexpr(0x7FFFFFFF)
BEHIND = gl.constexpr(3)  # steps of a gated product after those of B
LEAST_STEPS = 16  # of a program: with fewer, which nobody measured, it would wait for others' low-rank values
RANKS_OF_SLOTS = (16, 32, 64)  # half a step's columns of B are whole slots


@gluon.jit
def _ask_a(a_desc, a_smem, ready, slot, row, k, here):
    """A's rows of one step, which have a barrier of their own."""
    RANKS: gl.constexpr = a_desc.block_type.shape[0]
    mbarrier.expect(ready.index(slot), RANKS * 2 * HALF * 2, pred=here)
    for half in gl.static_range(2):
        _copy(a_desc, [row, k + half * HALF], ready.index(slot), a_smem.index(slot * 2 + half), pred=here)


@gluon.jit
def _ask_b(b_desc, w_smem, ready, slot, output, column, step, steps, more):
    """Columns of B in place of weights, if `step`, none of the `steps`, is one of the `more` behind them."""
    BYTES: gl.constexpr = b_desc.block_type.shape[0] * 2 * HALF * 2
    k = column + (step - steps) * 2 * HALF
    _ask_weights(b_desc, w_smem, ready, slot, output, output, k, step < steps + more, False, BYTES)


@gluon.jit
def _multiply(x_smem, w_smem, a_smem, at, acc, low, A: gl.constexpr):
    """A step's products, added to acc, and with A to low."""
    for half in gl.static_range(2):
        x = x_smem.index(at * 2 + half)
        acc = warpgroup_mma(x, w_smem.index(at * 2 + half).permute((1, 0)), acc, is_async=True)
        if A:
            low = warpgroup_mma(x, a_smem.index(at * 2 + half).permute((1, 0)), low, is_async=True)
    if A:
        acc, low = warpgroup_mma_wait(0, deps=(acc, low))
    else:
        acc = warpgroup_mma_wait(0, deps=(acc,))
    return acc, low


@gluon.jit
def _low(low, of_row, part, T, PR: gl.constexpr, R: gl.constexpr, LOWS: gl.constexpr, layout: gl.constexpr):
    """Bits of the low-rank values of a part as they are now [LOWS, 64, R], for each row its own slot's, or zeros."""
    number = gl.arange(0, LOWS, gl.SliceLayout(1, gl.SliceLayout(2, layout)))[:, None, None]
    t = gl.arange(0, ROWS, gl.SliceLayout(0, gl.SliceLayout(2, layout)))
    r = gl.arange(0, R, gl.SliceLayout(0, gl.SliceLayout(1, layout)))[None, None, :]
    here = gl.convert_layout(of_row >= 0, t.type.layout)[None, :, None]
    return gl.load(low + (number * T + t[None, :, None]) * PR + part * R + r, mask=here, other=0, volatile=True)


@gluon.jit
def _missing(bits):
    return gl.max(gl.where(bits == NOTHING, 1, 0))


@gluon.jit
def _own(bits, layout: gl.constexpr):
    """bf16 [64, R]: sums of such parts."""
    total = gl.sum(bits.to(gl.float32, bitcast=True), 0)
    return gl.convert_layout(total.to(gl.bfloat16), gl.SliceLayout(1, layout))


@gluon.jit
def _spread(own, of_row, first, R: gl.constexpr, layout: gl.constexpr):
    """[64, HALF]: `own` in the columns of a row's slot, which are R for each slot from `first` on, and zeros."""
    column = first + gl.arange(0, HALF // R, gl.SliceLayout(0, gl.SliceLayout(2, layout)))
    here = of_row[:, None] == column[None, :]
    return gl.reshape(gl.where(here[:, :, None], own[:, None, :], 0.0), [ROWS, HALF])


@gluon.jit(do_not_specialize=["T"])
def _adapted(
    x_desc, w_desc, a_desc, b_desc, out, low, slots, T, N, STEPS, SPLIT, UNITS, SHARES, MORE, END0, END1,
    R: gl.constexpr, P: gl.constexpr, LOWS: gl.constexpr,
    STAGES: gl.constexpr, TURN: gl.constexpr, PDL: gl.constexpr, num_warps: gl.constexpr,
):  # fmt: skip
    OUTPUTS: gl.constexpr = w_desc.block_type.shape[0]
    RANKS: gl.constexpr = a_desc.block_type.shape[0]
    BYTES: gl.constexpr = (OUTPUTS + x_desc.block_type.shape[0]) * 2 * HALF * 2
    STEP: gl.constexpr = 2 * HALF
    IN_SLOT: gl.constexpr = P * R // RANKS  # units
    GROUPS: gl.constexpr = num_warps // 4
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, GROUPS], [16, OUTPUTS // GROUPS, 16])
    unit_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, GROUPS], [16, RANKS // GROUPS, 16])
    # [row, slot, rank] and [share, row, rank], nothing in two threads: these may see it come at different times
    V: gl.constexpr = 32 // num_warps
    own_layout: gl.constexpr = gl.BlockedLayout(
        [1, HALF // R, V], [32 * V // R, 1, R // V], [num_warps, 1, 1], [2, 1, 0]
    )
    low_layout: gl.constexpr = gl.BlockedLayout([LOWS, 1, V], [1, 32 * V // R, R // V], [1, num_warps, 1], [2, 1, 0])
    w_smem = gl.allocate_shared_memory(w_desc.dtype, [STAGES * 2, OUTPUTS, HALF], w_desc.layout)
    x_smem = gl.allocate_shared_memory(x_desc.dtype, [STAGES * 2, ROWS, HALF], x_desc.layout)
    a_smem = gl.allocate_shared_memory(w_desc.dtype, [STAGES * 2, RANKS, HALF], a_desc.layout)
    ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    a_ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for slot in gl.static_range(STAGES):
        mbarrier.init(ready.index(slot), count=1)
        mbarrier.init(a_ready.index(slot), count=1)
    block = gl.program_id(0) // SPLIT
    part = gl.program_id(0) % SPLIT
    output = block * OUTPUTS
    first = part * STEPS // SPLIT
    steps = (part + 1) * STEPS // SPLIT - first
    # A: some of its rows, a unit, in the program's first steps, which are a share of its inputs
    unit = block // SHARES
    since = block % SHARES * steps // SHARES
    mine = gl.where(unit < UNITS, (block % SHARES + 1) * steps // SHARES - since, 0)
    turn = (unit * TURN + since) % steps
    # B: more steps behind the program's last one
    column = part * MORE // SPLIT * STEP
    more = (part + 1) * MORE // SPLIT - part * MORE // SPLIT
    if PDL:
        tl_cuda.gdc_launch_dependents()
    for step in range(STAGES):  # weights wait for nobody
        k = (first + _input(step, turn, steps)) * STEP
        _ask_weights(w_desc, w_smem, ready, step, output, output, k, step < steps, False, BYTES)
        _ask_a(a_desc, a_smem, a_ready, step, unit * RANKS, k, step < mine)
        if step >= steps:
            _ask_b(b_desc, w_smem, ready, step, output, column, step, steps, more)
    if PDL:
        tl_cuda.gdc_wait()
    for step in range(STAGES):
        _ask_rows(x_desc, x_smem, ready, step, (first + _input(step, turn, steps)) * STEP, step < steps)
    t = gl.arange(0, ROWS, gl.SliceLayout(1, gl.SliceLayout(2, own_layout)))
    of_row = gl.load(slots + t, mask=t < T, other=-1)
    of_part = gl.where(output >= END0, 1, 0) + gl.where(output >= END1, 1, 0)
    acc = gl.zeros([ROWS, OUTPUTS], gl.float32, layout)
    of_unit = gl.zeros([ROWS, RANKS], gl.float32, unit_layout)
    for step in range(mine):
        at = step % STAGES
        mbarrier.wait(ready.index(at), step // STAGES & 1)
        mbarrier.wait(a_ready.index(at), step // STAGES & 1)
        acc, of_unit = _multiply(x_smem, w_smem, a_smem, at, acc, of_unit, True)
        coming = step + STAGES
        k = (first + _input(coming, turn, steps)) * STEP
        _ask_weights(w_desc, w_smem, ready, at, output, output, k, coming < steps, False, BYTES)
        _ask_rows(x_desc, x_smem, ready, at, k, coming < steps)
        _ask_a(a_desc, a_smem, a_ready, at, unit * RANKS, k, coming < mine)
        if coming >= steps:
            _ask_b(b_desc, w_smem, ready, at, output, column, coming, steps, more)
    if mine > 0:
        row = gl.arange(0, ROWS, gl.SliceLayout(1, unit_layout))
        r = unit % IN_SLOT * RANKS + gl.arange(0, RANKS, gl.SliceLayout(0, unit_layout))
        here = gl.convert_layout(of_row, row.type.layout) == unit // IN_SLOT
        line = ((block % SHARES * SPLIT + part) * T + row) * (P * R)
        made = of_unit.to(gl.int32, bitcast=True)
        gl.store(low + line[:, None] + r[None, :], gl.where(made == NOTHING, NAN, made), mask=here[:, None])
    late = gl.maximum(mine, steps - STAGES)
    for step in range(mine, late):
        at = step % STAGES
        mbarrier.wait(ready.index(at), step // STAGES & 1)
        acc, of_unit = _multiply(x_smem, w_smem, a_smem, at, acc, of_unit, False)
        k = (first + _input(step + STAGES, turn, steps)) * STEP
        _ask_weights(w_desc, w_smem, ready, at, output, output, k, True, False, BYTES)
        _ask_rows(x_desc, x_smem, ready, at, k, True)
    bits = _low(low, of_row, of_part, T, P * R, R, LOWS, low_layout)  # not looked at before the next loop's end
    for step in range(late, steps):
        at = step % STAGES
        mbarrier.wait(ready.index(at), step // STAGES & 1)
        acc, of_unit = _multiply(x_smem, w_smem, a_smem, at, acc, of_unit, False)
        _ask_b(b_desc, w_smem, ready, at, output, column, step + STAGES, steps, more)
    if more > 0:
        while _missing(bits) > 0:
            bits = _low(low, of_row, of_part, T, P * R, R, LOWS, low_layout)
    own = _own(bits, own_layout)
    for step in range(steps, steps + more):
        at = step % STAGES
        from_slot = (column + (step - steps) * STEP) // R
        for half in range(2):
            x_smem.index(at * 2 + half).store(_spread(own, of_row, from_slot + half * (HALF // R), R, own_layout))
        fence_async_shared()
        mbarrier.wait(ready.index(at), step // STAGES & 1)
        acc, of_unit = _multiply(x_smem, w_smem, a_smem, at, acc, of_unit, False)
        _ask_b(b_desc, w_smem, ready, at, output, column, step + STAGES, steps, more)
    for slot in gl.static_range(STAGES):
        mbarrier.invalidate(ready.index(slot))
        mbarrier.invalidate(a_ready.index(slot))
    _store(out, acc, part * T, output, T, N, layout)


@gluon.jit
def _ask_gated(
    x_desc, w_desc, a_desc, b_desc, x_smem, w_smem, a_smem, ready, at, number, output, output_up, unit, turn, steps,
    mine, middle, more, W: gl.constexpr, X: gl.constexpr,
):  # fmt: skip
    """What number `number` of a gated program's steps reads, in place `at` of the ring: weights and A (W), x (X).

    A in the first `mine`, its unit `unit`. From number `middle` on `more` steps read B, and no x.
    """
    OUTPUTS: gl.constexpr = w_desc.block_type.shape[0]
    RANKS: gl.constexpr = a_desc.block_type.shape[0]
    OF_WEIGHTS: gl.constexpr = 2 * OUTPUTS * 2 * HALF * 2
    OF_ROWS: gl.constexpr = x_desc.block_type.shape[0] * 2 * HALF * 2
    if (number >= middle) & (number < middle + more):
        if W:
            k = (number - middle) * 2 * HALF
            _ask_weights(b_desc, w_smem, ready, at, output, output_up, k, True, True, OF_WEIGHTS)
    else:
        step = gl.where(number < middle, number, number - more)
        here = step < steps
        k = _input(step, turn, steps) * 2 * HALF
        if W:
            beside = number < mine
            mbarrier.expect(ready.index(at), OF_WEIGHTS + OF_ROWS + RANKS * 2 * HALF * 2, pred=beside)
            mbarrier.expect(ready.index(at), OF_WEIGHTS + OF_ROWS, pred=here & (number >= mine))
            for half in gl.static_range(2):
                _copy(
                    a_desc, [unit * RANKS, k + half * HALF], ready.index(at), a_smem.index(at * 2 + half), pred=beside
                )
                for part in gl.static_range(2):
                    _copy(
                        w_desc, [output_up if part else output, k + half * HALF], ready.index(at),
                        w_smem.index((at * 2 + part) * 2 + half), pred=here,
                    )  # fmt: skip
        if X:
            _ask_rows(x_desc, x_smem, ready, at, k, here)


@gluon.jit(do_not_specialize=["T"])
def _adapted_gated(
    x_desc, w_desc, a_desc, b_desc, out, low, slots, T, N, STEPS, UNITS, SHARES, MORE,
    R: gl.constexpr, LOWS: gl.constexpr, ACTIVATION: gl.constexpr, STAGES: gl.constexpr, TURN: gl.constexpr,
    PDL: gl.constexpr, num_warps: gl.constexpr,
):  # fmt: skip
    # One loop for all kinds of steps, which are long here: others would lose a fifth of a microsecond a step that way
    OUTPUTS: gl.constexpr = w_desc.block_type.shape[0]
    RANKS: gl.constexpr = a_desc.block_type.shape[0]
    IN_SLOT: gl.constexpr = 2 * R // RANKS  # units
    GROUPS: gl.constexpr = num_warps // 4
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, GROUPS], [16, OUTPUTS // GROUPS, 16])
    unit_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, GROUPS], [16, RANKS // GROUPS, 16])
    # [row, slot, rank] and [share, row, rank], nothing in two threads: these may see it come at different times
    V: gl.constexpr = 32 // num_warps
    own_layout: gl.constexpr = gl.BlockedLayout(
        [1, HALF // R, V], [32 * V // R, 1, R // V], [num_warps, 1, 1], [2, 1, 0]
    )
    low_layout: gl.constexpr = gl.BlockedLayout([LOWS, 1, V], [1, 32 * V // R, R // V], [1, num_warps, 1], [2, 1, 0])
    w_smem = gl.allocate_shared_memory(w_desc.dtype, [STAGES * 4, OUTPUTS, HALF], w_desc.layout)
    # behind the ring: low-rank values of `up`, where those of `gate` are in place of a step's x
    x_smem = gl.allocate_shared_memory(x_desc.dtype, [(STAGES + 1) * 2, ROWS, HALF], x_desc.layout)
    a_smem = gl.allocate_shared_memory(w_desc.dtype, [STAGES * 2, RANKS, HALF], a_desc.layout)
    ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for slot in gl.static_range(STAGES):
        mbarrier.init(ready.index(slot), count=1)
    block = gl.program_id(0)
    output = block * OUTPUTS
    # A: some of its rows, a unit, in the program's first steps, which are a share of its inputs
    unit = block // SHARES
    since = block % SHARES * STEPS // SHARES
    mine = gl.where(unit < UNITS, (block % SHARES + 1) * STEPS // SHARES - since, 0)
    turn = (unit * TURN + since) % STEPS
    # B: more steps in between, when others' low-rank values should have come, and some steps follow to hide the work
    middle = gl.maximum(mine, STEPS - BEHIND)
    if PDL:
        tl_cuda.gdc_launch_dependents()
    for number in range(STAGES):  # weights wait for nobody
        _ask_gated(x_desc, w_desc, a_desc, b_desc, x_smem, w_smem, a_smem, ready, number, number, output, N + output,
                   unit, turn, STEPS, mine, middle, MORE, True, False)  # fmt: skip
    if PDL:
        tl_cuda.gdc_wait()
    for number in range(STAGES):
        _ask_gated(x_desc, w_desc, a_desc, b_desc, x_smem, w_smem, a_smem, ready, number, number, output, N + output,
                   unit, turn, STEPS, mine, middle, MORE, False, True)  # fmt: skip
    t = gl.arange(0, ROWS, gl.SliceLayout(1, gl.SliceLayout(2, own_layout)))
    of_row = gl.load(slots + t, mask=t < T, other=-1)
    acc = gl.zeros([ROWS, OUTPUTS], gl.float32, layout)
    acc_up = gl.zeros([ROWS, OUTPUTS], gl.float32, layout)
    of_unit = gl.zeros([ROWS, RANKS], gl.float32, unit_layout)
    bits = gl.zeros([LOWS, ROWS, R], gl.int32, low_layout)
    bits_up = bits
    for number in range(STEPS + MORE):
        at = number % STAGES
        is_b = (number >= middle) & (number < middle + MORE)
        up_at = at * 2
        if number == gl.maximum(mine, middle - 2):
            bits = _low(low, of_row, 0, T, 2 * R, R, LOWS, low_layout)
            bits_up = _low(low, of_row, 1, T, 2 * R, R, LOWS, low_layout)
        if is_b:
            while _missing(bits) > 0:
                bits = _low(low, of_row, 0, T, 2 * R, R, LOWS, low_layout)
            while _missing(bits_up) > 0:
                bits_up = _low(low, of_row, 1, T, 2 * R, R, LOWS, low_layout)
            own, own_up = _own(bits, own_layout), _own(bits_up, own_layout)
            for half in range(2):
                from_slot = ((number - middle) * 2 + half) * (HALF // R)
                x_smem.index(at * 2 + half).store(_spread(own, of_row, from_slot, R, own_layout))
                x_smem.index(STAGES * 2 + half).store(_spread(own_up, of_row, from_slot, R, own_layout))
            up_at = up_at * 0 + STAGES * 2  # of the type that it has without the branch
            fence_async_shared()
        mbarrier.wait(ready.index(at), number // STAGES & 1)
        for half in gl.static_range(2):
            x = x_smem.index(at * 2 + half)
            acc = warpgroup_mma(x, w_smem.index(at * 4 + half).permute((1, 0)), acc, is_async=True)
            w = w_smem.index(at * 4 + 2 + half).permute((1, 0))
            acc_up = warpgroup_mma(x_smem.index(up_at + half), w, acc_up, is_async=True)
            # behind the first `mine` steps of what is left there, which makes sums that nobody reads
            of_unit = warpgroup_mma(x, a_smem.index(at * 2 + half).permute((1, 0)), of_unit, is_async=True)
        acc, acc_up, of_unit = warpgroup_mma_wait(0, deps=(acc, acc_up, of_unit))
        if is_b:
            fence_async_shared()  # x comes where low-rank values were
        _ask_gated(x_desc, w_desc, a_desc, b_desc, x_smem, w_smem, a_smem, ready, at, number + STAGES, output,
                   N + output, unit, turn, STEPS, mine, middle, MORE, True, True)  # fmt: skip
        if number == mine - 1:
            row = gl.arange(0, ROWS, gl.SliceLayout(1, unit_layout))
            r = unit % IN_SLOT * RANKS + gl.arange(0, RANKS, gl.SliceLayout(0, unit_layout))
            here = gl.convert_layout(of_row, row.type.layout) == unit // IN_SLOT
            line = (block % SHARES * T + row) * (2 * R)
            made = of_unit.to(gl.int32, bitcast=True)
            gl.store(low + line[:, None] + r[None, :], gl.where(made == NOTHING, NAN, made), mask=here[:, None])
    for slot in gl.static_range(STAGES):
        mbarrier.invalidate(ready.index(slot))
    stored: gl.constexpr = gl.BlockedLayout([1, 8], [256 // OUTPUTS, OUTPUTS // 8], [num_warps, 1], [1, 0])
    result = gl.convert_layout((activate(acc, ACTIVATION) * acc_up).to(out.dtype.element_ty), stored)
    _store(out, result, 0, output, T, N, stored)


@dataclass(frozen=True, slots=True)
class Plan:
    """How a product is made: `few_rows`' tile, how many of A's rows a program has, and in how many shares of inputs."""

    tile: Tile
    ranks: int
    shares: int


def plan_for(x: torch.Tensor, weight: Linear, stack: Stack, groups: Groups, *, gated: bool = False) -> Plan | None:
    """How x [T, K] is multiplied here; None where `few_rows` would not either, or where adapters do not fit in."""
    tile = few_rows.tile_for(x, weight, gated=gated)
    if tile is None or not groups.few:
        return None
    outputs = len(weight.matrix) // (2 if gated else 1)
    steps = triton.cdiv(x.shape[1], 2 * HALF.value)
    if steps // tile.split < LEAST_STEPS:
        return None
    return _plan(tile, outputs, steps, tuple(stack.a.shape[:3]), () if gated else stack.ends, launch.num_sms())


def _plan(
    tile: Tile, outputs: int, steps: int, stack: tuple[int, int, int], ends: tuple[int, ...], sms: int
) -> Plan | None:
    """stack: slots, parts, ranks. All programs run at once, since they wait for each other's low-rank values."""
    blocks, rows = triton.cdiv(outputs, tile.outputs), math.prod(stack)
    if stack[2] not in RANKS_OF_SLOTS or blocks * tile.split > sms or any(end % tile.outputs for end in ends):
        return None
    for shares in (SHARES, 1):
        for ranks in (2 * tile.warps, MOST):  # 8 for each four warps at least
            if rows // ranks * shares <= blocks and steps // tile.split >= shares:
                return Plan(tile, ranks, shares)
    return None


def room(parts: int, rank: int) -> int:
    """Numbers of `low` that a product of so many parts wants."""
    return 2 * SHARES * ROWS.value * parts * rank


def product(
    x: torch.Tensor,
    matrix: torch.Tensor,
    plan: Plan,
    stack: Stack,
    groups: Groups,
    low: torch.Tensor,
    *,
    gated: bool = False,
    activation: str = "",
) -> torch.Tensor:
    """`few_rows.product` of x [T <= 64, K] with its adapters. low: int32 [room], NOTHING everywhere; not afterwards."""
    tile, (rows, k), (slots, parts, rank) = plan.tile, x.shape, stack.a.shape[:3]
    n = len(matrix) // (2 if gated else 1)
    out = x.new_empty(rows, n) if gated else x.new_empty(tile.split, rows, n, dtype=torch.float32)
    first, second = (*stack.ends, n, n)[:2]
    operands = (
        _blocks(x, max(8, triton.next_power_of_2(rows))), _blocks(matrix, tile.outputs),
        _blocks(stack.a.view(-1, k), plan.ranks), _blocks(stack.b.view(len(matrix), -1), tile.outputs),
        out, low, groups.slots, rows, n, triton.cdiv(k, 2 * HALF.value),
    )  # fmt: skip
    units, more = slots * parts * rank // plan.ranks, triton.cdiv(slots * rank, 2 * HALF.value)
    options = {
        "R": rank,
        "LOWS": plan.shares * tile.split,
        "STAGES": tile.stages,
        "TURN": tile.turn,
        "warps": tile.warps,
    }
    programs = triton.cdiv(n, tile.outputs) * tile.split
    if gated:
        launch.run(
            _adapted_gated, (programs,), *operands, units, plan.shares, more, ACTIVATION=activation, **options
        )  # fmt: skip
    else:
        launch.run(
            _adapted, (programs,), *operands, tile.split, units, plan.shares, more, first, second, P=parts, **options
        )  # fmt: skip
    return out
