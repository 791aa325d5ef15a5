"""How often values fell into which bucket: a list and a bisection, since some come with every token."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence


class Histogram:
    """bounds: the buckets' upper ends, ascending; what is above the last one has a bucket of its own.

    One thread observes, any may read.
    """

    __slots__ = ("bounds", "counts", "total")

    def __init__(self, bounds: Sequence[float]):
        self.bounds = tuple(bounds)
        self.counts = [0] * (len(self.bounds) + 1)  # of each bucket alone
        self.total = 0.0  # sum of the values

    def observe(self, value: float) -> None:
        self.counts[bisect_left(self.bounds, value)] += 1
        self.total += value
