"""Facts of this machine: what a benchmark must say beside its figures, and what `martlet doctor` looks at.

Read from the kernel's files, so nothing is imported and nothing is run but nvidia-smi and git.
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

FEATURES = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "avx_vnni", "amx_tile", "asimd", "sve", "bf16", "i8mm")
LIBRARIES = ("numpy", "tokenizers", "torch", "transformers", "vllm", "huggingface_hub", "modelscope")


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes. limit: of the control group, or the whole machine's; available: what can be had without swapping."""

    limit: int
    available: int


def cpu_model() -> str:
    return _cpuinfo("model name") or platform.processor() or platform.machine()


def cpu_features() -> list[str]:
    """The instruction sets that matter to matrix kernels, of those this CPU has."""
    have = set((_cpuinfo("flags") or _cpuinfo("Features")).split())
    return [f for f in FEATURES if f in have]


def usable_cores() -> float:
    """Cores this process may use: the affinity mask, cut by the control group's quota (which may be a fraction)."""
    affinity = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = _cgroup("cpu.max").split()
    if not quota:
        quota = [_cgroup("cpu.cfs_quota_us", "cpu"), _cgroup("cpu.cfs_period_us", "cpu")]
    if len(quota) == 2 and all(q.isdigit() for q in quota):
        return min(affinity, int(quota[0]) / int(quota[1]))
    return affinity


def memory() -> Memory:
    meminfo = _colon_file(Path("/proc/meminfo"))
    if not meminfo:
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        return Memory(total, total)
    total, available = (1024 * int(meminfo[k].split()[0]) for k in ("MemTotal", "MemAvailable"))
    for limit, used in (
        (_cgroup("memory.max"), _cgroup("memory.current")),
        (_cgroup("memory.limit_in_bytes", "memory"), _cgroup("memory.usage_in_bytes", "memory")),
    ):
        if limit.isdigit() and used.isdigit() and int(limit) < total:
            return Memory(int(limit), max(0, min(available, int(limit) - int(used))))
    return Memory(total, available)


def gpus() -> list[str]:
    """'NAME, memory, driver' of every NVIDIA GPU, asked of the driver's own tool. Empty where there is none."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return []
    query = [tool, "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"]
    try:
        answer = subprocess.run(query, capture_output=True, text=True, timeout=10)
    except subprocess.TimeoutExpired:
        return []
    return answer.stdout.strip().splitlines() if answer.returncode == 0 else []


def library_version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def commit() -> str | None:
    """The git commit of the source tree Martlet runs from, with a + when files differ from it; None when installed."""
    root = Path(__file__).parents[3]
    if not (root / ".git").exists() or shutil.which("git") is None:
        return None

    def git(*words: str) -> str:
        return subprocess.run(
            ["git", "-C", str(root), *words], capture_output=True, text=True, timeout=30
        ).stdout.strip()

    return git("rev-parse", "--short=12", "HEAD") + ("+" if git("status", "--porcelain", "-uno") else "")


def describe() -> dict[str, Any]:
    """All of the above for a line of results. No host names, no paths."""
    return {
        "cpu": cpu_model(),
        "cores": usable_cores(),
        "features": cpu_features(),
        "memory": asdict(memory()),
        "gpus": gpus(),
        "system": platform.platform(),
        "python": platform.python_version(),
        "versions": {name: version for name in ("martlet", *LIBRARIES) if (version := library_version(name))},
        "commit": commit(),
    }


def _cpuinfo(key: str) -> str:
    return _colon_file(Path("/proc/cpuinfo")).get(key, "")


def _colon_file(path: Path) -> dict[str, str]:
    """'key : value' lines of a kernel file, the first of each key; {} where the kernel has no such file."""
    if not path.exists():
        return {}
    pairs = (line.partition(":")[::2] for line in reversed(path.read_text().splitlines()) if ":" in line)
    return {key.strip(): value.strip() for key, value in pairs}


def _cgroup(file: str, controller: str = "") -> str:
    """A value of this process's own control group: the mount's root as a container sees it, or the group's folder."""
    root = Path("/sys/fs/cgroup") / controller
    groups = Path("/proc/self/cgroup")
    own = [line.rsplit(":", 1)[1].lstrip("/") for line in groups.read_text().splitlines()] if groups.exists() else []
    for folder in (*(root / group for group in own), root):
        if (folder / file).is_file():
            return (folder / file).read_text().strip()
    return ""
