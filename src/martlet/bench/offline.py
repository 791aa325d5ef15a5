"""Run workloads on engines, each in a process of its own, and collect the results."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from martlet.bench.engines import BACKENDS, EngineJob
from martlet.bench.timeline import enough, medians
from martlet.bench.workloads import Workload


@dataclass(slots=True)
class Result:
    """One engine on one workload. figures: medians of `runs`. error: why there are none. note: a caveat to print.

    engine: its label; kind: which of engines.NAMES it is. weights: number type they run in. noise: slowdown of a fixed
    piece of work before and after, and seconds waited for a quiet machine. installed_mb: the engine on disk.
    """

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
    kind: str = ""
    weights: str = ""
    installed_mb: float = 0.0
    noise: dict[str, float] = field(default_factory=dict)

    @property
    def figures(self) -> dict[str, float]:
        return medians(self.runs) if self.runs else {}


def result_of(job: EngineJob, workload: str) -> Result:
    return Result(
        job.label or job.engine,
        Path(job.model).name,
        workload,
        kind=job.engine,
        weights=job.weights,
    )


def first_line(error: object) -> str:
    """The beginning of an error, for one cell of a table."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0][:160].replace("|", "/")


def measure(
    job: EngineJob, workload: Workload, runs: int, python: str = sys.executable, seconds: float | None = None
) -> Result:
    """Measure a workload other than W5. python: the interpreter that has the engine, when it is another one.

    A start is a process each; so are the runs of an engine whose prefix cache cannot keep them apart.
    """
    separate = workload.name == "start" or (workload.name == "W4" and job.engine not in (*BACKENDS, "vllm"))
    job = job._replace(share_prefixes=workload.name == "W4", concurrency=workload.concurrency)
    result = result_of(job, workload.name)
    while len(result.runs) < runs and not enough(result.runs, seconds):
        answer = worker(job, [(workload.name, 1 if separate else runs)], python, seconds)[0]
        take(result, answer)
        if result.error is not None or not separate:
            break
    return result


def measure_together(
    job: EngineJob, names: Sequence[str], runs: int, python: str, seconds: float | None
) -> list[Result]:
    """Several workloads in one process, for an engine that takes minutes to start: one start, and peaks that include
    the workloads before."""
    counts = [(name, 1 if name == "start" else runs) for name in names]
    answers = worker(job, counts, python, seconds)
    results = [result_of(job, name) for name in names]
    for result, answer in zip(results, answers, strict=True):
        take(result, answer)
    return results


def take(result: Result, answer: dict[str, Any]) -> None:
    """Add what a worker said of one workload."""
    if "error" in answer:
        result.error = answer["error"]
        return
    result.runs += answer["runs"]
    result.peak_mb = max(result.peak_mb, answer["peak_mb"])
    result.load_seconds = answer["load_seconds"]
    result.about = answer["about"]
    result.fingerprints = sorted({*result.fingerprints, *answer["fingerprints"]} - {""})


def worker(
    job: EngineJob, counts: Sequence[tuple[str, int]], python: str, seconds: float | None
) -> list[dict[str, Any]]:
    """Run martlet.bench.worker with `python`; its answer for each workload, an error where it gave none."""
    order = {"engine": job._asdict(), "workloads": counts, "seconds": seconds}
    with source_path(python) as path:
        env = {**os.environ, **path}
        env.pop("PYTHONDONTWRITEBYTECODE", None)  # what is installed is compiled, and so is what starts are measured of
        if job.engine == "vllm":
            from martlet.bench.vllm_engine import environment

            env |= environment(python)
        order["spawned"] = time.monotonic()
        done = subprocess.run(
            [python, "-m", "martlet.bench.worker"], input=json.dumps(order), capture_output=True, text=True, env=env
        )
    if done.returncode != 0 or not done.stdout:
        tail = "\n".join(done.stderr.splitlines()[-15:])
        return [{"error": f"the process ended with code {done.returncode}:\n{tail}"}] * len(counts)
    return json.loads(done.stdout)


@contextlib.contextmanager
def source_path(python: str) -> Iterator[dict[str, str]]:
    """What lets another Python import this package without installing it: a folder that holds this package and nothing
    else, so that none of our dependencies hides one of its own."""
    if python == sys.executable:
        yield {}
        return
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "martlet").symlink_to(Path(__file__).parents[1], target_is_directory=True)
        yield {"PYTHONPATH": os.pathsep.join(filter(None, (folder, os.environ.get("PYTHONPATH"))))}
