"""The product of one row with a matrix, with the norm in front and the activation or residual behind fused in.

A decoding step of one sequence reads every weight once and does little else; its time is the time of that read. Each
launch costs as much as the read of a small matrix, so what stands around a product is part of it. From two rows on
cuBLAS is faster than a Triton kernel of this kind (measured on an H200, 2 to 64 rows, at every shape tried).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from martlet.kernels.cuda import int4, launch
from martlet.kernels.cuda.fp8 import Fp8, unpacked
from martlet.kernels.cuda.int4 import word_products
from martlet.kernels.cuda.launch import wait
from martlet.kernels.cuda.layers import activate, in_fp8

OVERLAP_BYTES = 24 << 20  # matrices up to this size overlap with their predecessor; longer reads are disturbed by it
AHEAD = 4 << 20  # bytes of the next matrix to ask for


@dataclass(frozen=True, slots=True)
class Linear:
    """matrix [out, in] (gated: [2 * out, in], gate rows then up rows), bias of as many entries or None.

    scales: float32, one a row, if the matrix is float8_e4m3fn and to be multiplied by them.
    int4: if the matrix is int32 [out, in / 8], eight weights a word (martlet.kernels.cuda.int4).
    wide: matrix and bias with rows behind them, those of adapters (martlet.kernels.cuda.lora), if there are such.
    """

    matrix: torch.Tensor
    bias: torch.Tensor | None = None
    scales: torch.Tensor | None = None
    int4: int4.Groups | None = None
    wide: Linear | None = None

    @property
    def plain(self) -> bool:
        """Whether the matrix is one that torch multiplies with."""
        return self.scales is None and self.int4 is None

    @property
    def fp8(self) -> bool:
        return self.scales is not None


@triton.jit
def _add(acc, acc_up, weights, weights_up, v, SCALED: tl.constexpr, GATED: tl.constexpr, BLOCK_K: tl.constexpr):
    """acc + weights * v, and the same of the up rows. SCALED: weights are pairs, and v has twice their number."""
    if SCALED:
        one, two = tl.split(v.reshape(BLOCK_K, 2))
        first, second = unpacked(weights)
        acc += first.to(tl.float32) * one[None, :]
        acc += second.to(tl.float32) * two[None, :]
        if GATED:
            first, second = unpacked(weights_up)
            acc_up += first.to(tl.float32) * one[None, :]
            acc_up += second.to(tl.float32) * two[None, :]
    else:
        acc += weights.to(tl.float32) * v[None, :]
        if GATED:
            acc_up += weights_up.to(tl.float32) * v[None, :]
    return acc, acc_up


@triton.jit
def _finish(
    acc, acc_up, squares, n, scales, bias, residual, out, eps, N, width,
    SCALED: tl.constexpr, NORM: tl.constexpr, GATED: tl.constexpr, ACTIVATION: tl.constexpr, BIAS: tl.constexpr,
    RESIDUAL: tl.constexpr,
):  # fmt: skip
    """Outputs n from their sums: norm, scales, bias, activation, gate and residual."""
    inside = n < N
    y = tl.sum(acc, 1)
    up = tl.sum(acc_up, 1)
    if NORM:
        scale = 1.0 / tl.sqrt(tl.sum(squares) / width + eps)
        y *= scale
        up *= scale
    if SCALED:
        y *= tl.load(scales + n, mask=inside, other=0.0)
        if GATED:
            up *= tl.load(scales + N + n, mask=inside, other=0.0)
    if BIAS:
        y += tl.load(bias + n, mask=inside, other=0.0).to(tl.float32)
        if GATED:
            up += tl.load(bias + N + n, mask=inside, other=0.0).to(tl.float32)
    if ACTIVATION != "":
        y = activate(y, ACTIVATION)
    if GATED:
        y *= up
    if RESIDUAL:
        y += tl.load(residual + n, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + n, y.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _ask(ahead, share, ASKERS):
    """Each of the last ASKERS programs asks for its `share` of `ahead`, bytes, into the L2 cache; nobody waits for it.

    At the end of a product memory falls idle, until the next one has been launched and its first loads are under way.
    """
    number = tl.program_id(0) - (tl.num_programs(0) - ASKERS)
    if number >= 0:
        tl.inline_asm_elementwise(
            """
            {
            .reg .pred first;
            .reg .b32 thread;
            mov.u32 thread, %tid.x;
            setp.eq.u32 first, thread, 0;
            @first cp.async.bulk.prefetch.L2.global [$1], $2;
            mov.u32 $0, 0;
            }
            """,
            "=r,l,r",
            [ahead.to(tl.int64) + number.to(tl.int64) * share, share],
            dtype=tl.int32,
            is_pure=False,
            pack=1,
        )


@triton.jit(do_not_specialize=["ASKERS"])
def _one_row(
    x, gain, w, scales, bias, residual, out, ahead, share, ASKERS, eps, N, K,
    SCALED: tl.constexpr, NORM: tl.constexpr,
    GATED: tl.constexpr, ACTIVATION: tl.constexpr, BIAS: tl.constexpr, RESIDUAL: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, EVEN: tl.constexpr, ASK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    # SCALED: two neighbours in e4m3 are one number of 16 bits, and K counts these.
    # The weights of the next piece, of this block of outputs or of the program's next one, are always under way.
    k = tl.arange(0, BLOCK_K)
    WIDE: tl.constexpr = 2 * BLOCK_K if SCALED else BLOCK_K  # inputs at a time
    width = 2 * K if SCALED else K
    i = tl.arange(0, WIDE)
    lane = tl.arange(0, BLOCK_N)
    skip = N.to(tl.int64) * K  # from a gate row to its up row
    block = tl.program_id(0)
    at = w + tl.minimum(block * BLOCK_N + lane, N - 1).to(tl.int64)[:, None] * K + k[None, :]
    coming = tl.load(at) if EVEN else tl.load(at, mask=(k < K)[None, :], other=0.0)
    if GATED:
        coming_up = tl.load(at + skip) if EVEN else tl.load(at + skip, mask=(k < K)[None, :], other=0.0)
    wait(PDL)
    for block in range(tl.program_id(0), tl.cdiv(N, BLOCK_N), tl.num_programs(0)):
        n = block * BLOCK_N + lane
        after = block + tl.num_programs(0)
        row = tl.minimum(n, N - 1).to(tl.int64)
        next_row = tl.minimum(after * BLOCK_N + lane, N - 1).to(tl.int64)
        acc = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
        acc_up = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
        squares = tl.zeros([WIDE], tl.float32)
        for begin in range(0, K, BLOCK_K):
            weights = coming
            if GATED:
                weights_up = coming_up
            last = begin + BLOCK_K >= K
            from_k = tl.where(last, 0, begin + BLOCK_K) + k
            at = w + tl.where(last, next_row, row)[:, None] * K + from_k[None, :]
            more = from_k < tl.where((begin + BLOCK_K < K) | (after * BLOCK_N < N), K, 0)
            coming = tl.load(at, mask=more[None, :], other=0.0)
            if GATED:
                coming_up = tl.load(at + skip, mask=more[None, :], other=0.0)
            at_x = (2 * begin if SCALED else begin) + i
            v = tl.load(x + at_x, mask=at_x < width, other=0.0).to(tl.float32)
            if NORM:
                squares += v * v
                v *= tl.load(gain + at_x, mask=at_x < width, other=0.0).to(tl.float32)
            acc, acc_up = _add(acc, acc_up, weights, weights_up if GATED else weights, v, SCALED, GATED, BLOCK_K)
        _finish(acc, acc_up, squares, n, scales, bias, residual, out, eps, N, width,
                SCALED, NORM, GATED, ACTIVATION, BIAS, RESIDUAL)  # fmt: skip
    if ASK:
        _ask(ahead, share, ASKERS)


@triton.jit(do_not_specialize=["ASKERS"])
def _one_row_piped(
    x, gain, w, scales, bias, residual, out, ahead, share, ASKERS, eps, N, K,
    SCALED: tl.constexpr, NORM: tl.constexpr, GATED: tl.constexpr, ACTIVATION: tl.constexpr, BIAS: tl.constexpr,
    RESIDUAL: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, EVEN: tl.constexpr, ASK: tl.constexpr,
    STAGES: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    # The weights of the next STAGES - 1 pieces are on their way to shared memory: three times the bytes in flight that
    # registers have room for. What it gives up is asking for weights before the predecessor is done.
    WIDE: tl.constexpr = 2 * BLOCK_K if SCALED else BLOCK_K
    width = 2 * K if SCALED else K
    k = tl.arange(0, BLOCK_K)
    i = tl.arange(0, WIDE)
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    at = w + tl.minimum(n, N - 1).to(tl.int64)[:, None] * K + k[None, :]
    at_up = at + N.to(tl.int64) * K
    wait(PDL)
    acc = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
    acc_up = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
    squares = tl.zeros([WIDE], tl.float32)
    for begin in tl.range(0, K, BLOCK_K, num_stages=STAGES):
        here = (begin + k < K)[None, :]
        if EVEN:
            weights = tl.load(at + begin, eviction_policy="evict_first")
        else:
            weights = tl.load(at + begin, mask=here, other=0, eviction_policy="evict_first")
        weights_up = weights
        if GATED:
            if EVEN:
                weights_up = tl.load(at_up + begin, eviction_policy="evict_first")
            else:
                weights_up = tl.load(at_up + begin, mask=here, other=0, eviction_policy="evict_first")
        at_x = (2 * begin if SCALED else begin) + i
        v = tl.load(x + at_x, mask=at_x < width, other=0.0).to(tl.float32)
        if NORM:
            squares += v * v
            v *= tl.load(gain + at_x, mask=at_x < width, other=0.0).to(tl.float32)
        acc, acc_up = _add(acc, acc_up, weights, weights_up, v, SCALED, GATED, BLOCK_K)
    _finish(acc, acc_up, squares, n, scales, bias, residual, out, eps, N, width,
            SCALED, NORM, GATED, ACTIVATION, BIAS, RESIDUAL)  # fmt: skip
    if ASK:
        _ask(ahead, share, ASKERS)


@triton.jit
def _one_row_int4(
    x, gain, w, scales, zeros, bias, residual, out, eps, N, K,
    SIZE: tl.constexpr, NORM: tl.constexpr, GATED: tl.constexpr, ACTIVATION: tl.constexpr, BIAS: tl.constexpr,
    RESIDUAL: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_W: tl.constexpr, STAGES: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    # As _one_row_piped, but a word is eight inputs, and a group's scale and zero are found beside it.
    W = K // 8
    groups = K // SIZE
    k = tl.arange(0, BLOCK_W)
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    row = tl.minimum(n, N - 1).to(tl.int64)
    row_up = row + N
    wait(PDL)
    acc = tl.zeros([BLOCK_N, BLOCK_W], tl.float32)
    acc_up = tl.zeros([BLOCK_N, BLOCK_W], tl.float32)
    squares = tl.zeros([BLOCK_W], tl.float32)
    none = tl.zeros([BLOCK_W], tl.float32)
    for begin in tl.range(0, W, BLOCK_W, num_stages=STAGES):
        word = begin + k
        inside = word < W
        words = tl.load(w + row[:, None] * W + word[None, :], mask=inside[None, :], other=0)
        acc, squares = word_products(words, x, gain, word, inside, scales, zeros, row, groups, acc, squares, SIZE, NORM)
        if GATED:
            words = tl.load(w + row_up[:, None] * W + word[None, :], mask=inside[None, :], other=0)
            acc_up, _ = word_products(
                words, x, gain, word, inside, scales, zeros, row_up, groups, acc_up, none, SIZE, NORM
            )
    _finish(acc, acc_up, squares, n, scales, bias, residual, out, eps, N, K,
            False, NORM, GATED, ACTIVATION, BIAS, RESIDUAL)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Tile:
    """block_n outputs and block_k inputs (FP8: pairs of them) at a time.

    programs: most on a multiprocessor; None: one for each block_n. stages: pieces of the weights under way through
    shared memory, with one program for each block_n; 0: through registers.
    """

    block_n: int
    block_k: int
    warps: int
    programs: int | None = None
    stages: int = 0


def tile_for(n: int, k: int, gated: bool, fp8: bool) -> Tile:
    """The fastest tile of those measured on an H200 for a product with n outputs (gated: pairs of rows), k inputs."""
    if n * k >= 1 << 24:
        return Tile(4, 1024, 4, stages=3) if gated and not fp8 else Tile(8, 512, 4, stages=4)
    return Tile(8, 512, 4) if n >= 16 * launch.num_sms() else Tile(4, 1024, 8)


def linear(
    x: torch.Tensor,
    weight: Linear,
    *,
    gain: torch.Tensor | None = None,
    eps: float = 0.0,
    activation: str = "",
    gated: bool = False,
    residual: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
    dtype: torch.dtype | None = None,
    tile: Tile | None = None,
    ahead: torch.Tensor | None = None,
) -> torch.Tensor:
    """residual + act(norm(x) @ matrix.T + bias) for x [1, K] -> [1, N].

    gain [K]: RMSNorm in front. gated: act(gate) * up. residual [1, N] may be `out` itself. dtype: of the result.
    ahead: the matrix that is read next, if nothing else is read before (int4: not asked for).
    """
    matrix = weight.matrix.view(torch.int16) if weight.fp8 else weight.matrix
    k = matrix.shape[1]
    n = weight.matrix.shape[0] // (2 if gated else 1)
    out = x.new_empty(1, n, dtype=dtype or x.dtype) if out is None else out
    if weight.int4 is not None:
        groups = weight.int4
        launch.run(
            _one_row_int4, (triton.cdiv(n, 8),),
            x, x if gain is None else gain, matrix, groups.scales, groups.zeros,
            x if weight.bias is None else weight.bias, x if residual is None else residual, out, eps, n, 8 * k,
            SIZE=groups.size, NORM=gain is not None, GATED=gated, ACTIVATION=activation, BIAS=weight.bias is not None,
            RESIDUAL=residual is not None, BLOCK_N=8, BLOCK_W=64, STAGES=4, stages=4,
            overlap=matrix.nbytes <= OVERLAP_BYTES,
        )  # fmt: skip
        return out
    tile = tile or tile_for(n, k, gated, weight.fp8)
    blocks = triton.cdiv(n, tile.block_n)
    programs = blocks if tile.programs is None else min(blocks, tile.programs * launch.num_sms())
    askers = min(programs, 2 * launch.num_sms())
    asks = ahead is not None and launch.is_hopper()
    share = min(AHEAD, ahead.nbytes) // askers // 16 * 16 if asks else 0
    options = {
        "SCALED": weight.fp8, "NORM": gain is not None, "GATED": gated, "ACTIVATION": activation,
        "BIAS": weight.bias is not None, "RESIDUAL": residual is not None, "BLOCK_N": tile.block_n,
        "BLOCK_K": tile.block_k, "EVEN": k % tile.block_k == 0, "ASK": share > 0, "warps": tile.warps,
        "overlap": weight.matrix.nbytes <= OVERLAP_BYTES,
    }  # fmt: skip
    if tile.stages:
        options |= {"STAGES": tile.stages, "stages": tile.stages}
    launch.run(
        _one_row_piped if tile.stages else _one_row, (programs,),
        x, x if gain is None else gain, matrix, x if weight.scales is None else weight.scales,
        x if weight.bias is None else weight.bias, x if residual is None else residual, out,
        ahead if asks else matrix, share, askers, eps, n, k, **options,
    )  # fmt: skip
    return out


def product(x: torch.Tensor | Fp8, weight: Linear, dtype: torch.dtype, out: torch.Tensor | None = None) -> torch.Tensor:
    """x @ matrix.T + bias for many rows -> [T, N] of `dtype`, in `out` (of it) if given. FP8 weights turn x into FP8.

    cuBLAS for plain weights; for FP8 ones torch's product of rows with scales, which wants sizes in multiples of 16;
    for int4 a kernel of their own, or cuBLAS with the matrix unpacked where rows are many.
    """
    if weight.int4 is not None:
        assert isinstance(x, torch.Tensor)
        if len(x) <= int4.FEW_ROWS:
            out = torch.empty(len(x), len(weight.matrix), dtype=dtype, device=x.device) if out is None else out
            return int4.few_rows(x, weight.matrix, weight.int4, weight.bias, out)
        weight = Linear(int4.unpacked(weight.matrix, weight.int4, x.dtype), weight.bias)
    if weight.scales is None:
        assert isinstance(x, torch.Tensor)
        if dtype != x.dtype:
            y = _in_float32(x, weight.matrix, out)
            return y if weight.bias is None else y.add_(weight.bias)
        if out is None:
            return F.linear(x, weight.matrix, weight.bias)
        if weight.bias is None:
            return torch.mm(x, weight.matrix.T, out=out)
        return torch.addmm(weight.bias, x, weight.matrix.T, out=out)
    x = x if isinstance(x, Fp8) else in_fp8(x)
    if all(size % 16 == 0 for size in weight.matrix.shape):
        result = torch._scaled_mm(
            x.values, weight.matrix.T, scale_a=x.scales[:, None], scale_b=weight.scales[None], out_dtype=torch.bfloat16
        )
    else:
        result = (x.values.float() @ weight.matrix.float().T) * x.scales[:, None] * weight.scales
    if weight.bias is not None:
        result = result + weight.bias
    return result.to(dtype) if out is None else out.copy_(result)


def _in_float32(x: torch.Tensor, matrix: torch.Tensor, out: torch.Tensor | None) -> torch.Tensor:
    """x @ matrix.T of numbers of 16 bits, their sums left as they are, float32, in `out` if given."""
    if x.is_cuda:
        return torch.mm(x, matrix.T, out_dtype=torch.float32, out=out)
    return torch.mm(x.float(), matrix.float().T, out=out)  # under the interpreter: torch has the other on GPUs alone
