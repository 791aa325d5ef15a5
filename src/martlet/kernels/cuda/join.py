"""What several GPUs add up or put side by side, through memory that each can read of the others.

One kernel for a sum: ranks meet, each reads every rank's share, all in the order of the ranks so that all get the same
bits, and does at once what follows it, the residual and the norm. For two GPUs no other way moves fewer bytes.

They meet program by program: program p tells program p of every other rank that it has come (a count in the other's
memory, released) and waits until all have told it so (acquired). Who has come has waited for its predecessor
(`launch.wait`), so its share is written. A place that a share was written to may be written again after ranks have met
once more: whoever has come there is done with reading. So neighbouring sums of a step use different places.

Addresses of the ranks' memories come as numbers, at most MOST of them; each begins with the counts.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from martlet.kernels.cuda import launch
from martlet.kernels.cuda.fp8 import Fp8, room_for
from martlet.kernels.cuda.launch import wait
from martlet.kernels.cuda.layers import _places, _store_fp8

MOST = 8  # ranks
PROGRAMS = 256  # most of a kernel
COUNTS = 4 * PROGRAMS * MOST  # bytes of counts at the beginning of a rank's memory
LOGITS = 4096  # that a program copies at a time


@triton.jit
def _base(R: tl.constexpr, b0, b1, b2, b3, b4, b5, b6, b7):
    base = b0
    if R == 1:
        base = b1
    elif R == 2:
        base = b2
    elif R == 3:
        base = b3
    elif R == 4:
        base = b4
    elif R == 5:
        base = b5
    elif R == 6:
        base = b6
    elif R == 7:
        base = b7
    return base


@triton.jit
def _meet(met, RANK: tl.constexpr, SIZE: tl.constexpr, MOST: tl.constexpr, b0, b1, b2, b3, b4, b5, b6, b7):
    """met: int32, how often each program has met. Counts wrap around, so only differences are compared."""
    p = tl.program_id(0)
    target = tl.load(met + p) + 1
    for r in tl.static_range(SIZE):
        if r != RANK:
            theirs = _base(r, b0, b1, b2, b3, b4, b5, b6, b7).to(tl.pointer_type(tl.int32))
            tl.atomic_add(theirs + p * MOST + RANK, 1, sem="release", scope="sys")
    mine = _base(RANK, b0, b1, b2, b3, b4, b5, b6, b7).to(tl.pointer_type(tl.int32))
    for r in tl.static_range(SIZE):
        if r != RANK:
            seen = tl.atomic_add(mine + p * MOST + r, 0, sem="acquire", scope="sys")
            while seen - target < 0:
                seen = tl.atomic_add(mine + p * MOST + r, 0, sem="acquire", scope="sys")
    tl.store(met + p, target)
    tl.debug_barrier()


@triton.jit(do_not_specialize=["count"], do_not_specialize_on_alignment=["picks"])
def _sum(
    b0, b1, b2, b3, b4, b5, b6, b7, met, at, x, gain, out, scales, picks, count, WIDTH, eps,
    RANK: tl.constexpr, SIZE: tl.constexpr, MOST: tl.constexpr, ADD: tl.constexpr, NORM: tl.constexpr,
    PICK: tl.constexpr, FP8: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    wait(PDL)
    _meet(met, RANK, SIZE, MOST, b0, b1, b2, b3, b4, b5, b6, b7)
    pieces = tl.cdiv(WIDTH, BLOCK)
    for unit in range(tl.program_id(0), count * pieces, tl.num_programs(0)):
        t = unit // pieces
        k = (unit % pieces) * BLOCK + tl.arange(0, BLOCK)
        mask = k < WIDTH
        source = (tl.load(picks + t) if PICK else t).to(tl.int64) * WIDTH + k
        v = tl.zeros([BLOCK], tl.float32)
        for r in tl.static_range(SIZE):
            share = (_base(r, b0, b1, b2, b3, b4, b5, b6, b7) + at).to(tl.pointer_type(x.dtype.element_ty))
            share = tl.multiple_of(share, 16)
            v += tl.load(share + source, mask=mask, other=0.0, cache_modifier=".cg").to(tl.float32)
        if ADD:
            v = (v + tl.load(x + source, mask=mask, other=0.0).to(tl.float32)).to(x.dtype.element_ty)
            if not PICK:
                tl.store(x + source, v, mask=mask)
            v = v.to(tl.float32)
        if NORM:
            g = tl.load(gain + k, mask=mask).to(tl.float32)
            y = v * (1.0 / tl.sqrt(tl.sum(v * v) / WIDTH + eps)) * g
            if FP8:
                _store_fp8(out, scales, t, k, y, mask, WIDTH)
            else:
                tl.store(out + t.to(tl.int64) * WIDTH + k, y.to(out.dtype.element_ty), mask=mask)
        elif not ADD:
            tl.store(out + t.to(tl.int64) * WIDTH + k, v.to(out.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["count"])
def _beside(
    b0, b1, b2, b3, b4, b5, b6, b7, met, at, out, count, EACH, TOTAL,
    RANK: tl.constexpr, SIZE: tl.constexpr, MOST: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    wait(PDL)
    _meet(met, RANK, SIZE, MOST, b0, b1, b2, b3, b4, b5, b6, b7)
    pieces = tl.cdiv(EACH, BLOCK)
    for unit in range(tl.program_id(0), count * pieces, tl.num_programs(0)):
        s = (unit // pieces).to(tl.int64)
        v = (unit % pieces) * BLOCK + tl.arange(0, BLOCK)
        for r in tl.static_range(SIZE):
            share = (_base(r, b0, b1, b2, b3, b4, b5, b6, b7) + at).to(tl.pointer_type(tl.float32))
            share = tl.multiple_of(share, 16)
            mask = (v < EACH) & (r * EACH + v < TOTAL)
            x = tl.load(share + s * EACH + v, mask=mask, other=0.0, cache_modifier=".cg")
            tl.store(out + s * TOTAL + r * EACH + v, x, mask=mask)
    tl.debug_barrier()  # all of the program has read before it says so
    _meet(met, RANK, SIZE, MOST, b0, b1, b2, b3, b4, b5, b6, b7)


class Memory:
    """A rank's memory that the others can read, and where theirs is.

    own: uint8, zeros at first on all ranks. bases: address of every rank's, in this process.
    """

    def __init__(self, own: torch.Tensor, bases: Sequence[int], rank: int):
        self.own, self.rank, self.size = own, rank, len(bases)
        self.bases = (*bases, *[bases[rank]] * (MOST - len(bases)))
        self.met = torch.zeros(PROGRAMS, dtype=torch.int32, device=own.device)

    def holds(self, share: torch.Tensor) -> bool:
        return 0 <= share.data_ptr() - self.own.data_ptr() < len(self.own)

    def _at(self, share: torch.Tensor) -> int:
        return share.data_ptr() - self.own.data_ptr()

    def _programs(self, units: int) -> int:
        return min(units, PROGRAMS, 2 * launch.num_sms())

    def add(self, x: torch.Tensor, share: torch.Tensor) -> None:
        """x [T, W] += the sum of all ranks' shares [T, W]."""
        self._sum(x, share, x, add=True)

    def total(self, share: torch.Tensor) -> torch.Tensor:
        """The sum of all ranks' shares [T, W]."""
        out = torch.empty_like(share)
        self._sum(out, share, out, add=False)
        return out

    def _sum(self, x: torch.Tensor, share: torch.Tensor, out: torch.Tensor, *, add: bool) -> None:
        count, width = share.shape
        block = min(triton.next_power_of_2(width), 1024)
        launch.run(
            _sum, (self._programs(count * triton.cdiv(width, block)),),
            *self.bases, self.met, self._at(share), x, x, out, out, x, count, width, 0.0, RANK=self.rank,
            SIZE=self.size, MOST=MOST, ADD=add, NORM=False, PICK=False, FP8=False, BLOCK=block,
        )  # fmt: skip

    def add_rms_norm(
        self, x: torch.Tensor, share: torch.Tensor, gain: torch.Tensor, eps: float, picks: torch.Tensor | None = None,
        fp8: bool = False,
    ) -> torch.Tensor | Fp8:  # fmt: skip
        """`layers.add_rms_norm` of x and the sum of all ranks' shares."""
        count, width = len(x) if picks is None else len(picks), x.shape[1]
        out = room_for(count, width, x.device) if fp8 else gain.new_empty(count, width)
        block = triton.next_power_of_2(width)
        launch.run(
            _sum, (max(self._programs(count), 1),),
            *self.bases, self.met, self._at(share), x, gain, *_places(out), gain if picks is None else picks, count,
            width, eps, RANK=self.rank, SIZE=self.size, MOST=MOST, ADD=True, NORM=True, PICK=picks is not None,
            FP8=fp8, BLOCK=block, warps=min(max(block // 512, 1), 16),
        )  # fmt: skip
        return out

    def side_by_side(self, share: torch.Tensor, total: int) -> torch.Tensor:
        """Ranks' columns: shares float32 [S, each] -> [S, total]; what the last ranks have beyond that is left out."""
        count, each = share.shape
        out = share.new_empty(count, total)
        units = max(count * triton.cdiv(each, LOGITS), 1)
        launch.run(
            _beside, (self._programs(units),), *self.bases, self.met, self._at(share), out, count, each, total,
            RANK=self.rank, SIZE=self.size, MOST=MOST, BLOCK=LOGITS, warps=8,
        )  # fmt: skip
        return out

    def let_go(self) -> None:
        """Make all counts so large that nobody waits here any more; what is computed then means nothing."""
        counts = self.own[:COUNTS].view(torch.int32).view(PROGRAMS, MOST)
        counts.copy_((self.met + (1 << 30))[:, None].expand(-1, MOST))
