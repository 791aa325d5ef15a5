"""Engines that can be measured offline, behind one small protocol, so that all are timed by the same code."""

from __future__ import annotations

import importlib.util
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from martlet.bench.timeline import Timeline
from martlet.errors import UsageError, did_you_mean

NAMES = ("native", "transformers", "vllm", "llama.cpp", "openvino")
BACKENDS = NAMES[:3]  # those behind martlet.backends; the others are adapters in martlet.bench.peers


@dataclass(frozen=True, slots=True)
class EngineJob:
    """What to load. path: where the model lies (peers read files). concurrency: sequences that may run at once.

    quant: of the native engine; others run what their file holds, or `dtype`. share_prefixes: for peers whose prefix
    cache has no salt, so that it is off where runs would hit each other's.
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

    @property
    def native_quant(self) -> str | None:
        return self.quant if self.engine == "native" else None


class OfflineEngine(Protocol):
    """A loaded model. about: version and the choices it made, for the results."""

    about: dict[str, str]

    def run(self, prompts: Sequence[Sequence[int]], new_tokens: int, salt: str) -> list[Timeline]:
        """Answer all prompts greedily with exactly `new_tokens` tokens each.

        salt: what is cached for prompts of one run is not to be found by a run of another salt.
        """
        ...

    def close(self) -> None: ...


def missing(name: str) -> str | None:
    """Why an engine cannot be measured here, or None. Raises UsageError for a name nobody has."""
    if name not in NAMES:
        known = ", ".join(NAMES)
        raise UsageError(f"no engine {name!r}; there are {known}.{did_you_mean(name, NAMES)}", param="engines")
    if name == "llama.cpp":
        here = shutil.which("llama-server") or importlib.util.find_spec("llama_cpp")
        return None if here else "no llama-server on the PATH and no package llama_cpp"
    module = {"native": "martlet", "openvino": "openvino_genai"}.get(name, name)
    return None if importlib.util.find_spec(module) else f"the package {module} is not installed"


def load(job: EngineJob) -> OfflineEngine:
    if job.engine in BACKENDS:
        from martlet.bench.backend_engine import BackendEngine

        return BackendEngine(job)
    from martlet.bench import peers

    return peers.OpenVINO(job) if job.engine == "openvino" else peers.load_llama_cpp(job)
