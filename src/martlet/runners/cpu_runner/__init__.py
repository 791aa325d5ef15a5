"""The runner on our C++ library: no torch, one C call a step. `CpuRunner` is the Runner."""

from martlet.runners.cpu_runner.runner import CpuRunner

__all__ = ["CpuRunner"]
