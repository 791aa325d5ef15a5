"""Whatever can run one step of a model. `load` chooses; `base` is the seam the engine sees."""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Callable

from martlet.errors import BackendUnavailable
from martlet.hub.card import ModelCard
from martlet.runners.base import LoadOptions, Runner

__all__ = ["LoadOptions", "Runner", "load"]

log = logging.getLogger("martlet")

Progress = Callable[[int, int], None]


def load(
    card: ModelCard,
    options: LoadOptions,
    *,
    progress: Progress | None = None,
    reading: Callable[[], object] = lambda: None,
) -> Runner:
    """Load a model onto a device. progress(done, total) counts parameters.

    reading() is called, once or more often, when weights are about to be read: from then on Python has little to do.

    On a GPU, the CUDA runner; on a CPU, the C++ runner; torch on the same device where that cannot run the model.
    With several ranks, a ParallelRunner over them. Raises ModelNotFound (no such family), CheckpointError, OutOfMemory,
    UsageError or BackendUnavailable.
    """
    if options.tensor_parallel_size != 1:
        from martlet.runners.parallel import ParallelRunner

        reading()
        return ParallelRunner(card, options, progress)
    try:
        if options.device.startswith("cuda") or (options.device == "auto" and _has_cuda()):
            from martlet.runners.cuda_runner import CudaRunner

            reading()
            return CudaRunner(card, options, progress)
        from martlet.runners.cpu_runner import CpuRunner

        return CpuRunner(card, options, progress, reading)
    except BackendUnavailable as error:
        if error.param == "device":  # torch would not find it either
            raise
        if importlib.util.find_spec("torch") is None:
            raise BackendUnavailable(f"{error}; torch could run it: pip install 'martlet[torch]'") from None
        log.warning("%s; torch runs the model instead, more slowly", error)
    from martlet.runners.torch_runner import TorchRunner

    reading()
    return TorchRunner(card, options, progress)


def _has_cuda() -> bool:
    """Whether torch, if installed, sees a GPU. Asks the driver before it pays for importing torch."""
    if importlib.util.find_spec("torch") is None or not _driver_present():
        return False
    from martlet.runners.torch_runner import default_device

    return default_device() == "cuda"


def _driver_present() -> bool:
    import ctypes

    try:
        ctypes.CDLL("libcuda.so.1")  # find_library would start processes to find it, which takes 30 ms
    except OSError:
        return False
    return True
