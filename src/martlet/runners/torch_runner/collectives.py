"""What ranks that share a model do together: add up, put side by side, agree. One object a rank, handed to the decoder.

Every rank makes the same calls in the same order. What comes out is the same on all of them, to the bit, so each may
sample by itself and go on. `Alone` is for one rank and costs nothing. `Gloo` runs on CPUs, `Nccl` on GPUs.
"""

from __future__ import annotations

from datetime import timedelta
from typing import Protocol

import torch
import torch.distributed as dist

from martlet.model.spec import DecoderSpec

SECONDS = 60.0  # after which a rank gives up on the others; what watches them (runners.parallel) is faster


class Collectives(Protocol):
    rank: int
    size: int

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        """The sum of all ranks' x; may be x itself."""
        ...

    def gather(self, logits: torch.Tensor, spec: DecoderSpec) -> torch.Tensor:
        """Each rank's share of the logits, [S, its tokens], side by side: [S, vocab]."""
        ...

    def least(self, number: int) -> int:
        """The smallest of all ranks' numbers."""
        ...

    def close(self) -> None: ...


class Alone:
    rank, size = 0, 1

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        return x

    def gather(self, logits: torch.Tensor, spec: DecoderSpec) -> torch.Tensor:
        return logits

    def least(self, number: int) -> int:
        return number

    def close(self) -> None: ...


class _Group:
    """Collectives over a process group of torch."""

    def __init__(self, rank: int, size: int, group: dist.ProcessGroup, device: torch.device):
        self.rank, self.size, self.group, self.device = rank, size, group, device

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        self.group.allreduce([x]).wait()
        return x

    def gather(self, logits: torch.Tensor, spec: DecoderSpec) -> torch.Tensor:
        assert spec.part is not None
        each = spec.part.most_tokens
        if logits.shape[1] < each:  # the last rank's share
            logits = torch.nn.functional.pad(logits, (0, each - logits.shape[1]))
        shares = [torch.empty_like(logits) for _ in range(self.size)]
        self.group.allgather([shares], [logits.contiguous()]).wait()
        return torch.cat(shares, dim=1)[:, : spec.vocab_size]

    def least(self, number: int) -> int:
        x = torch.tensor([number], dtype=torch.int64, device=self.device)
        options = dist.AllreduceOptions()
        options.reduceOp = dist.ReduceOp.MIN
        self.group.allreduce([x], options).wait()
        return int(x.item())

    def close(self) -> None: ...


class Gloo(_Group):
    """store: a path that all ranks can open, for them to meet at."""

    def __init__(self, rank: int, size: int, store: str):
        options = dist.ProcessGroupGloo._Options()
        options._devices = [dist.ProcessGroupGloo.create_device(hostname="127.0.0.1")]
        options._timeout = timedelta(seconds=SECONDS)
        group = dist.ProcessGroupGloo(dist.FileStore(store, size), rank, size, options)
        super().__init__(rank, size, group, torch.device("cpu"))


class Nccl(_Group):
    """Rank r on GPU r, which becomes the current one. torch keeps one such group a process."""

    def __init__(self, rank: int, size: int, store: str):
        device = torch.device("cuda", rank)
        torch.cuda.set_device(device)
        dist.init_process_group(
            "nccl",
            store=dist.FileStore(store, size),
            rank=rank,
            world_size=size,
            timeout=timedelta(seconds=SECONDS),
            device_id=device,
        )
        super().__init__(rank, size, dist.group.WORLD, device)

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        dist.all_reduce(x)
        return x

    def close(self) -> None:
        dist.destroy_process_group()
