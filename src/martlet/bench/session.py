"""One benchmark: every engine on every workload, when the machine is quiet, in an order that is fair."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from martlet.bench import workloads
from martlet.bench.engines import EngineJob
from martlet.bench.footprint import installed_mb
from martlet.bench.noise import Noise
from martlet.bench.offline import Result, measure, measure_together, result_of
from martlet.bench.servers import WITHOUT, measure_http

SLOW_TO_START = ("vllm",)  # all offline workloads in one process


@dataclasses.dataclass(frozen=True, slots=True)
class Plan:
    """names: workloads. runs: of each, less where they would take more than `seconds` (None: never less).

    quiet_seconds: how long to wait, at most, for a quiet machine before each measurement. pythons: the interpreter of
    an engine, where it is another one than ours.
    """

    names: tuple[str, ...]
    runs: int
    seconds: float | None = None
    quiet_seconds: float = 0.0
    pythons: Mapping[str, str] = dataclasses.field(default_factory=dict)


def measure_all(jobs: Sequence[EngineJob], plan: Plan, tell: Callable[[Result], None]) -> list[Result]:
    """Workload by workload, engine by engine, so that what is compared is measured close in time; starts in turns.

    tell(result) is called as soon as there is one.
    """
    noise = Noise()
    sizes = {job.engine: installed_mb(job.engine, plan.pythons.get(job.engine, sys.executable)) for job in jobs}
    results: list[Result] = []

    def keep(job: EngineJob, call: Callable[..., Any], *words: Any) -> list[Result]:
        before = noise.wait(plan.quiet_seconds)
        try:
            found = call(job, *words)
        except Exception as error:  # whatever became of one engine, what was measured of the others stays
            names = words[0] if isinstance(words[0], list) else [words[0].name]
            found = [failed(job, name, error) for name in names]
        found = [found] if isinstance(found, Result) else found
        around = {**before, "after": round(noise.slowdown(), 3)}
        for result in found:
            result.noise, result.installed_mb = around, sizes[job.engine]
        return found

    def publish(found: Iterable[Result]) -> None:
        for result in found:
            if result.error is None and len(result.runs) < plan.runs:
                cut = f"{len(result.runs)} of {plan.runs} runs"
                result.note = f"{result.note}; {cut}" if result.note else cut
            tell(result)
            results.append(result)

    for name in plan.names:
        workload = workloads.load(name)
        those = [job for job in jobs if not job.only or name in job.only]
        offline = [job for job in those if job.engine not in SLOW_TO_START]
        if name == "W5":
            for job in (job for job in those if job.engine not in WITHOUT):
                python = plan.pythons.get(job.engine, sys.executable)
                publish(keep(job, measure_http, workload, plan.runs, plan.seconds, python))
        elif name == "start":
            publish(_starts(offline, plan, keep))
        else:
            for job in offline:
                python = plan.pythons.get(job.engine, sys.executable)
                publish(keep(job, measure, workload, plan.runs, python, plan.seconds))
    for job in (job for job in jobs if job.engine in SLOW_TO_START):
        names = [n for n in plan.names if n != "W5" and (not job.only or n in job.only)]
        names.sort(key=lambda n: n != "start")  # the start is of the process that runs the others
        python = plan.pythons.get(job.engine, sys.executable)
        if names:
            publish(keep(job, measure_together, names, plan.runs, python, plan.seconds))
    return results


def failed(job: EngineJob, workload: str, error: Exception) -> Result:
    result = result_of(job, workload)
    result.error = f"{type(error).__name__}: {error}"
    return result


def _starts(jobs: Sequence[EngineJob], plan: Plan, keep) -> list[Result]:
    """Starts of all engines in turns: each start finds the others' files in the page cache, and the same weather."""
    workload = workloads.load("start")
    merged: dict[str, Result] = {}
    for _ in range(plan.runs):
        for job in jobs:
            python = plan.pythons.get(job.engine, sys.executable)
            (one,) = keep(job, measure, workload, 1, python)
            have = merged.setdefault(job.label, one)
            if have is not one:
                have.runs += one.runs
                have.error = have.error or one.error
                have.peak_mb = max(have.peak_mb, one.peak_mb)
                have.noise = {key: max(value, one.noise[key]) for key, value in have.noise.items()}
    return list(merged.values())
