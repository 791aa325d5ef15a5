"""Engines that can be measured offline, behind one small protocol, so that all are timed by the same code."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

from martlet.bench.timeline import Timeline
from martlet.errors import UsageError, did_you_mean

NAMES = ("native", "reference", "transformers", "vllm", "llama.cpp", "openvino")
BACKENDS = NAMES[:3]  # those behind our Backend; the others are adapters in martlet.bench.peers and vllm_engine
OURS = NAMES[:2]
QUANTS = ("auto", "stored", "float32", "bf16", "int8", "int4")  # of the native engine
ENTRY = r"(?P<name>[\w.]+)(:(?P<type>\w+))?(@(?P<only>[\w+]+))?(=(?P<model>.+))?"


class Entry(NamedTuple):
    """One word of --engines: NAME[:TYPE][@W1+W2][=MODEL]. only: the workloads it is for, all when empty."""

    name: str
    type: str | None = None
    only: tuple[str, ...] = ()
    model: str | None = None


class EngineJob(NamedTuple):
    """What to load. path: where the model lies (peers read files). concurrency: sequences that may run at once.

    label: what results call it. weights: number type of the weights as they run. quant: of the native engine; others
    run what their file holds, or `dtype`. only: the workloads it is for, all when empty. share_prefixes: for peers
    whose prefix cache has no salt, so that it is off where runs would hit each other's.
    """

    engine: str
    model: str
    path: str
    dtype: str = "auto"
    quant: str | None = None
    device: str = "auto"
    max_model_len: int = 2048
    concurrency: int = 16
    share_prefixes: bool = False
    label: str = ""
    weights: str = "auto"
    only: tuple[str, ...] = ()

    @property
    def native_quant(self) -> str | None:
        return self.quant if self.engine == "native" else None


class OfflineEngine(Protocol):
    """A loaded model. about: version and the choices it made, for the results.

    spawned: when the process that runs the model was started, if that is another one than asks for it.
    """

    about: dict[str, str]
    spawned: float | None

    def run(self, prompts: Sequence[Sequence[int]], new_tokens: int, salt: str) -> list[Timeline]:
        """Answer all prompts greedily with exactly `new_tokens` tokens each.

        salt: what is cached for prompts of one run is not to be found by a run of another salt.
        """
        ...

    def peak_mb(self) -> float:
        """Largest resident memory so far of the processes that run the model."""
        ...

    def close(self) -> None: ...


def parse(word: str) -> Entry:
    """Raises UsageError for a word of another shape or an engine nobody has."""
    match = re.fullmatch(ENTRY, word)
    if match is None:
        raise UsageError(f"--engines wants NAME[:TYPE][@W1+W2][=MODEL], got {word!r}", param="engines")
    name = match["name"]
    if name not in NAMES:
        known = ", ".join(NAMES)
        raise UsageError(f"no engine {name!r}; there are {known}.{did_you_mean(name, NAMES)}", param="engines")
    if match["type"] and name in ("llama.cpp", "openvino"):
        raise UsageError(f"{name} runs what its file holds; give {name}=MODEL instead of {word!r}", param="engines")
    return Entry(name, match["type"], tuple((match["only"] or "").split("+")) if match["only"] else (), match["model"])


def job(
    entry: Entry, model: str, path: Path, dtypes: Mapping[str, str], dtype: str, quant: str | None, device: str
) -> EngineJob:
    """The job of an entry whose model was found. dtypes: names of number types, and what each means.

    dtype, quant: for entries that name no type. A type is a quant for the native engine, a dtype for others.
    """
    from martlet.bench.precision import stored
    from martlet.runners.machine import has_fast_bfloat16

    kept = stored(path)
    if entry.name == "native":
        if entry.type is not None:
            quant = {"bfloat16": "bf16", "fp32": "float32"}.get(entry.type, entry.type)
            if quant not in QUANTS:
                raise UsageError(f"native:{entry.type} is none of {', '.join(QUANTS)}", param="engines")
        fixed = {"auto": kept if path.suffix == ".gguf" else "int8", "stored": kept}
        weights = fixed.get(quant, quant) if quant else kept if dtype == "auto" else dtype
    elif entry.name in ("reference", "transformers", "vllm"):
        if entry.type is not None and entry.type not in dtypes:
            raise UsageError(f"{entry.name}:{entry.type} is none of {', '.join(dtypes)}", param="engines")
        dtype = dtypes[entry.type or dtype]
        if dtype == "auto":
            dtype = "bfloat16" if has_fast_bfloat16() else "float32"
        weights = dtype
    else:
        weights = kept
    return EngineJob(
        entry.name,
        model,
        str(path),
        dtype=dtype,
        quant=quant if entry.name == "native" else None,
        device=device,
        label=f"{entry.name} {weights}",
        weights=weights,
        only=entry.only,
    )


def missing(name: str) -> str | None:
    """Why an engine cannot be measured with this Python, or None."""
    if name == "llama.cpp":
        import shutil

        here = shutil.which("llama-server") or importlib.util.find_spec("llama_cpp")
        return None if here else "no llama-server on the PATH and no package llama_cpp"
    module = {"native": "martlet", "reference": "torch", "openvino": "openvino_genai"}.get(name, name)
    return None if importlib.util.find_spec(module) else f"the package {module} is not installed"


def load(job: EngineJob) -> OfflineEngine:
    if job.engine in BACKENDS:
        from martlet.bench.backend_engine import BackendEngine

        return BackendEngine(job)
    if job.engine == "vllm":
        from martlet.bench.vllm_engine import VLLM

        return VLLM(job)
    from martlet.bench import peers

    return peers.OpenVINO(job) if job.engine == "openvino" else peers.load_llama_cpp(job)
