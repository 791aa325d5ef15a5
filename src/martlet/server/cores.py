"""Which cores a replica computes on: replicas that each used all of them would wait for one another.

Only Linux ties threads to cores; elsewhere replicas share them as they come.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from pathlib import Path


def cpus_each(nodes: Sequence[float], replicas: int) -> float:
    """The most that each of `replicas` can have of machines with so many CPUs each.

    Whole ones where there are enough; else all the CPUs divided, which Ray understands as shares of one.
    """
    most = int(max(nodes, default=0))
    for cpus in range(most, 0, -1):
        if sum(int(node // cpus) for node in nodes) >= replicas:
            return float(cpus)
    return math.floor(1000 * max(nodes, default=0) / replicas) / 1000  # rounded down, so that all fit


def share(place: int, cpus: float) -> set[int]:
    """The cores of the replica in that place on its machine, counted from 0; all there are for 0 CPUs."""
    if not hasattr(os, "sched_getaffinity"):
        return set()
    cores = sorted(os.sched_getaffinity(0))
    count = min(len(cores), math.ceil(cpus)) or len(cores)
    return {cores[(place * count + i) % len(cores)] for i in range(count)}


def keep_to(cores: set[int]) -> None:
    """Run every thread of this process, and all that they start, on these cores; on no particular ones for none."""
    if not cores:
        return
    for task in Path("/proc/self/task").iterdir():
        os.sched_setaffinity(int(task.name), cores)
