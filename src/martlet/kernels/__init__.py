"""The operation table (`ops`) and who implements it. `ops_for` is the one place that chooses."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from martlet.kernels.ops import Ops

__all__ = ["ops_for"]


def ops_for(device: str) -> Ops:
    """The implementation for a torch device ("cpu", "cuda:0", ...): the reference, which runs on any of them.

    The CUDA and C++ kernels do not go through this table: their runners call them a whole layer or step at a time.
    """
    from martlet.kernels.reference import ReferenceOps

    return ReferenceOps()
