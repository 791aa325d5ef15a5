"""Kernels of `few_rows_lora`: a matrix is read as `few_rows` reads it, A and B of all slots through the same ring.

Low-rank values go from program to program without a barrier: a place that holds no value yet holds bits that none has,
and who needs it asks again until it has another, for all values at once: one after the other each would take as long.
They are the left side of B's products, in registers, with zeros as the values of other slots than a row's own.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, warpgroup_mma, warpgroup_mma_wait
from triton.language.extra import cuda as tl_cuda

from martlet.kernels.cuda.few_rows import HALF, ROWS, _ask_rows, _ask_weights, _copy, _input, _store
from martlet.kernels.cuda.layers import activate
from martlet.kernels.cuda.lora import NOTHING

NAN = gl.constexpr(0x7FFFFFFF)


@gluon.constexpr_function
def _left_side(rank, slots, warps):
    """[64, slots, rank], such that [64, slots * rank] is the left side of a warp group's product as it is."""
    ranks = [[0, 0, 8 << i] for i in range((rank // 8).bit_length() - 1)]
    of_slots = [[0, 1 << i, 0] for i in range(slots.bit_length() - 1)]
    return gl.DistributedLinearLayout(
        [[0, 0, 1], [8, 0, 0], *ranks, *of_slots],
        [[0, 0, 2], [0, 0, 4], [1, 0, 0], [2, 0, 0], [4, 0, 0]],
        [[16, 0, 0], [32, 0, 0]] + [[0, 0, 0]] * (warps // 8),
        [],
        [64, slots, rank],
    )


@gluon.constexpr_function
def _of_shares(rank, shares, warps):
    """[shares, 64, rank], nothing in two threads: these may see it come at different times."""
    v = 32 // warps
    return gl.BlockedLayout([shares, 1, v], [1, 32 * v // rank, rank // v], [1, warps, 1], [2, 1, 0])


@gluon.jit
def _slots(slots, T, layout: gl.constexpr):
    """Of each row, -1 where it has none."""
    t = gl.arange(0, ROWS, layout)
    return gl.load(slots + t, mask=t < T, other=-1)


@gluon.jit
def _low(low, here, T, part, PR: gl.constexpr, R: gl.constexpr, SHARES: gl.constexpr, layout: gl.constexpr):
    """Bits of a part's low-rank values as they are now [SHARES, 64, R]; of rows that have no slot (`here`) zeros."""
    share = gl.arange(0, SHARES, gl.SliceLayout(1, gl.SliceLayout(2, layout)))[:, None, None]
    t = gl.arange(0, ROWS, gl.SliceLayout(0, gl.SliceLayout(2, layout)))[None, :, None]
    r = gl.arange(0, R, gl.SliceLayout(0, gl.SliceLayout(1, layout)))[None, None, :]
    return gl.load(low + (share * T + t) * PR + part * R + r, mask=here[None, :, None], other=0, volatile=True)


@gluon.jit
def _own(
    bits, low, here, T, part,
    PR: gl.constexpr, R: gl.constexpr, SHARES: gl.constexpr, layout: gl.constexpr, left: gl.constexpr,
):  # fmt: skip
    """bf16 [64, R]: sums of shares of low-rank values, of which `bits` have come."""
    while gl.max(gl.where(bits == NOTHING, 1, 0)) > 0:
        bits = _low(low, here, T, part, PR, R, SHARES, layout)
    total = gl.sum(bits.to(gl.float32, bitcast=True), 0)
    return gl.convert_layout(total.to(gl.bfloat16), gl.SliceLayout(1, left))


@gluon.jit
def _expand(acc, own, of_row, column, w_smem, at, R: gl.constexpr, layout: gl.constexpr):
    """acc plus a step of B, its columns from `column` on and in w_smem from `at` on, times the low-rank values."""
    operand: gl.constexpr = gl.DotOperandLayout(0, acc.type.layout, 2)
    for half in gl.static_range(2):
        slot = (column + half * HALF) // R + gl.arange(0, HALF // R, gl.SliceLayout(0, gl.SliceLayout(2, layout)))
        here = of_row[:, None] == slot[None, :]
        values = gl.reshape(gl.where(here[:, :, None], own[:, None, :], 0.0), [ROWS, HALF])
        weights = w_smem.index(at + half).permute((1, 0))
        acc = warpgroup_mma(gl.convert_layout(values, operand), weights, acc, is_async=True)
        acc = warpgroup_mma_wait(0, deps=(acc,))
    return acc


@gluon.jit
def _leave(low, made, of_row, since, line, T, PR: gl.constexpr, layout: gl.constexpr):
    """Products with A's rows from `since` on, for each row those of its own slot, into lines from `line` on."""
    row = gl.arange(0, ROWS, gl.SliceLayout(1, layout))
    r = since + gl.arange(0, made.shape[1], gl.SliceLayout(0, layout))
    here = gl.convert_layout(of_row, row.type.layout)[:, None] == (r // PR)[None, :]
    bits = made.to(gl.int32, bitcast=True)
    gl.store(low + (line + row)[:, None] * PR + (r % PR)[None, :], gl.where(bits == NOTHING, NAN, bits), mask=here)


@gluon.jit
def _ask_b(b_desc, w_smem, ready, at, output, column, step, steps, more):
    """Columns of B in place of weights, if `step`, none of the `steps`, is one of the `more` behind them."""
    BYTES: gl.constexpr = b_desc.block_type.shape[0] * 2 * HALF * 2
    k = column + (step - steps) * 2 * HALF
    _ask_weights(b_desc, w_smem, ready, at, output, output, k, step < steps + more, False, BYTES)


@gluon.jit
def _multiply(x_smem, w_smem, at, acc):
    for half in gl.static_range(2):
        w = w_smem.index(at * 2 + half).permute((1, 0))
        acc = warpgroup_mma(x_smem.index(at * 2 + half), w, acc, is_async=True)
    return warpgroup_mma_wait(0, deps=(acc,))


@gluon.jit(do_not_specialize=["T"])
def adapted(
    x_desc, w_desc, b_desc, out, low, slots, T, N, STEPS, MAKERS, MORE, END0, END1,
    R: gl.constexpr, P: gl.constexpr, SHARES: gl.constexpr, STAGES: gl.constexpr, PDL: gl.constexpr,
    num_warps: gl.constexpr,
):  # fmt: skip
    """A, behind w's first N rows, by the first MAKERS programs; B behind the other programs' last step."""
    OUTPUTS: gl.constexpr = w_desc.block_type.shape[0]
    BYTES: gl.constexpr = (OUTPUTS + x_desc.block_type.shape[0]) * 2 * HALF * 2
    STEP: gl.constexpr = 2 * HALF
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [num_warps, 1], [16, OUTPUTS, 16])
    left: gl.constexpr = _left_side(R, HALF // R, num_warps)
    of_shares: gl.constexpr = _of_shares(R, SHARES, num_warps)
    w_smem = gl.allocate_shared_memory(w_desc.dtype, [STAGES * 2, OUTPUTS, HALF], w_desc.layout)
    x_smem = gl.allocate_shared_memory(x_desc.dtype, [STAGES * 2, ROWS, HALF], x_desc.layout)
    ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for slot in gl.static_range(STAGES):
        mbarrier.init(ready.index(slot), count=1)
    program = gl.program_id(0)
    makes_a = program < MAKERS
    unit, share = program // SHARES * OUTPUTS, program % SHARES
    output = gl.where(makes_a, N + unit, (program - MAKERS) * OUTPUTS)
    first = gl.where(makes_a, share * STEPS // SHARES, 0)
    steps = gl.where(makes_a, (share + 1) * STEPS // SHARES - first, STEPS)
    more = gl.where(makes_a, 0, MORE)
    if PDL:
        tl_cuda.gdc_launch_dependents()
    for step in range(STAGES):  # weights wait for nobody
        _ask_weights(w_desc, w_smem, ready, step, output, output, (first + step) * STEP, step < steps, False, BYTES)
        if step >= steps:
            _ask_b(b_desc, w_smem, ready, step, output, 0, step, steps, more)
    if PDL:
        tl_cuda.gdc_wait()
    for step in range(STAGES):
        _ask_rows(x_desc, x_smem, ready, step, (first + step) * STEP, step < steps)
    of_row = _slots(slots, T, gl.SliceLayout(1, gl.SliceLayout(2, left)))
    here = _slots(slots, T, gl.SliceLayout(0, gl.SliceLayout(2, of_shares))) >= 0
    acc = gl.zeros([ROWS, OUTPUTS], gl.float32, layout)
    late = gl.where(makes_a, steps, gl.maximum(steps - STAGES, 0))
    for step in range(late):
        at = step % STAGES
        mbarrier.wait(ready.index(at), step // STAGES & 1)
        acc = _multiply(x_smem, w_smem, at, acc)
        k = (first + step + STAGES) * STEP
        _ask_weights(w_desc, w_smem, ready, at, output, output, k, step + STAGES < steps, False, BYTES)
        _ask_rows(x_desc, x_smem, ready, at, k, step + STAGES < steps)
    if makes_a:
        _leave(low, acc, of_row, unit, share * T, T, P * R, layout)
    else:
        part = gl.where(output >= END0, 1, 0) + gl.where(output >= END1, 1, 0)
        bits = _low(low, here, T, part, P * R, R, SHARES, of_shares)  # not looked at before the next loop's end
        for step in range(late, steps):
            at = step % STAGES
            mbarrier.wait(ready.index(at), step // STAGES & 1)
            acc = _multiply(x_smem, w_smem, at, acc)
            _ask_b(b_desc, w_smem, ready, at, output, 0, step + STAGES, steps, more)
        own = _own(bits, low, here, T, part, P * R, R, SHARES, of_shares, left)
        for step in range(steps, steps + more):
            at = step % STAGES
            mbarrier.wait(ready.index(at), step // STAGES & 1)
            acc = _expand(acc, own, of_row, (step - steps) * STEP, w_smem, at * 2, R, left)
        _store(out, acc, 0, output, T, N, layout)
    for slot in gl.static_range(STAGES):
        mbarrier.invalidate(ready.index(slot))


@gluon.jit
def _ask_a(a_desc, a_smem, ready, at, row, k, here):
    """A's rows of one step, which have a barrier of their own."""
    RANKS: gl.constexpr = a_desc.block_type.shape[0]
    mbarrier.expect(ready.index(at), RANKS * 2 * HALF * 2, pred=here)
    for half in gl.static_range(2):
        _copy(a_desc, [row, k + half * HALF], ready.index(at), a_smem.index(at * 2 + half), pred=here)


@gluon.jit(do_not_specialize=["T"])
def adapted_beside(
    x_desc, w_desc, a_desc, b_desc, out, low, slots, T, N, STEPS, SPLIT, UNITS, UNIT_SHARES, MORE, END0, END1,
    R: gl.constexpr, P: gl.constexpr, SHARES: gl.constexpr, STAGES: gl.constexpr, PDL: gl.constexpr,
    num_warps: gl.constexpr,
):  # fmt: skip
    """A as a few more rows beside a program's first steps, for the inputs that these have anyway; B behind its last.

    All programs run at once, and each has as many steps to make between leaving its values and needing those of others
    that it should not have to ask twice.
    """
    OUTPUTS: gl.constexpr = w_desc.block_type.shape[0]
    RANKS: gl.constexpr = a_desc.block_type.shape[0]
    BYTES: gl.constexpr = (OUTPUTS + x_desc.block_type.shape[0]) * 2 * HALF * 2
    STEP: gl.constexpr = 2 * HALF
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [num_warps, 1], [16, OUTPUTS, 16])
    unit_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [num_warps, 1], [16, RANKS, 16])
    left: gl.constexpr = _left_side(R, HALF // R, num_warps)
    of_shares: gl.constexpr = _of_shares(R, SHARES, num_warps)
    w_smem = gl.allocate_shared_memory(w_desc.dtype, [STAGES * 2, OUTPUTS, HALF], w_desc.layout)
    x_smem = gl.allocate_shared_memory(x_desc.dtype, [STAGES * 2, ROWS, HALF], x_desc.layout)
    a_smem = gl.allocate_shared_memory(w_desc.dtype, [STAGES * 2, RANKS, HALF], a_desc.layout)
    ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    a_ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for slot in gl.static_range(STAGES):
        mbarrier.init(ready.index(slot), count=1)
        mbarrier.init(a_ready.index(slot), count=1)
    block, part = gl.program_id(0) // SPLIT, gl.program_id(0) % SPLIT
    output = block * OUTPUTS
    first = part * STEPS // SPLIT
    steps = (part + 1) * STEPS // SPLIT - first
    # A: some of its rows, a unit, in the program's first steps, which are a share of its inputs
    unit, share = block // UNIT_SHARES, block % UNIT_SHARES
    turn = share * steps // UNIT_SHARES
    mine = gl.where(unit < UNITS, (share + 1) * steps // UNIT_SHARES - turn, 0)
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
    of_row = _slots(slots, T, gl.SliceLayout(1, gl.SliceLayout(2, left)))
    here = _slots(slots, T, gl.SliceLayout(0, gl.SliceLayout(2, of_shares))) >= 0
    acc = gl.zeros([ROWS, OUTPUTS], gl.float32, layout)
    of_unit = gl.zeros([ROWS, RANKS], gl.float32, unit_layout)
    for step in range(mine):
        at = step % STAGES
        mbarrier.wait(ready.index(at), step // STAGES & 1)
        mbarrier.wait(a_ready.index(at), step // STAGES & 1)
        for half in gl.static_range(2):
            x = x_smem.index(at * 2 + half)
            acc = warpgroup_mma(x, w_smem.index(at * 2 + half).permute((1, 0)), acc, is_async=True)
            of_unit = warpgroup_mma(x, a_smem.index(at * 2 + half).permute((1, 0)), of_unit, is_async=True)
        acc, of_unit = warpgroup_mma_wait(0, deps=(acc, of_unit))
        coming = step + STAGES
        k = (first + _input(coming, turn, steps)) * STEP
        _ask_weights(w_desc, w_smem, ready, at, output, output, k, coming < steps, False, BYTES)
        _ask_rows(x_desc, x_smem, ready, at, k, coming < steps)
        _ask_a(a_desc, a_smem, a_ready, at, unit * RANKS, k, coming < mine)
        if coming >= steps:
            _ask_b(b_desc, w_smem, ready, at, output, column, coming, steps, more)
    if mine > 0:
        _leave(low, of_unit, of_row, unit * RANKS, (share * SPLIT + part) * T, T, P * R, unit_layout)
    late = gl.maximum(mine, steps - STAGES)
    for step in range(mine, late):
        at = step % STAGES
        mbarrier.wait(ready.index(at), step // STAGES & 1)
        acc = _multiply(x_smem, w_smem, at, acc)
        k = (first + _input(step + STAGES, turn, steps)) * STEP
        _ask_weights(w_desc, w_smem, ready, at, output, output, k, True, False, BYTES)
        _ask_rows(x_desc, x_smem, ready, at, k, True)
    of_part = gl.where(output >= END0, 1, 0) + gl.where(output >= END1, 1, 0)
    bits = _low(low, here, T, of_part, P * R, R, SHARES, of_shares)  # not looked at before the next loop's end
    for step in range(late, steps):
        at = step % STAGES
        mbarrier.wait(ready.index(at), step // STAGES & 1)
        acc = _multiply(x_smem, w_smem, at, acc)
        _ask_b(b_desc, w_smem, ready, at, output, column, step + STAGES, steps, more)
    if more > 0:
        own = _own(bits, low, here, T, of_part, P * R, R, SHARES, of_shares, left)
        for step in range(steps, steps + more):
            at = step % STAGES
            mbarrier.wait(ready.index(at), step // STAGES & 1)
            acc = _expand(acc, own, of_row, column + (step - steps) * STEP, w_smem, at * 2, R, left)
    for slot in gl.static_range(STAGES):
        mbarrier.invalidate(ready.index(slot))
        mbarrier.invalidate(a_ready.index(slot))
    _store(out, acc, part * T, output, T, N, layout)


@gluon.jit
def _multiply_gated(x_smem, w_smem, at, acc, acc_up):
    for half in gl.static_range(2):
        x = x_smem.index(at * 2 + half)
        acc = warpgroup_mma(x, w_smem.index(at * 4 + half).permute((1, 0)), acc, is_async=True)
        acc_up = warpgroup_mma(x, w_smem.index(at * 4 + 2 + half).permute((1, 0)), acc_up, is_async=True)
    return warpgroup_mma_wait(0, deps=(acc, acc_up))


@gluon.jit
def _ask_gated(
    x_desc, w_desc, b_desc, x_smem, w_smem, ready, at, number, row, row_up, first, turn, steps, middle, more
):
    """What number `number` of a program's steps reads: from number `middle` on `more` of them read B, and no x."""
    OF_WEIGHTS: gl.constexpr = 2 * w_desc.block_type.shape[0] * 2 * HALF * 2
    OF_ROWS: gl.constexpr = x_desc.block_type.shape[0] * 2 * HALF * 2
    if (number >= middle) & (number < middle + more):
        k = (number - middle) * 2 * HALF
        _ask_weights(b_desc, w_smem, ready, at, row, row_up, k, True, True, OF_WEIGHTS)
    else:
        step = number - gl.where(number < middle, 0, more)
        k = (first + _input(step, turn, steps)) * 2 * HALF
        _ask_weights(w_desc, w_smem, ready, at, row, row_up, k, step < steps, True, OF_WEIGHTS + OF_ROWS)
        _ask_rows(x_desc, x_smem, ready, at, k, step < steps)


@gluon.jit(do_not_specialize=["T"])
def adapted_gated(
    x_desc, w_desc, b_desc, out, low, slots, T, N, STEPS, MAKERS, MORE,
    R: gl.constexpr, SHARES: gl.constexpr, ACTIVATION: gl.constexpr, STAGES: gl.constexpr, TURN: gl.constexpr,
    PDL: gl.constexpr, num_warps: gl.constexpr,
):  # fmt: skip
    """A, behind w's first 2 N rows, by the first MAKERS programs; B before the other programs' last STAGES steps."""
    OUTPUTS: gl.constexpr = w_desc.block_type.shape[0]
    BYTES: gl.constexpr = (2 * OUTPUTS + x_desc.block_type.shape[0]) * 2 * HALF * 2
    STEP: gl.constexpr = 2 * HALF
    GROUPS: gl.constexpr = num_warps // 4
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, GROUPS], [16, OUTPUTS // GROUPS, 16])
    left: gl.constexpr = _left_side(R, HALF // R, num_warps)
    of_shares: gl.constexpr = _of_shares(R, SHARES, num_warps)
    w_smem = gl.allocate_shared_memory(w_desc.dtype, [STAGES * 4, OUTPUTS, HALF], w_desc.layout)
    x_smem = gl.allocate_shared_memory(x_desc.dtype, [STAGES * 2, ROWS, HALF], x_desc.layout)
    ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for slot in gl.static_range(STAGES):
        mbarrier.init(ready.index(slot), count=1)
    program = gl.program_id(0)
    makes_a = program < MAKERS
    unit, share = program // SHARES * 2 * OUTPUTS, program % SHARES
    row = gl.where(makes_a, 2 * N + unit, (program - MAKERS) * OUTPUTS)
    row_up = row + gl.where(makes_a, OUTPUTS, N)
    first = gl.where(makes_a, share * STEPS // SHARES, 0)
    steps = gl.where(makes_a, (share + 1) * STEPS // SHARES - first, STEPS)
    turn = gl.where(makes_a, 0, (program - MAKERS) * TURN % STEPS)
    more = gl.where(makes_a, 0, MORE)
    middle = gl.where(makes_a, steps, gl.maximum(steps - STAGES, 0))
    if PDL:
        tl_cuda.gdc_launch_dependents()
    for step in gl.static_range(STAGES):  # weights wait for nobody
        k = (first + _input(step, turn, steps)) * STEP
        _ask_weights(w_desc, w_smem, ready, step, row, row_up, k, step < middle, True, BYTES)
    if PDL:
        tl_cuda.gdc_wait()
    for step in range(STAGES):
        if step < middle:
            _ask_rows(x_desc, x_smem, ready, step, (first + _input(step, turn, steps)) * STEP, True)
        else:
            _ask_gated(x_desc, w_desc, b_desc, x_smem, w_smem, ready, step, step, row, row_up, first, turn, steps,
                       middle, more)  # fmt: skip
    of_row = _slots(slots, T, gl.SliceLayout(1, gl.SliceLayout(2, left)))
    here = _slots(slots, T, gl.SliceLayout(0, gl.SliceLayout(2, of_shares))) >= 0
    acc = gl.zeros([ROWS, OUTPUTS], gl.float32, layout)
    acc_up = gl.zeros([ROWS, OUTPUTS], gl.float32, layout)
    late = gl.maximum(middle - STAGES, 0)
    for step in range(late):
        at = step % STAGES
        mbarrier.wait(ready.index(at), step // STAGES & 1)
        acc, acc_up = _multiply_gated(x_smem, w_smem, at, acc, acc_up)
        k = (first + _input(step + STAGES, turn, steps)) * STEP
        _ask_weights(w_desc, w_smem, ready, at, row, row_up, k, True, True, BYTES)
        _ask_rows(x_desc, x_smem, ready, at, k, True)
    bits = gl.zeros([SHARES, ROWS, R], gl.int32, of_shares)
    bits_up = bits
    if not makes_a:  # not looked at before the next loop's end
        bits = _low(low, here, T, 0, 2 * R, R, SHARES, of_shares)
        bits_up = _low(low, here, T, 1, 2 * R, R, SHARES, of_shares)
    for step in range(late, middle):
        at = step % STAGES
        mbarrier.wait(ready.index(at), step // STAGES & 1)
        acc, acc_up = _multiply_gated(x_smem, w_smem, at, acc, acc_up)
        _ask_gated(x_desc, w_desc, b_desc, x_smem, w_smem, ready, at, step + STAGES, row, row_up, first, turn, steps,
                   middle, more)  # fmt: skip
    if makes_a:
        _leave(low, acc, of_row, unit, share * T, T, 2 * R, layout)
        _leave(low, acc_up, of_row, unit + OUTPUTS, share * T, T, 2 * R, layout)
    else:
        own = _own(bits, low, here, T, 0, 2 * R, R, SHARES, of_shares, left)
        own_up = _own(bits_up, low, here, T, 1, 2 * R, R, SHARES, of_shares, left)
        for number in range(middle, middle + more):
            at = number % STAGES
            column = (number - middle) * STEP
            mbarrier.wait(ready.index(at), number // STAGES & 1)
            acc = _expand(acc, own, of_row, column, w_smem, at * 4, R, left)
            acc_up = _expand(acc_up, own_up, of_row, column, w_smem, at * 4 + 2, R, left)
            _ask_gated(x_desc, w_desc, b_desc, x_smem, w_smem, ready, at, number + STAGES, row, row_up, first, turn,
                       steps, middle, more)  # fmt: skip
        for number in range(middle + more, steps + more):
            at = number % STAGES
            mbarrier.wait(ready.index(at), number // STAGES & 1)
            acc, acc_up = _multiply_gated(x_smem, w_smem, at, acc, acc_up)
        stored: gl.constexpr = gl.BlockedLayout([1, 8], [256 // OUTPUTS, OUTPUTS // 8], [num_warps, 1], [1, 0])
        result = gl.convert_layout((activate(acc, ACTIVATION) * acc_up).to(out.dtype.element_ty), stored)
        _store(out, result, 0, row, T, N, stored)
    for slot in gl.static_range(STAGES):
        mbarrier.invalidate(ready.index(slot))
