"""How much others slow this machine down: a fixed piece of work on every core, timed before and after a measurement."""

from __future__ import annotations

import hashlib
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

from martlet.runners.machine import usable_cores

QUIET = 1.10  # a machine is quiet when the work takes at most this many times the fastest seen
SIZE = 48 << 20  # bytes hashed on each core: 20 to 150 ms, longer than a slice of the kernel's scheduler


def calibrate() -> float:
    """Seconds until every core has hashed its bytes. hashlib lets go of the GIL."""
    cores = usable_cores()
    data = bytes(SIZE)
    with ThreadPoolExecutor(cores) as pool:
        began = time.perf_counter()
        list(pool.map(lambda _: hashlib.sha256(data).digest(), range(cores)))
        return time.perf_counter() - began


@dataclass(slots=True)
class Noise:
    """Calibrations of one benchmark. fastest: seconds, the best seen so far; slowdowns are ratios to it."""

    fastest: float = field(default_factory=lambda: min(calibrate() for _ in range(5)))

    def slowdown(self) -> float:
        took = calibrate()
        self.fastest = min(self.fastest, took)
        return took / self.fastest

    def wait(self, seconds: float) -> dict[str, float]:
        """Wait until the machine is quiet, `seconds` at most. Gives the last slowdown and how long was waited."""
        began = time.monotonic()
        while (slow := self.slowdown()) > QUIET and time.monotonic() - began < seconds:
            time.sleep(min(1.0, seconds))
        return {"before": round(slow, 3), "waited_s": round(time.monotonic() - began, 1)}
