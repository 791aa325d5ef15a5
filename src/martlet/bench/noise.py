"""How much others slow this machine down: a fixed piece of work on every core, timed before and after a measurement."""

from __future__ import annotations

import hashlib
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

from martlet.runners.machine import usable_cores

QUIET = 1.10  # the most that counts as a quiet machine
SIZE = 48 << 20  # bytes hashed on each core: 20 to 150 ms, longer than a slice of the kernel's scheduler


def calibrate() -> tuple[float, float]:
    """Seconds until every core has hashed its bytes, and how often that is the time a core really worked for it.

    The second shows others at once, the first also a machine below this one that gives it less. hashlib lets go of the
    GIL.
    """
    cores = usable_cores()
    data = bytes(SIZE)

    def work(_: int) -> float:
        began = time.thread_time()
        hashlib.sha256(data).digest()
        return time.thread_time() - began

    with ThreadPoolExecutor(cores) as pool:
        began = time.perf_counter()
        worked = list(pool.map(work, range(cores)))
        took = time.perf_counter() - began
    return took, took / max(worked)


@dataclass(slots=True)
class Noise:
    """Calibrations of one benchmark. fastest: seconds, the best seen so far."""

    fastest: float = field(default_factory=lambda: min(calibrate()[0] for _ in range(5)))

    def slowdown(self) -> float:
        """How many times longer the work takes than on a quiet machine; 1 is best."""
        took, shared = calibrate()
        self.fastest = min(self.fastest, took)
        return max(took / self.fastest, shared)

    def wait(self, seconds: float) -> dict[str, float]:
        """Wait until the machine is quiet, `seconds` at most. Gives the last slowdown and how long was waited."""
        began = time.monotonic()
        while (slow := self.slowdown()) > QUIET and time.monotonic() - began < seconds:
            time.sleep(min(1.0, seconds))
        return {"before": round(slow, 3), "waited_s": round(time.monotonic() - began, 1)}
