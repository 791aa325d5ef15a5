"""One of several ranks that run the CUDA runner under Triton's interpreter, for test_ranks: `python` this, RANK SIZE
FOLDER. What ranks share on GPUs is a file here, mapped by all, so they really wait for each other."""

from __future__ import annotations

import sys
from functools import partial

import torch
from engines import answers, card, options

from martlet.kernels.cuda import layers
from martlet.kernels.cuda.join import Memory
from martlet.model.shard import split
from martlet.model.weights import read_spec
from martlet.runners.cuda_runner import CudaRunner
from martlet.runners.cuda_runner.ranks import MLP, Ranks
from martlet.runners.torch_runner.collectives import Gloo

FAMILY = "llama"


def mapped(group: Gloo, folder: str, size: int) -> Memory:
    names = [f"{folder}/memory-{size}-{rank}" for rank in range(group.size)]
    shared = [torch.from_file(name, shared=True, size=size, dtype=torch.uint8) for name in names]
    group.least(0)
    memory = Memory(shared[group.rank], [one.data_ptr() for one in shared], group.rank)
    memory.others = shared  # kept mapped
    return memory


def joined(ranks: Ranks, rank: int) -> None:
    """Every way to join against plain sums."""
    torch.manual_seed(1)
    shares, x = torch.randn(ranks.group.size, 5, ranks.width), torch.randn(5, ranks.width)
    gain, picks = torch.rand(ranks.width), torch.tensor([4, 1], dtype=torch.int32)

    def mine() -> torch.Tensor:
        return ranks.place(MLP, 5, x.device).copy_(shares[rank])

    for _ in range(2):
        assert torch.allclose(ranks.total(mine()), shares.sum(0), atol=1e-5)
        got = x.clone()
        ranks.add(got, mine())
        assert torch.allclose(got, x + shares.sum(0), atol=1e-5)
        for which in (None, picks):
            ours, theirs = x.clone(), x.clone()
            normed = ranks.add_rms_norm(ours, mine(), gain, 1e-5, which)
            assert torch.allclose(normed, layers.add_rms_norm(theirs, shares.sum(0), gain, 1e-5, which), atol=1e-5)
            assert torch.allclose(ours, theirs, atol=1e-5)
        half = ranks.add_rms_norm(x.clone(), mine(), gain.half(), 1e-5)
        assert half.dtype == torch.float16
        assert torch.allclose(half, layers.add_rms_norm(x.clone(), shares.sum(0), gain.half(), 1e-5), atol=1e-2)


def main(rank: int, size: int, folder: str) -> None:
    group = Gloo(rank, size, f"{folder}/store")
    spec = split(read_spec(card(FAMILY)), rank, size)
    joined(Ranks(group, spec, torch.float32, 64, 64, partial(mapped, group, folder)), rank)
    runner = CudaRunner(card(FAMILY), options("cpu"), step_tokens=64, ranks=group)
    memory = partial(mapped, group, folder)
    runner.decoder.ranks = Ranks(group, spec, torch.float32, 8, 64, memory)  # steps of more tokens go through gloo
    if rank:
        answers(runner, max_tokens=2, first=2)
        return
    print({key: tokens for key, (tokens, *_) in answers(runner, max_tokens=2, first=2).items()})


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3])
