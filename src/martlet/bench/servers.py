"""W5: the workload over HTTP, against a server of each engine, started for it."""

from __future__ import annotations

import os
import sys
from typing import Any

from martlet.bench.engines import BACKENDS, EngineJob
from martlet.bench.offline import Result, first_line, result_of
from martlet.bench.timeline import enough, figures
from martlet.bench.workloads import Workload
from martlet.errors import MartletError

WITHOUT = ("openvino",)  # engines that bring no server

# `martlet deploy` on the reference kernels, which no flag asks for: they are for comparison.
REFERENCE = """
import sys
from martlet import cli, runners
from martlet.runners.torch_runner import TorchRunner
runners.load = lambda card, options, *, progress=None, **_: TorchRunner(card, options, progress)
sys.exit(cli.main(sys.argv[1:]))
"""


def command(job: EngineJob, python: str) -> tuple[list[str], dict[str, str] | None, dict[str, Any]]:
    """Words to start a server with ({port} left open), its environment (None: ours), and fields its requests need."""
    if job.engine == "llama.cpp":
        from martlet.bench.peers import llama_command

        return llama_command(job), None, {"cache_prompt": False}
    if job.engine == "vllm":
        from martlet.bench.vllm_engine import environment, server_command

        return server_command(job, python), {**os.environ, **environment(python)}, {}
    program = ["-c", REFERENCE] if job.engine == "reference" else ["-m", "martlet"]
    backend = "pt" if job.engine == "transformers" else "native"
    words = [sys.executable, *program, "deploy", "--model", job.model, "--infer_backend", backend]
    words += ["--dtype", job.dtype, "--device", job.device, "--max_model_len", str(job.max_model_len)]
    words += ["--max_num_seqs", str(job.concurrency), "--served_model_name", "bench", "--port", "{port}"]
    return words + (["--quant", job.native_quant] if job.native_quant else []), None, {}


def measure_http(
    job: EngineJob, workload: Workload, runs: int, seconds: float | None = None, python: str = sys.executable
) -> Result:
    """Start the engine's server, run the workload up to `runs` times within `seconds`, and stop it."""
    from martlet.bench import http
    from martlet.bench.serving import serving

    result = result_of(job, workload.name)
    salted = job.engine in (*BACKENDS, "reference", "vllm")  # those that know cache_salt
    try:
        words, env, fields = command(job, python)
        with serving(words, env) as server:
            endpoint = http.Endpoint(
                f"http://127.0.0.1:{server.port}/v1", "bench", extra={"ignore_eos": True, **fields}
            )
            http.warm_up(endpoint, workload, "warm-up" if salted else "")
            while len(result.runs) < runs and not enough(result.runs, seconds):
                salt = f"run-{len(result.runs)}" if salted else ""
                timelines = http.measure(endpoint, workload, salt)
                result.runs.append(figures(timelines))
                result.note = http.check(timelines, workload)
                result.peak_mb, result.load_seconds = server.peak_mb, server.ready_seconds
    except MartletError as error:
        if result.runs:  # what was measured before stays
            result.note = f"run {len(result.runs) + 1} failed: {first_line(error)}"
        else:
            result.error = str(error)
    return result
