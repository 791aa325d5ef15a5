"""Products of up to 64 rows with a large matrix on Hopper: the read of its weights never stops, nor between kernels.

cuBLAS reads such a matrix at 3.5 TB/s in the mean, an H200's memory gives 4.3. Half of the difference lies between
kernels: nothing is read while one ends, a norm runs and the next one starts. Here a program asks for all the weights
that fit into shared memory before it waits for its predecessor (`launch.py`), so those gaps are filled. And what ends a
product needs no pass of its own: a gated activation is applied here, and sums that were split over the inputs are left
as parts [P, T, N], float32, for the kernel that reads them anyway (norm, rotation) to add up, always in the same order.

To the multiplier there are always 64 rows: a row's result depends on neither their number nor on the others.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
import triton
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma, warpgroup_mma, warpgroup_mma_wait
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor
from triton.language.extra import cuda as tl_cuda

from martlet.kernels.cuda import launch
from martlet.kernels.cuda.layers import activate
from martlet.kernels.cuda.linear import Linear

_copy = tma.async_load if hasattr(tma, "async_load") else tma.async_copy_global_to_shared  # its name in Triton 3.6
ROWS = gl.constexpr(64)  # at most; the least that a warp group multiplies
HALF = gl.constexpr(64)  # inputs of half a step: rows of 128 bytes, as wide as the multiplier's tiles are
LEAST_BYTES = 32 << 20  # of a matrix
LEAST_BYTES_MORE_ROWS = 8 << 20  # with more than MORE_ROWS; a step of qwen3-0.6b gains 2 to 4 % then, else nothing
MORE_ROWS = 16
allowed = True  # the benchmark switches it off to see what this gives


@dataclass(frozen=True, slots=True)
class Tile:
    """outputs of a program (gated: pairs), and over how many programs their inputs are split.

    stages: steps that have room in shared memory, all under way at the start.
    turn: the n-th block of outputs begins n * turn steps from its first input, so that not all read the same columns.
    """

    outputs: int
    warps: int
    stages: int
    split: int = 1
    turn: int = 0


@gluon.jit
def _ask_weights(
    w_desc, w_smem, ready, slot, output, output_up, k, here,
    GATED: gl.constexpr, BYTES: gl.constexpr,
):  # fmt: skip
    """Weights of one step into `slot`, if `here`; the slot is ready when BYTES have come, x's with them."""
    PARTS: gl.constexpr = 2 if GATED else 1
    mbarrier.expect(ready.index(slot), BYTES, pred=here)
    for part in gl.static_range(PARTS):
        for half in gl.static_range(2):
            _copy(
                w_desc, [output_up if part else output, k + half * HALF], ready.index(slot),
                w_smem.index((slot * PARTS + part) * 2 + half), pred=here,
            )  # fmt: skip


@gluon.jit
def _ask_rows(x_desc, x_smem, ready, slot, k, here):
    """x of one step: its own rows. What is left of older steps in the other ones makes sums that nobody stores."""
    for half in gl.static_range(2):
        rows = x_smem.index(slot * 2 + half)
        if x_desc.block_type.shape[0] < ROWS:
            rows = rows.slice(0, x_desc.block_type.shape[0])
        _copy(x_desc, [0, k + half * HALF], ready.index(slot), rows, pred=here)


@gluon.jit
def _input(step, turn, steps):
    """The step that is made as number `step`, where number 0 is step `turn`."""
    turned = step + turn
    return gl.where(turned >= steps, turned - steps, turned)


@gluon.jit
def _store(out, result, line, output, T, N, layout: gl.constexpr):
    """The first T rows of the result into lines from `line` on of out [any, N], outputs from `output` on."""
    t = gl.arange(0, result.shape[0], gl.SliceLayout(1, layout))[:, None]
    n = output + gl.arange(0, result.shape[1], gl.SliceLayout(0, layout))[None, :]
    gl.store(out + (line + t).to(gl.int64) * N + n, result, mask=(t < T) & (n < N))


@gluon.jit(do_not_specialize=["T"])
def _few_rows(
    x_desc, w_desc, out, T, N, STEPS, SPLIT,
    GATED: gl.constexpr, ACTIVATION: gl.constexpr, STAGES: gl.constexpr, TURN: gl.constexpr,
    PDL: gl.constexpr, num_warps: gl.constexpr,
):  # fmt: skip
    OUTPUTS: gl.constexpr = w_desc.block_type.shape[0]
    PARTS: gl.constexpr = 2 if GATED else 1
    BYTES: gl.constexpr = (PARTS * OUTPUTS + x_desc.block_type.shape[0]) * 2 * HALF * 2
    GROUPS: gl.constexpr = num_warps // 4
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, GROUPS], [16, OUTPUTS // GROUPS, 16])
    w_smem = gl.allocate_shared_memory(w_desc.dtype, [STAGES * PARTS * 2, OUTPUTS, HALF], w_desc.layout)
    x_smem = gl.allocate_shared_memory(x_desc.dtype, [STAGES * 2, ROWS, HALF], x_desc.layout)
    ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for slot in gl.static_range(STAGES):
        mbarrier.init(ready.index(slot), count=1)
    output = gl.program_id(0) // SPLIT * OUTPUTS
    part = gl.program_id(0) % SPLIT
    first = part * STEPS // SPLIT
    steps = (part + 1) * STEPS // SPLIT - first
    turn = gl.program_id(0) // SPLIT * TURN % steps
    if PDL:
        tl_cuda.gdc_launch_dependents()
    for step in gl.static_range(STAGES):  # weights wait for nobody
        k = (first + _input(step, turn, steps)) * 2 * HALF
        _ask_weights(w_desc, w_smem, ready, step, output, N + output, k, step < steps, GATED, BYTES)
    if PDL:
        tl_cuda.gdc_wait()
    for step in gl.static_range(STAGES):
        _ask_rows(x_desc, x_smem, ready, step, (first + _input(step, turn, steps)) * 2 * HALF, step < steps)
    acc = gl.zeros([ROWS, OUTPUTS], gl.float32, layout)
    acc_up = gl.zeros([ROWS, OUTPUTS], gl.float32, layout)
    slot, phase = 0, 0
    for step in range(steps):
        mbarrier.wait(ready.index(slot), phase)
        for half in gl.static_range(2):
            x = x_smem.index(slot * 2 + half)
            w = w_smem.index(slot * PARTS * 2 + half).permute((1, 0))
            acc = warpgroup_mma(x, w, acc, is_async=True)
            if GATED:
                w = w_smem.index((slot * PARTS + 1) * 2 + half).permute((1, 0))
                acc_up = warpgroup_mma(x, w, acc_up, is_async=True)
        if GATED:
            acc, acc_up = warpgroup_mma_wait(0, deps=(acc, acc_up))
        else:
            acc = warpgroup_mma_wait(0, deps=(acc,))
        if step + STAGES < steps:
            k = (first + _input(step + STAGES, turn, steps)) * 2 * HALF
            _ask_weights(w_desc, w_smem, ready, slot, output, N + output, k, True, GATED, BYTES)
            _ask_rows(x_desc, x_smem, ready, slot, k, True)
        slot += 1
        if slot == STAGES:
            slot = 0
            phase ^= 1
    for slot in gl.static_range(STAGES):
        mbarrier.invalidate(ready.index(slot))
    if GATED:
        # 16 bytes of a row a thread: the multiplier's own layout would write 4, and parts of sectors
        stored: gl.constexpr = gl.BlockedLayout([1, 8], [256 // OUTPUTS, OUTPUTS // 8], [num_warps, 1], [1, 0])
        result = gl.convert_layout((activate(acc, ACTIVATION) * acc_up).to(out.dtype.element_ty), stored)
        _store(out, result, 0, output, T, N, stored)
    else:
        _store(out, acc, part * T, output, T, N, layout)


def sizes() -> list[int]:
    """Row counts that have kernels of their own; others take the next larger one's."""
    return [8, 16, 32, 64] if launch.has_wgmma() else []


def tile_for(x: torch.Tensor, weight: Linear, *, gated: bool = False) -> Tile | None:
    """How x [T, K] is multiplied here; None where cuBLAS is to do it, or nobody has measured."""
    matrix = weight.matrix
    least = LEAST_BYTES_MORE_ROWS if len(x) > MORE_ROWS else LEAST_BYTES
    if not (
        allowed and weight.plain and weight.bias is None and 0 < len(x) <= ROWS.value and launch.has_wgmma()
        and x.dtype == matrix.dtype == torch.bfloat16 and matrix.nbytes >= least
        and matrix.is_contiguous() and matrix.shape[1] % 8 == 0
    ):  # fmt: skip
        return None
    return _tile(matrix.shape[0] // (2 if gated else 1), gated, launch.num_sms())


@functools.cache
def _tile(outputs: int, gated: bool, sms: int) -> Tile | None:
    """By shape, from llama3-8b with 64 rows on one H200: microseconds of a product among its like, cuBLASLt beside.

    Wanted is a program for nearly every multiprocessor, and no second round of them that is half empty. Tiles of 64
    outputs read x as often as weights, which the L2 cache allows while weights come at 3.6 TB/s.
    """
    if gated:  # 28,672 x 4,096: 60.7; 61.5, and 2.8 for the activation
        return Tile(128, 8, stages=2, turn=2) if _fill(triton.cdiv(outputs, 128), sms) else None
    blocks = triton.cdiv(outputs, 64)
    for split in (1, 2):  # 6,144 x 4,096: 15.7; 16.4. 4,096 x 4,096: 10.2; 12.2. 4,096 x 14,336: 31.1; 32.0
        if _fill(split * blocks, sms):
            return Tile(64, 4, stages=6, split=split)
    return Tile(128, 8, stages=2, turn=1) if blocks >= 8 * sms else None  # 128,256 x 4,096: 259; 295 (cuBLAS)


def _fill(programs: int, sms: int) -> bool:
    return 2 * sms <= 3 * programs <= 3 * sms


def product(
    x: torch.Tensor, matrix: torch.Tensor, tile: Tile, *, gated: bool = False, activation: str = ""
) -> torch.Tensor:
    """Parts of x @ matrix.T for x [T <= 64, K], matrix [N, K] -> float32 [tile.split, T, N], to be added up.

    gated: matrix is [2 N, K], gate then up -> act(gate) * up, [T, N] in x's dtype.
    """
    rows, k = x.shape
    n = len(matrix) // (2 if gated else 1)
    out = x.new_empty(rows, n) if gated else x.new_empty(tile.split, rows, n, dtype=torch.float32)
    launch.run(
        _few_rows, (triton.cdiv(n, tile.outputs) * tile.split,),
        # rows outside x cost the copy engine time: with 8 of 64 there a product took up to 1.7 times as long
        _blocks(x, max(8, triton.next_power_of_2(rows))), _blocks(matrix, tile.outputs), out, rows, n,
        triton.cdiv(k, 2 * HALF.value), tile.split,
        GATED=gated, ACTIVATION=activation, STAGES=tile.stages, TURN=tile.turn, warps=tile.warps,
    )  # fmt: skip
    return out


def _blocks(matrix: torch.Tensor, rows: int) -> TensorDescriptor:
    """For the copy engine: blocks of `rows` and HALF a step's columns; what is past the matrix' ends reads as zeros."""
    block = [rows, HALF.value]
    return TensorDescriptor(matrix, list(matrix.shape), list(matrix.stride()), block, _layout(rows))


@functools.cache
def _layout(rows: int) -> gl.NVMMASharedLayout:
    return gl.NVMMASharedLayout.get_default_for([rows, HALF.value], gl.bfloat16)
