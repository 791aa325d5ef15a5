"""Whatever can run one step of a model. `load` chooses; `base` is the seam the engine sees."""

from __future__ import annotations

from collections.abc import Callable

from martlet.errors import BackendUnavailable
from martlet.hub.card import ModelCard
from martlet.runners.base import LoadOptions, Runner

__all__ = ["LoadOptions", "Runner", "load"]


def load(card: ModelCard, options: LoadOptions, *, progress: Callable[[int, int], None] | None = None) -> Runner:
    """Load a model onto a device. progress(done, total) counts parameters.

    Raises ModelNotFound (no such family), CheckpointError, OutOfMemory, UsageError or BackendUnavailable.
    """
    try:
        from martlet.runners.torch_runner import TorchRunner
    except ModuleNotFoundError as error:
        if error.name != "torch":
            raise
        raise BackendUnavailable(
            "this model runs on torch, which is not installed: pip install 'martlet[torch]'"
        ) from None
    return TorchRunner(card, options, progress)
