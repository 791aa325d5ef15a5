"""Run workloads on engines, each in a process of its own, and collect the results."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from martlet.bench import workloads
from martlet.bench.engines import BACKENDS, EngineJob
from martlet.bench.timeline import figures, medians
from martlet.bench.workloads import Workload
from martlet.errors import MartletError


@dataclass(slots=True)
class Result:
    """One engine on one workload. figures: medians of `runs`. error: why there are none. note: a caveat to print."""

    engine: str
    model: str
    workload: str
    runs: list[dict[str, float]] = field(default_factory=list)
    peak_mb: float = 0.0
    load_seconds: float = 0.0
    about: dict[str, str] = field(default_factory=dict)
    fingerprints: list[str] = field(default_factory=list)
    error: str | None = None
    note: str | None = None

    @property
    def figures(self) -> dict[str, float]:
        return medians(self.runs) if self.runs else {}


def measure(job: EngineJob, workload: Workload, runs: int, python: str = sys.executable) -> Result:
    """Measure a workload other than W5. python: the interpreter that has the engine, when it is another one.

    A start is a process each; so are the runs of an engine whose prefix cache cannot keep them apart.
    """
    separate = workload.name == "start" or (workload.name == "W4" and job.engine not in BACKENDS)
    job = dataclasses.replace(job, share_prefixes=workload.name == "W4", concurrency=workload.concurrency)
    result = Result(job.engine, job.model, workload.name)
    for count in [1] * runs if separate else [runs]:
        answer = _worker(job, workload, count, python)
        if "error" in answer:
            result.error = answer["error"]
            return result
        result.runs += answer["runs"]
        result.peak_mb = max(result.peak_mb, answer["peak_mb"])
        result.load_seconds = answer["load_seconds"]
        result.about = answer["about"]
        result.fingerprints = sorted({*result.fingerprints, *answer["fingerprints"]} - {""})
    return result


def _worker(job: EngineJob, workload: Workload, runs: int, python: str) -> dict[str, Any]:
    source = str(Path(__file__).parents[2])  # another interpreter need not have Martlet installed
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, (source, os.environ.get("PYTHONPATH"))))}
    order = {"engine": dataclasses.asdict(job), "workload": workload.name, "runs": runs, "spawned": time.monotonic()}
    done = subprocess.run(
        [python, "-m", "martlet.bench.worker"], input=json.dumps(order), capture_output=True, text=True, env=env
    )
    if done.returncode != 0 or not done.stdout:
        tail = "\n".join(done.stderr.splitlines()[-15:])
        return {"error": f"the process ended with code {done.returncode}:\n{tail}"}
    return json.loads(done.stdout)


def measure_http(job: EngineJob, workload: Workload, runs: int) -> Result:
    """W5 against a server of our own, started for it: `martlet deploy` for a backend, llama-server for llama.cpp."""
    from martlet.bench import http
    from martlet.bench.serving import serving

    result = Result(job.engine, job.model, workload.name)
    llama = ["llama-server", "--model", job.path, "--host", "127.0.0.1", "--port", "{port}"]
    llama += ["--parallel", str(workload.concurrency), "--ctx-size", str(workload.concurrency * job.max_model_len)]
    ours = [sys.executable, "-m", "martlet", "deploy", "--model", job.model, "--infer_backend", job.engine]
    ours += ["--dtype", job.dtype, "--device", job.device, "--max_model_len", str(job.max_model_len)]
    ours += ["--max_num_seqs", str(job.concurrency), "--served_model_name", "bench", "--port", "{port}"]
    ours += ["--quant", job.native_quant] if job.native_quant else []
    try:
        with serving(ours if job.engine in BACKENDS else llama) as server:
            extra: Mapping[str, Any] = {"ignore_eos": True}
            if job.engine not in BACKENDS:
                extra = {**extra, "cache_prompt": False}
            endpoint = http.Endpoint(f"http://127.0.0.1:{server.port}/v1", "bench", extra=extra)
            salted = job.engine in BACKENDS
            http.warm_up(endpoint, workload, "warm-up" if salted else "")
            for number in range(runs):
                timelines = http.measure(endpoint, workload, f"run-{number}" if salted else "")
                result.runs.append(figures(timelines))
                result.note = http.check(timelines, workload)
            result.peak_mb, result.load_seconds = server.peak_mb, server.ready_seconds
    except MartletError as error:
        result.error = str(error)
    return result


def measure_all(
    jobs: Sequence[EngineJob], names: Sequence[str], runs: int, pythons: Mapping[str, str], tell
) -> list[Result]:
    """Every engine on every workload, one after the other. tell(result) is called as soon as there is one."""
    results = []
    for name in names:
        workload = workloads.load(name)
        for job in jobs:
            if name != "W5":
                result = measure(job, workload, runs, pythons.get(job.engine, sys.executable))
            elif job.engine == "openvino":
                continue  # it brings no server
            else:
                result = measure_http(job, workload, runs)
            tell(result)
            results.append(result)
    return results
