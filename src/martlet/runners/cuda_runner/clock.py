"""How long the phases of a start took, for its one line in the log."""

from __future__ import annotations

import time

import torch


class Clock:
    """Times the phases of a start."""

    def __init__(self):
        self.began = self.last = time.perf_counter()
        self.laps: list[str] = []

    def lap(self, name: str, device: torch.device) -> None:
        if device.type == "cuda":
            torch.cuda.synchronize()
        now = time.perf_counter()
        self.laps.append(f"{name} {now - self.last:.2f} s")
        self.last = now

    @property
    def total(self) -> float:
        return self.last - self.began

    def __str__(self) -> str:
        return ", ".join(self.laps)
