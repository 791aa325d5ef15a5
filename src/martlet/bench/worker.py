"""One engine, one workload, one process: so that peak memory and start time are the engine's own.

Reads a job as JSON from the standard input and writes the result as JSON to the standard output; whatever libraries
print goes to stderr. Started by martlet.bench.offline.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

from martlet.bench import engines, workloads
from martlet.bench.timeline import Timeline, figures, fingerprint
from martlet.errors import MartletError


def work(job: dict[str, Any]) -> dict[str, Any]:
    """job: engine (fields of EngineJob), workload, runs, spawned (the parent's monotonic clock when it started us)."""
    workload = workloads.load(job["workload"])
    engine = engines.load(engines.EngineJob(**job["engine"]))
    loaded = time.monotonic() - job["spawned"]
    try:
        if workload.name != "start":
            engine.run([workload.prompts[0][:32]], 4, "warm-up")
        runs: list[dict[str, float]] = []
        prints = set()
        for number in range(job["runs"]):
            timelines = engine.run(workload.prompts, workload.new_tokens, f"run-{number}")
            check(timelines, workload)
            runs.append(figures(timelines))
            prints.add(fingerprint(timelines))
        if workload.name == "start":
            runs[0]["start_s"] = timelines[0].times[0] - job["spawned"]
        return {
            "about": engine.about,
            "load_seconds": loaded,
            "runs": runs,
            "fingerprints": sorted(prints),
            "peak_mb": peak_mb(),
        }
    finally:
        engine.close()


def check(timelines: list[Timeline], workload: workloads.Workload) -> None:
    for number, timeline in enumerate(timelines):
        if timeline.new_tokens != workload.new_tokens:
            raise MartletError(
                f"{workload.name}: request {number} got {timeline.new_tokens} tokens, not {workload.new_tokens}"
            )


def peak_mb() -> float:
    """Largest resident memory of this process so far; of one that has children, the largest child's is added."""
    import resource

    own = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    status = Path("/proc/self/status")
    if status.exists():  # ru_maxrss also remembers the process that started us
        own = next(int(li.split()[1]) for li in status.read_text().splitlines() if li.startswith("VmHWM:")) / 1024
    return own + resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024


def main() -> int:
    with os.fdopen(os.dup(1), "w") as out:
        os.dup2(2, 1)
        try:
            result = work(json.load(sys.stdin))
        except MartletError as error:
            result = {"error": str(error)}
        out.write(json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
