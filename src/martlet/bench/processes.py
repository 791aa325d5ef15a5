"""Memory of processes and of what they started, from the kernel's files."""

from __future__ import annotations

import contextlib
from pathlib import Path


def tree_peak_mb(pid: int) -> float:
    """Largest resident memory so far of a living process and of its living descendants, added up; 0 if unknown."""
    return sum(_peak_mb(one) for one in (pid, *_descendants(pid)))


def _peak_mb(pid: int) -> float:
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) / 1024
    return 0.0


def _descendants(pid: int) -> list[int]:
    """Children are listed with the thread that started them, so every thread is asked."""
    found = []
    with contextlib.suppress(OSError):
        for task in Path(f"/proc/{pid}/task").iterdir():
            for child in (task / "children").read_text().split():
                found += [int(child), *_descendants(int(child))]
    return found
