"""What a token costs before and behind the model: the engine, its server and streaming clients around a runner that
computes nothing and takes a given time for it, one step under way like a GPU.

    python bench/http_cost.py [--clients 64] [--requests 256] [--prompt 256] [--new 128] [--step_ms 5]

Prints one JSON object: microseconds of processor time a token and a request cost on the thread of the event loop and
on the engine's, tokens a second, and medians of the times to the first and the next token. Steps long enough let every
token be an event of its own, the dearest case; with --step_ms 0 tokens a second are what no model behind this server
can pass.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import random
import sys
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))

import numpy as np

from martlet import hub
from martlet.backends.native import NativeBackend
from martlet.bench.gpu.shapes import SHAPES
from martlet.bench.load import Target, measure
from martlet.bench.made_up import model_folder
from martlet.bench.timeline import Timeline, figures
from martlet.runners.base import Batch, MemoryPlan, Step, StepResult
from martlet.server import create_app, serve
from martlet.server.sockets import bind

VOCABULARY = 4096


class IdleRunner:
    """Every sampled token is a number made of its position. A step begins when the one before has ended."""

    vocab_size = VOCABULARY
    lag = 1
    max_step_tokens = max_prefill_tokens = 8192
    max_drafts = max_adapters = 0

    def __init__(self, rows: int, tokens: int, step_seconds: float):
        self.memory = MemoryPlan(16, rows * (tokens // 16 + 2), rows, tokens, bytes_per_token=1)
        self._step_seconds = step_seconds
        self._ends = 0.0

    def launch(self, batch: Batch) -> Step:
        token = 300 + (batch.start + batch.count) % (VOCABULARY - 300)
        self._ends = max(self._ends, time.monotonic()) + self._step_seconds
        return Sleep(np.where(batch.sample, token, -1).astype(np.int32), self._ends)

    def close(self) -> None: ...


@dataclass(frozen=True, slots=True)
class Sleep:
    """A step that is over at `ends`."""

    tokens: np.ndarray
    ends: float

    def result(self) -> StepResult:
        time.sleep(max(self.ends - time.monotonic(), 0))
        return StepResult(self.tokens)


def thread_seconds() -> dict[str, float]:
    """Processor time of each Python thread so far."""
    return {
        thread.name: time.clock_gettime(time.pthread_getcpuclockid(thread.ident)) for thread in threading.enumerate()
    }


def costs(port: int, args: argparse.Namespace) -> dict[str, float]:
    draw = random.Random(0)
    prompts = [[draw.randrange(300, VOCABULARY) for _ in range(args.prompt)] for _ in range(args.requests)]

    def run(new_tokens: int) -> tuple[float, float, list[Timeline]]:
        """Seconds of the event loop and of the engine, and when tokens came."""
        before = thread_seconds()
        timelines = measure(Target(port, "made-up", new_tokens), prompts, args.clients)
        after = thread_seconds()
        spent = [after[name] - before[name] for name in ("MainThread", "martlet-engine")]
        return *spent, timelines

    run(4)  # everything is imported and has its size
    short, long = run(1), run(args.new)
    steps = args.requests * (args.new - 1)
    names = ("event_loop", "engine")
    told = figures(long[2])
    return {
        **{f"{name}_us_a_request": round(1e6 * short[i] / args.requests, 1) for i, name in enumerate(names)},
        **{f"{name}_us_a_token": round(1e6 * (long[i] - short[i]) / steps, 1) for i, name in enumerate(names)},
        **{name: round(told[name], 1) for name in ("output_tok_s", "ttft_ms", "itl_ms")},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--requests", type=int, default=256)
    parser.add_argument("--prompt", type=int, default=256, help="tokens")
    parser.add_argument("--new", type=int, default=128, help="tokens of an answer")
    parser.add_argument("--step_ms", type=float, default=5.0, help="what the model takes for a step")
    args = parser.parse_args()
    logging.basicConfig(level="WARNING")
    config = SHAPES["qwen3-0.6b"] | {"vocab_size": VOCABULARY}
    with tempfile.TemporaryDirectory() as folder, bind("127.0.0.1", 0) as listener:
        card = hub.resolve(str(model_folder(Path(folder) / "made-up", config)), load_format="dummy")
        runner = IdleRunner(args.clients, args.prompt + args.new + 16, args.step_ms / 1000)
        backend = NativeBackend(card, hub.load_tokenizer(card), runner)

        def client() -> None:
            code = 1
            try:
                print(json.dumps({"clients": args.clients, **costs(listener.getsockname()[1], args)}), flush=True)
                code = 0
            finally:
                os._exit(code)

        threading.Thread(target=client, name="clients", daemon=True).start()
        serve(create_app(backend, None, served_model_names=["made-up"]), listener, drain_seconds=1)


if __name__ == "__main__":
    main()
