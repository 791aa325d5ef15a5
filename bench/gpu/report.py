"""What the sections of the GPU check share: the models, lines of results, timing by graph."""

from __future__ import annotations

import gc
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TextIO

import torch

from martlet.bench.gpu.shapes import SHAPES
from martlet.hub.card import ModelCard
from martlet.runners.base import LoadOptions
from martlet.runners.cuda_runner import CudaRunner

START = time.perf_counter()
ROOT = Path(__file__).resolve().parents[2]
MODELS = SHAPES
log: TextIO | None = None  # set by check.py


def say(section: str, **result) -> None:
    """One line of results: to the log, and shorter to standard output."""
    line = {"section": section, "at": round(time.perf_counter() - START, 1), **result}
    if log is not None:
        log.write(json.dumps(line) + "\n")
        log.flush()
    sys.stdout.write(json.dumps(_short(line), separators=(",", ":")) + "\n")
    sys.stdout.flush()


def _short(value):
    if isinstance(value, float):
        return float(f"{value:.4g}")
    if isinstance(value, dict):
        return {key: _short(entry) for key, entry in value.items()}
    return [_short(entry) for entry in value] if isinstance(value, list | tuple) else value


def card(model: str) -> ModelCard:
    config = MODELS[model]
    return ModelCard(model, Path("-"), "dummy", config["model_type"], config=config)


def runner_for(model: str, **more) -> CudaRunner:
    settings = {"max_model_len": 16384, "max_num_seqs": 256, "memory_utilization": 0.85} | more
    return CudaRunner(card(model), LoadOptions(device="cuda", dtype="bfloat16", **settings))


def free() -> None:
    gc.collect()
    torch.cuda.empty_cache()


def median_us(replay: Callable[[], None], times: int = 20) -> float:
    found = []
    for _ in range(times):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        replay()
        end.record()
        end.synchronize()
        found.append(begin.elapsed_time(end) * 1e3)
    return sorted(found)[times // 2]


def graph_us(launches: list[Callable], replays: int = 20) -> float:
    """Microseconds a launch: `launches` are captured as one graph, which is replayed."""
    for call in launches[:3]:
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in launches:
            call()
    graph.replay()
    return median_us(graph.replay, replays) / len(launches)
