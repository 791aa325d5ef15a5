"""One rank's runner: the runner it would be alone, on its own device, with its share of the model."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace

from martlet.errors import BackendUnavailable, UsageError
from martlet.hub.card import ModelCard
from martlet.model.shard import fitting, split
from martlet.model.weights import read_spec
from martlet.runners.base import LoadOptions, Runner

log = logging.getLogger("martlet")


def check(card: ModelCard, options: LoadOptions) -> None:
    """Raise UsageError, naming what would work, when the model or the machine cannot be shared as asked."""
    size, spec = options.tensor_parallel_size, read_spec(card)
    if size < 1:
        raise UsageError(f"tensor_parallel_size must be at least 1, got {size}", param="tensor_parallel_size")
    split(spec, 0, size)
    if options.device == "cpu":
        return
    if options.device not in ("auto", "cuda"):
        raise UsageError(
            f"device {options.device!r}: ranks run on the first {size} visible GPUs; CUDA_VISIBLE_DEVICES chooses them",
            param="device",
        )
    from martlet.runners.torch_runner import count_gpus

    if (there := count_gpus()) < size:
        work = [n for n in fitting(spec) if n <= there]
        raise UsageError(
            f"tensor_parallel_size {size}: {there} GPUs are visible (CUDA_VISIBLE_DEVICES hides others); "
            + (f"{' or '.join(map(str, work))} would work" if work else "--device cpu runs ranks on the CPU, slowly"),
            param="tensor_parallel_size",
        )


def load_share(
    card: ModelCard,
    options: LoadOptions,
    rank: int,
    store: str,
    progress: Callable[[int, int], None] | None = None,
) -> Runner:
    """Load what rank `rank` of options.tensor_parallel_size holds; all ranks load at once. store: where they meet."""
    from martlet.runners.torch_runner import TorchRunner, collectives

    size = options.tensor_parallel_size
    if options.device == "cpu":
        return TorchRunner(card, options, progress, collectives.Gloo(rank, size, store))
    from martlet.runners.cuda_runner import CudaRunner

    options = replace(options, device=f"cuda:{rank}")
    ranks = collectives.Nccl(rank, size, store)
    try:
        return CudaRunner(card, options, progress, ranks=ranks)
    except BackendUnavailable as error:
        if rank == 0:
            log.warning("%s; torch runs the model instead, more slowly", error)
        return TorchRunner(card, options, progress, ranks)
