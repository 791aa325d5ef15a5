"""A martlet Backend (native, reference, transformers) as an engine to measure."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Sequence

from martlet import backends, hub
from martlet._version import __version__
from martlet.bench.engines import OURS, EngineJob
from martlet.bench.machine import library_version
from martlet.bench.processes import tree_peak_mb
from martlet.bench.timeline import Timeline
from martlet.engine.request import Output, Request
from martlet.runners.base import LoadOptions
from martlet.sampling_params import SamplingParams


class BackendEngine:
    spawned: float | None = None

    def __init__(self, job: EngineJob):
        options = LoadOptions(
            device=job.device,
            dtype=job.dtype,
            quant=job.native_quant,
            max_model_len=job.max_model_len,
            max_num_seqs=job.concurrency,
        )
        self.backend = _reference(job, options) if job.engine == "reference" else _backend(job, options)
        version = __version__ if job.engine in OURS else library_version(job.engine)
        self.about = {"version": str(version), "dtype": job.dtype, "weights": self.backend.card.format}
        if job.native_quant is not None:
            self.about["quant"] = job.native_quant

    def run(self, prompts: Sequence[Sequence[int]], new_tokens: int, salt: str) -> list[Timeline]:
        params = SamplingParams(temperature=0.0, max_tokens=new_tokens, ignore_eos=True)
        requests = [
            Request(f"{salt}-{i}", prompt, params, stream=True, cache_salt=salt) for i, prompt in enumerate(prompts)
        ]
        recorder = Recorder(requests)
        self.backend.submit(requests, recorder)
        return recorder.wait()

    def peak_mb(self) -> float:
        return tree_peak_mb(os.getpid())

    def close(self) -> None:
        self.backend.close()


def _backend(job: EngineJob, options: LoadOptions) -> backends.Backend:
    return backends.load(job.model, backend=job.engine, load=options)


def _reference(job: EngineJob, options: LoadOptions) -> backends.Backend:
    """Our engine over the reference kernels, whatever this machine has for the native ones."""
    from martlet.backends.native import NativeBackend
    from martlet.runners.torch_runner import TorchRunner

    card = hub.resolve(job.model)
    return NativeBackend(card, hub.load_tokenizer(card), TorchRunner(card, options))


class Recorder:
    """A sink that writes down when the outputs of requests, submitted now, come."""

    def __init__(self, requests: Sequence[Request]):
        now = time.monotonic()
        self.timelines = {r.id: Timeline(now, len(r.prompt_token_ids)) for r in requests}
        self._open = len(requests)
        self._error: BaseException | None = None
        self._done = threading.Event()

    def put(self, outputs: list[Output]) -> None:
        now = time.monotonic()
        for output in outputs:
            if output.token_ids:
                self.timelines[output.request_id].add(now, len(output.token_ids), output.token_ids)
            self._error = self._error or output.error
            self._open -= output.last
        if self._open == 0:
            self._done.set()

    def wait(self) -> list[Timeline]:
        """All timelines, when the last request is done. Raises the error of a request that failed."""
        self._done.wait()
        if self._error is not None:
            raise self._error
        return list(self.timelines.values())
