"""The operation table (`ops`) and who implements it. `ops_for` is the one place that chooses."""

from __future__ import annotations

from martlet.kernels.ops import Ops

__all__ = ["Ops", "ops_for"]


def ops_for(device: str) -> Ops:
    """The implementation for a torch device ("cpu", "cuda", "cuda:0", ...)."""
    from martlet.kernels.reference import ReferenceOps

    return ReferenceOps()
