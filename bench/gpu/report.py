"""What the sections of the GPU check share: the models, vLLM's figures, lines of results, timing by graph."""
# ruff: noqa: C408  configs read best as keywords

from __future__ import annotations

import gc
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TextIO

import torch

from martlet.hub.card import ModelCard
from martlet.runners.base import LoadOptions
from martlet.runners.cuda_runner import CudaRunner

START = time.perf_counter()
ROOT = Path(__file__).resolve().parents[2]
MODELS = {
    "qwen3-0.6b": dict(
        model_type="qwen3", hidden_size=1024, intermediate_size=3072, num_hidden_layers=28, num_attention_heads=16,
        num_key_value_heads=8, head_dim=128, vocab_size=151936, max_position_embeddings=40960, rms_norm_eps=1e-6,
        rope_theta=1000000, tie_word_embeddings=True, hidden_act="silu", attention_bias=False,
    ),
    "llama3-8b": dict(
        model_type="llama", hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32,
        num_key_value_heads=8, vocab_size=128256, max_position_embeddings=16384, rms_norm_eps=1e-5, rope_theta=500000.0,
        tie_word_embeddings=False, hidden_act="silu", attention_bias=False, mlp_bias=False,
    ),
}  # fmt: skip
VLLM = {  # vLLM 0.24.0 on one H200
    "qwen3-0.6b": {"start_s": 95, "G1": 24441, "G2_ttft_ms": 6.92, "G2_ms": 1.65, "G3": 250401, "G4": 19715},
    "llama3-8b": {"start_s": 62, "G1": 10275, "G2_ttft_ms": 14.67, "G2_ms": 4.878, "G3": 40910, "G4": 10589},
}
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
