"""`martlet doctor`: look at the machine; say line by line what is fine, what is missing and what to do."""

from __future__ import annotations

import os
import platform
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass

from martlet.bench import machine
from martlet.cli.flags import Command, flag

GIB = 1 << 30
REQUIRED = (
    "numpy",
    "ml_dtypes",
    "tokenizers",
    "safetensors",
    "gguf",
    "jinja2",
    "fastapi",
    "uvicorn",
    "httptools",
    "pydantic",
    "orjson",
    "llguidance",
    "prometheus-client",
    "rich",
    "httpx",
)
OPTIONAL = {
    "torch": "the reference kernels and CUDA: pip install 'martlet[torch]'",
    "transformers": "--infer_backend pt: pip install 'martlet[transformers]'",
    "vllm": "--infer_backend vllm: pip install 'martlet[vllm]'",
    "huggingface_hub": "models from hf: sources: pip install 'martlet[hf]'",
    "modelscope": "models from modelscope: sources: pip install 'martlet[modelscope]'",
}


@dataclass(frozen=True)
class DoctorOptions:
    """Doctor."""

    json: bool = flag("print one JSON document", False)


@dataclass(frozen=True, slots=True)
class Finding:
    """state: ok; note (something optional is absent or tight); broken (Martlet cannot run). remedy: what to do."""

    what: str
    found: str
    state: str = "ok"
    remedy: str = ""


def run(options: DoctorOptions) -> int:
    """Print the findings; 1 when one of them is broken, else 0."""
    findings = list(examine())
    if options.json:
        import json

        print(json.dumps([asdict(f) for f in findings], indent=2))
    else:
        marks = {"ok": "ok", "note": "--", "broken": "!!"}
        for f in findings:
            print(f"{marks[f.state]}  {f.what:<16}{f.found}" + (f"\n    {'':<16}-> {f.remedy}" if f.remedy else ""))
    return int(any(f.state == "broken" for f in findings))


def examine() -> Iterator[Finding]:
    yield _python()
    yield _cpu()
    yield from _gpu()
    libraries = list(_libraries())
    yield from libraries
    if any(f.state == "broken" for f in libraries):
        return  # the checks below import what is missing
    yield _cores()
    yield _memory()
    yield _compiler()
    yield _cache()
    yield _default_model()
    yield _backend()


def _python() -> Finding:
    found = f"{platform.python_version()} on {platform.system()} {platform.machine()}"
    return Finding("Python", found)


def _cpu() -> Finding:
    features = machine.cpu_features()
    return Finding("CPU", f"{machine.cpu_model()}; {' '.join(features) or 'no vector extension known to us'}")


def _cores() -> Finding:
    from martlet.runners.machine import usable_cores

    usable = usable_cores()
    found = f"{usable} usable of {os.cpu_count()}"
    if usable < 2:
        return Finding("cores", found, "note", "the server shares a single core with the model; give it two or more")
    return Finding("cores", found)


def _memory() -> Finding:
    from martlet.runners.machine import free_memory

    free = free_memory()
    found = f"{free / GIB:.1f} GiB free of the machine's {machine.total_memory() / GIB:.1f} GiB"
    if free < GIB:
        return Finding(
            "memory", found, "note", "the default model wants about 1 GiB; close something or raise the limit"
        )
    return Finding("memory", found)


def _gpu() -> Iterator[Finding]:
    cards = machine.gpus()
    if not cards:
        yield Finding("GPU", "none seen; models run on the CPU")
    for card in cards:
        torch = machine.library_version("torch") or ""
        if not torch or "+cpu" in torch:
            yield Finding("GPU", card, "note", f"torch is {torch or 'absent'}; install a CUDA build of torch to use it")
        else:
            yield Finding("GPU", card)


def _libraries() -> Iterator[Finding]:
    have = {name: machine.library_version(name) for name in REQUIRED}
    missing = [name for name, version in have.items() if version is None]
    if missing:
        yield Finding("libraries", f"missing: {', '.join(missing)}", "broken", f"pip install {' '.join(missing)}")
    else:
        yield Finding("libraries", ", ".join(f"{name} {version}" for name, version in have.items()))
    for name, remedy in OPTIONAL.items():
        version = machine.library_version(name)
        yield Finding(name, version) if version else Finding(name, "not installed", "note", f"only needed for {remedy}")


def _compiler() -> Finding:
    for name in ("c++", "g++", "clang++"):
        if shutil.which(name):
            return Finding("C++ compiler", name)
    return Finding("C++ compiler", "none", "note", "only needed to build kernels from source: install g++ or clang++")


def _cache() -> Finding:
    from martlet.hub import cache_dir

    folder = cache_dir()
    existing = next(p for p in (folder, *folder.parents) if p.exists())
    free = shutil.disk_usage(existing).free
    found = f"{folder}, {free / GIB:.1f} GiB free"
    if not os.access(existing, os.W_OK):
        return Finding(
            "model cache", found, "broken", f"{existing} is not writable; set XDG_CACHE_HOME to a folder that is"
        )
    if free < GIB:
        return Finding(
            "model cache", found, "note", "`martlet models rm NAME` frees space, XDG_CACHE_HOME moves the cache"
        )
    return Finding("model cache", found)


def _default_model() -> Finding:
    from martlet import hub

    path = hub.cached(hub.DEFAULT_MODEL)
    if path is None:
        remedy = f"the first `martlet infer` fetches it; `martlet models pull {hub.DEFAULT_MODEL}` does it now"
        return Finding("default model", f"{hub.DEFAULT_MODEL} is not here", "note", remedy)
    return Finding("default model", f"{hub.DEFAULT_MODEL} in {path}")


def _backend() -> Finding:
    from martlet import backends

    kind, kernels = backends.NAMES["auto"], _kernels()
    if kernels is None and machine.library_version("torch") is None:
        remedy = "install g++ or clang++ for the native CPU kernels, or torch: pip install 'martlet[torch]'"
        return Finding("backend", f"{kind}, with nothing to run it on", "broken", remedy)
    return Finding("backend", f"{kind} on a CPU with {kernels or 'torch'} (what --infer_backend auto takes)")


def _kernels() -> str | None:
    """Whether the native CPU kernels are built, or can be at first use."""
    from martlet.kernels.cpu import build

    if build.find() is not None:
        return "native kernels"
    try:
        build.compiler()
    except build.BuildError:
        return None
    return "native kernels, compiled at first use"


COMMAND = Command("Check this machine: hardware, libraries, cache, default model.", DoctorOptions, run)
