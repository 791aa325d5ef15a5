"""How a step on several GPUs joins what each has a share of: in one kernel where a share lies in memory that all can
read (`martlet.kernels.cuda.join`), else by NCCL and the kernels of one GPU."""

from __future__ import annotations

import logging
from dataclasses import dataclass

import torch
import torch.distributed as dist

from martlet.kernels.cuda import layers
from martlet.kernels.cuda.fp8 import Fp8
from martlet.kernels.cuda.join import COUNTS, MOST, Memory
from martlet.model.spec import DecoderSpec
from martlet.runners.torch_runner.collectives import Collectives

log = logging.getLogger("martlet")

EMBED, MIXER, MLP = range(3)  # the places of sums: those of neighbours in a step differ
LARGEST = {2: 64 << 20}  # bytes of a share up to which ranks read each other's, by their number
LARGEST_OF_MORE = 1 << 20  # each reads all: NCCL moves fewer bytes
ALIGNED = 256
_named = 0  # groups of this process that shared memory


@dataclass(frozen=True, slots=True)
class Share:
    """What a rank has of a sum, [T, W]."""

    values: torch.Tensor


class Ranks:
    """Sums over ranks of a decoder's shares. `place` gives room for a share, to be filled and handed to one of the
    others; it is written again with the next step's."""

    def __init__(self, group: Collectives, spec: DecoderSpec, dtype: torch.dtype, tokens: int, rows: int, memory=None):
        """tokens: most of a step; rows: most that get logits at a time. memory: by default as large as needed."""
        assert spec.part is not None
        self.group, self.width, self.dtype, self.each = group, spec.width, dtype, spec.part.most_tokens
        self.vocab_size = spec.vocab_size
        line = spec.width * dtype.itemsize
        self.tokens = max(1, min(tokens, LARGEST.get(group.size, LARGEST_OF_MORE) // line))
        self.rows = rows
        self.sizes = [COUNTS, *[_aligned(self.tokens * line)] * 3, _aligned(rows * self.each * 4)]
        self.memory: Memory | None = memory(sum(self.sizes)) if memory is not None else None

    def place(self, site: int, count: int, device: torch.device) -> torch.Tensor:
        """Room for a share of `count` tokens, [count, W], at one of EMBED, MIXER, MLP."""
        if self.memory is None or count > self.tokens:
            return torch.empty(count, self.width, dtype=self.dtype, device=device)
        begin = sum(self.sizes[: site + 1])
        raw = self.memory.own[begin : begin + count * self.width * self.dtype.itemsize]
        return raw.view(self.dtype).view(count, self.width)

    def add(self, x: torch.Tensor, share: torch.Tensor) -> None:
        """x [T, W] += the sum."""
        if self.memory is not None and self.memory.holds(share):
            self.memory.add(x, share)
        else:
            x += self.group.all_reduce(share)

    def total(self, share: torch.Tensor) -> torch.Tensor:
        """The sum, in memory of its own."""
        if self.memory is not None and self.memory.holds(share):
            return self.memory.total(share)
        return self.group.all_reduce(share)

    def add_rms_norm(
        self,
        x: torch.Tensor,
        share: torch.Tensor,
        gain: torch.Tensor,
        eps: float,
        picks: torch.Tensor | None = None,
        fp8: bool = False,
    ) -> torch.Tensor | Fp8:
        """`layers.add_rms_norm` of x and the sum."""
        if self.memory is not None and self.memory.holds(share):
            return self.memory.add_rms_norm(x, share, gain, eps, picks, fp8)
        return layers.add_rms_norm(x, self.group.all_reduce(share), gain, eps, picks, fp8=fp8)

    def logits(self, y: torch.Tensor, spec: DecoderSpec) -> torch.Tensor:
        """Float32 [S, the tokens of this rank] -> [S, V]."""
        if self.memory is None or len(y) > self.rows:
            return self.group.gather(y, spec)
        begin = sum(self.sizes[:4])
        share = self.memory.own[begin : begin + len(y) * self.each * 4].view(torch.float32).view(len(y), self.each)
        share[:, : y.shape[1]].copy_(y)
        return self.memory.side_by_side(share, self.vocab_size)


def shared_memory(group: Collectives, size: int, device: torch.device) -> Memory | None:
    """Memory of `size` bytes on each rank that all can read, or None where the machine has no such."""
    offset, handle = -1, None
    if group.size <= MOST:
        try:
            import torch.distributed._symmetric_memory as symmetric

            own = symmetric.empty(size, dtype=torch.uint8, device=device)
            handle = symmetric.rendezvous(own, _name(group))
            offset = own.data_ptr() - int(handle.buffer_ptrs[group.rank])
            own.zero_()
            torch.cuda.synchronize()
        except Exception as error:  # whatever a driver or a container forbids: NCCL finds other ways
            log.warning("GPUs cannot read each other's memory (%s); all sums go through NCCL", error)
            offset = -1
    least, most = group.least(offset), -group.least(-offset)
    if least < 0 or least != most:
        return None
    memory = Memory(own, [int(base) + offset for base in handle.buffer_ptrs], group.rank)
    memory.handle = handle  # it keeps the others' memory mapped
    return memory


def _name(group: Collectives) -> str:
    """A name of the group that no group of this process had before: what torch knows of one outlives it."""
    global _named
    name, number = dist.group.WORLD.group_name, -group.least(-_named)  # ranks may have had different numbers of groups
    _named = number + 1
    if number:
        name = f"{name}-{number}"
        dist.distributed_c10d._register_process_group(name, dist.group.WORLD)
    return name


def _aligned(size: int) -> int:
    return -(-size // ALIGNED) * ALIGNED
