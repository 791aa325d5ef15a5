"""What this process may use of the machine: cores and memory, within its affinity mask and control group."""

from __future__ import annotations

import os
from pathlib import Path

GIB = 1 << 30


def usable_cores() -> int:
    """Cores to run on: the affinity mask, cut by the control group's quota (rounded up), at least 1."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = _cgroup_file("cpu.max").split() or [
        _cgroup_file("cpu.cfs_quota_us", "cpu"),
        _cgroup_file("cpu.cfs_period_us", "cpu"),
    ]
    if len(quota) == 2 and all(word.isdigit() for word in quota):
        cores = min(cores, -(-int(quota[0]) // int(quota[1])))
    return max(1, cores)


def free_memory() -> int:
    """Bytes this process can still take without swapping: of the machine, and of its control group if that is less.

    File pages that a group could drop count as free, as they do in the kernel's MemAvailable.
    """
    free = _machine_free()
    for limit, used, statistics, controller in (
        ("memory.max", "memory.current", "memory.stat", ""),
        ("memory.limit_in_bytes", "memory.usage_in_bytes", "memory.stat", "memory"),
    ):
        top, now = _cgroup_file(limit, controller), _cgroup_file(used, controller)
        if top.isdigit() and now.isdigit():
            rows = dict(line.split() for line in _cgroup_file(statistics, controller).splitlines() if " " in line)
            droppable = int(rows.get("total_inactive_file", rows.get("inactive_file", 0)))
            free = min(free, max(0, int(top) - int(now) + droppable))
    return free


def has_fast_bfloat16() -> bool:
    """Whether the CPU multiplies bfloat16 in hardware (AVX512-BF16, AMX or the Arm extension)."""
    cpuinfo = Path("/proc/cpuinfo")
    words = set(cpuinfo.read_text().split()) if cpuinfo.exists() else set()
    return not words.isdisjoint({"avx512_bf16", "amx_bf16", "bf16"})


def _machine_free() -> int:
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        for line in meminfo.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _cgroup_file(
    name: str,
    controller: str = "",
    mount: Path = Path("/sys/fs/cgroup"),
    groups: Path = Path("/proc/self/cgroup"),
) -> str:
    """A file of this process's own control group, or of the mount's root (which is its own inside a container)."""
    root = mount / controller
    lines = groups.read_text().splitlines() if groups.exists() else []
    fields = [line.split(":", 2) for line in lines]  # number, controllers (none in version 2), group
    own = [group.lstrip("/") for _, names, group in fields if controller in names.split(",")]
    for folder in (*(root / group for group in own), root):
        if (folder / name).is_file():
            return (folder / name).read_text().strip()
    return ""
