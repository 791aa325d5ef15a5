"""One engine, one process, most often one workload: so that peak memory and start time are the engine's own.

Reads an order as JSON from the standard input and writes the result as JSON to the standard output; whatever libraries
print goes to stderr. Started by martlet.bench.offline. What is imported here is time of the start that is measured.
"""

from __future__ import annotations

import json
import os
import sys
import time
from typing import Any

from martlet.bench import engines, workloads
from martlet.bench.timeline import Timeline, enough, figures, fingerprint
from martlet.collection import uncollected
from martlet.errors import MartletError


def work(order: dict[str, Any]) -> list[dict[str, Any]]:
    """order: engine (fields of EngineJob), workloads (names and how often), seconds (enough for one workload, or None),
    spawned (the parent's monotonic clock when it started us). Gives an answer for each workload."""
    with uncollected(freeze=True):
        engine = engines.load(engines.EngineJob(**order["engine"]))
    loaded = time.monotonic() - order["spawned"]
    try:
        return [
            {"about": engine.about, "load_seconds": loaded, **answer(engine, workloads.load(name), runs, order)}
            for name, runs in order["workloads"]
        ]
    finally:
        engine.close()


def answer(engine: engines.OfflineEngine, workload: workloads.Workload, runs: int, order: dict[str, Any]) -> dict:
    if workload.name != "start":
        engine.run([workload.prompts[0][:32]], 4, f"{workload.name}-warm-up")
    done: list[dict[str, float]] = []
    prints = set()
    while len(done) < runs and not enough(done, order["seconds"]):
        timelines = engine.run(workload.prompts, workload.new_tokens, f"{workload.name}-{len(done)}")
        check(timelines, workload)
        done.append(figures(timelines))
        prints.add(fingerprint(timelines))
        if workload.name == "start":
            done[0]["start_s"] = timelines[0].times[0] - (engine.spawned or order["spawned"])
    return {"runs": done, "fingerprints": sorted(prints), "peak_mb": engine.peak_mb()}


def check(timelines: list[Timeline], workload: workloads.Workload) -> None:
    for number, timeline in enumerate(timelines):
        if timeline.new_tokens != workload.new_tokens:
            raise MartletError(
                f"{workload.name}: request {number} got {timeline.new_tokens} tokens, not {workload.new_tokens}"
            )


def main() -> int:
    with os.fdopen(os.dup(1), "w") as out:
        os.dup2(2, 1)
        order = json.load(sys.stdin)
        try:
            result = work(order)
        except (MartletError, ImportError) as error:
            what = str(error) if isinstance(error, MartletError) else f"this Python lacks something: {error}"
            result = [{"error": what}] * len(order["workloads"])
        out.write(json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
