"""Other people's engines, measured where they are installed: llama.cpp and OpenVINO GenAI.

llama.cpp reads a GGUF file, OpenVINO that or a folder of its own format. Their packages are imported here only, when
they are asked for.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import subprocess
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

from martlet.bench.engines import EngineJob, OfflineEngine
from martlet.bench.machine import library_version
from martlet.bench.processes import tree_peak_mb
from martlet.bench.timeline import Timeline
from martlet.errors import BackendUnavailable


def gguf(job: EngineJob) -> str:
    if not job.path.endswith(".gguf"):
        raise BackendUnavailable(f"{job.engine} is measured on .gguf files, and {job.path} is none")
    return job.path


def llama_command(job: EngineJob) -> list[str]:
    """llama-server with a slot a sequence, and its own defaults beyond that. {port} is left open."""
    context = str(job.concurrency * job.max_model_len)  # llama-server divides it by the slots
    command = ["llama-server", "--model", gguf(job), "--host", "127.0.0.1", "--port", "{port}"]
    return [*command, "--parallel", str(job.concurrency), "--ctx-size", context]


def llama_version() -> str:
    done = subprocess.run(["llama-server", "--version"], capture_output=True, text=True, timeout=30)
    lines = (done.stdout + done.stderr).splitlines()
    return next((line for line in lines if line.startswith("version")), "unknown").removeprefix("version: ")


def load_llama_cpp(job: EngineJob) -> OfflineEngine:
    """llama-server when it is on the PATH (it batches), else the Python package (one request after the other)."""
    return LlamaServer(job) if shutil.which("llama-server") else LlamaPackage(job)


class LlamaServer:
    """A llama-server of our own, asked over its native /completion route, which takes token ids."""

    def __init__(self, job: EngineJob):
        from martlet.bench.serving import serving

        version = llama_version()
        self._stack = ExitStack()
        self.spawned: float | None = time.monotonic()
        self._server = self._stack.enter_context(serving(llama_command(job)))
        self._job = job
        self.about = {"version": f"llama.cpp {version}"}

    def run(self, prompts: Sequence[Sequence[int]], new_tokens: int, salt: str) -> list[Timeline]:
        return asyncio.run(self._run(prompts, new_tokens))

    async def _run(self, prompts: Sequence[Sequence[int]], new_tokens: int) -> list[Timeline]:
        import httpx

        from martlet.bench.http import ALONE, LIMIT, events, together

        url = f"http://127.0.0.1:{self._server.port}/completion"
        turn = asyncio.Semaphore(self._job.concurrency)
        async with httpx.AsyncClient(timeout=LIMIT, limits=ALONE) as client:

            async def one(prompt: Sequence[int]) -> Timeline:
                body = {"prompt": list(prompt), "n_predict": new_tokens, "temperature": 0, "ignore_eos": True}
                body |= {"stream": True, "return_tokens": True, "cache_prompt": self._job.share_prefixes}
                async with turn:
                    timeline = Timeline(time.monotonic(), len(prompt))
                    async for event in events(client, url, body):
                        if tokens := event.get("tokens"):
                            timeline.add(time.monotonic(), len(tokens), tokens)
                    return timeline

            return await together(one(prompt) for prompt in prompts)

    def peak_mb(self) -> float:
        return self._server.peak_mb

    def close(self) -> None:
        self._stack.close()


class LlamaPackage:
    """llama-cpp-python: one sequence at a time."""

    spawned: float | None = None

    def __init__(self, job: EngineJob):
        from llama_cpp import Llama

        self._model = Llama(gguf(job), n_ctx=job.max_model_len, verbose=False)
        self.about = {"version": f"llama_cpp {library_version('llama_cpp_python')}"}

    def run(self, prompts: Sequence[Sequence[int]], new_tokens: int, salt: str) -> list[Timeline]:
        began = time.monotonic()
        timelines = []
        for prompt in prompts:
            timeline = Timeline(began, len(prompt))
            self._model.reset()
            for token in self._model.generate(list(prompt), temp=0.0, repeat_penalty=1.0):
                timeline.add(time.monotonic(), 1, [token])
                if timeline.new_tokens == new_tokens:
                    break
            timelines.append(timeline)
        return timelines

    def peak_mb(self) -> float:
        return tree_peak_mb(os.getpid())

    def close(self) -> None:
        self._model.close()


class OpenVINO:
    """OpenVINO GenAI's continuous batching, over a GGUF file or a folder with openvino_model.xml and its tokenizer."""

    spawned: float | None = None

    def __init__(self, job: EngineJob):
        path = job.path if (Path(job.path) / "openvino_model.xml").is_file() else gguf(job)
        import openvino
        import openvino_genai

        self._tensor, self._genai = openvino.Tensor, openvino_genai
        scheduler = openvino_genai.SchedulerConfig()
        scheduler.max_num_seqs = job.concurrency
        scheduler.dynamic_split_fuse = True
        scheduler.enable_prefix_caching = job.share_prefixes
        scheduler.cache_size = 1  # GiB
        self._pipeline = openvino_genai.ContinuousBatchingPipeline(path, scheduler, "CPU")
        self._next_id = 0
        self.about = {"version": f"openvino_genai {library_version('openvino-genai')}"}

    def run(self, prompts: Sequence[Sequence[int]], new_tokens: int, salt: str) -> list[Timeline]:
        import numpy as np

        config = self._genai.GenerationConfig()
        config.max_new_tokens, config.ignore_eos, config.do_sample = new_tokens, True, False
        open_requests = []
        for prompt in prompts:
            ids = self._tensor(np.asarray(prompt, np.int64)[None])
            timeline = Timeline(time.monotonic(), len(prompt))
            open_requests.append((self._pipeline.add_request(self._next_id, ids, config), timeline))
            self._next_id += 1
        while self._pipeline.has_non_finished_requests():
            self._pipeline.step()
            now = time.monotonic()
            for handle, timeline in open_requests:
                while handle.can_read():
                    for output in handle.read().values():
                        timeline.add(now, len(output.generated_ids), output.generated_ids)
        return [timeline for _, timeline in open_requests]

    def peak_mb(self) -> float:
        return tree_peak_mb(os.getpid())

    def close(self) -> None:
        del self._pipeline
