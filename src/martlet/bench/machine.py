"""Facts of this machine: what a benchmark must say beside its figures, and what `martlet doctor` looks at.

Read from the kernel's files, so nothing is imported and nothing is run but nvidia-smi and git.
"""

from __future__ import annotations

import os
import platform
from pathlib import Path
from typing import Any

FEATURES = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "avx_vnni", "amx_tile", "asimd", "sve", "bf16", "i8mm")
LIBRARIES = ("numpy", "tokenizers", "torch", "transformers", "vllm", "huggingface_hub", "modelscope")


def cpu_model() -> str:
    return _cpuinfo("model name") or platform.processor() or platform.machine()


def cpu_features() -> list[str]:
    """The instruction sets that matter to matrix kernels, of those this CPU has."""
    have = set((_cpuinfo("flags") or _cpuinfo("Features")).split())
    return [f for f in FEATURES if f in have]


def total_memory() -> int:
    """Bytes of the whole machine."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def gpus() -> list[str]:
    """'NAME, memory, driver' of every NVIDIA GPU, asked of the driver's own tool. Empty where there is none."""
    import shutil
    import subprocess

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
    from importlib import metadata  # 10 ms that a measured start should not pay

    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def commit() -> str | None:
    """The git commit of the source tree Martlet runs from, with a + when files differ from it; None when installed."""
    root = Path(__file__).parents[3]
    import shutil
    import subprocess

    if not (root / ".git").exists() or shutil.which("git") is None:
        return None

    def git(*words: str) -> str:
        return subprocess.run(
            ["git", "-C", str(root), *words], capture_output=True, text=True, timeout=30
        ).stdout.strip()

    return git("rev-parse", "--short=12", "HEAD") + ("+" if git("status", "--porcelain", "-uno") else "")


def describe() -> dict[str, Any]:
    """All of the above for a line of results. No host names, no paths."""
    from martlet.runners.machine import free_memory, usable_cores

    return {
        "cpu": cpu_model(),
        "cores": usable_cores(),
        "features": cpu_features(),
        "memory": {"total": total_memory(), "free": free_memory()},
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
