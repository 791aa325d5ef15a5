"""What a token costs before and behind the model: the engine, its server and streaming clients around a runner that
answers at once.

    python bench/http_cost.py [--clients 64] [--requests 256] [--prompt 256] [--new 128]

Prints one JSON object: microseconds of processor time a token and a request cost on the thread of the event loop and
on the engine's, and tokens a second with nothing to wait for, which no model behind this server can pass.
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
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))

import numpy as np

from martlet import hub
from martlet.backends.native import NativeBackend
from martlet.bench.gpu.shapes import SHAPES
from martlet.bench.load import Target, measure
from martlet.bench.made_up import model_folder
from martlet.runners.base import Batch, Done, MemoryPlan, StepResult
from martlet.server import create_app, serve
from martlet.server.sockets import bind

VOCABULARY = 4096


class InstantRunner:
    """Every sampled token is a number made of its position."""

    vocab_size = VOCABULARY
    lag = 0
    max_step_tokens = max_prefill_tokens = 8192
    max_drafts = max_adapters = 0

    def __init__(self, rows: int, tokens: int):
        self.memory = MemoryPlan(16, rows * (tokens // 16 + 2), rows, tokens, bytes_per_token=1)

    def launch(self, batch: Batch) -> Done:
        token = 300 + (batch.start + batch.count) % (VOCABULARY - 300)
        return Done(StepResult(np.where(batch.sample, token, -1).astype(np.int32), {}, {}))

    def close(self) -> None: ...


def thread_seconds() -> dict[str, float]:
    """Processor time of each Python thread so far."""
    tick = os.sysconf("SC_CLK_TCK")
    found = {}
    for thread in threading.enumerate():
        words = Path(f"/proc/self/task/{thread.native_id}/stat").read_text().rpartition(")")[2].split()
        found[thread.name] = (int(words[11]) + int(words[12])) / tick
    return found


def costs(port: int, args: argparse.Namespace) -> dict[str, float]:
    draw = random.Random(0)
    prompts = [[draw.randrange(300, VOCABULARY) for _ in range(args.prompt)] for _ in range(args.requests)]

    def run(new_tokens: int) -> tuple[float, float, float]:
        """Seconds: of the event loop, of the engine, and by the clock while answers were under way."""
        before = thread_seconds()
        timelines = measure(Target(port, "made-up", new_tokens), prompts, args.clients)
        after = thread_seconds()
        spent = [after[name] - before[name] for name in ("MainThread", "martlet-engine")]
        return *spent, max(t.times[-1] for t in timelines) - min(t.submitted for t in timelines)

    run(4)  # everything is imported and has its size
    short, long = run(1), run(args.new)
    steps = args.requests * (args.new - 1)
    names = ("event_loop", "engine")
    return {
        **{f"{name}_us_a_request": round(1e6 * short[i] / args.requests, 1) for i, name in enumerate(names)},
        **{f"{name}_us_a_token": round(1e6 * (long[i] - short[i]) / steps, 1) for i, name in enumerate(names)},
        "tok_s": round(args.requests * args.new / long[2]),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--requests", type=int, default=256)
    parser.add_argument("--prompt", type=int, default=256, help="tokens")
    parser.add_argument("--new", type=int, default=128, help="tokens of an answer")
    args = parser.parse_args()
    logging.basicConfig(level="WARNING")
    config = SHAPES["qwen3-0.6b"] | {"vocab_size": VOCABULARY}
    with tempfile.TemporaryDirectory() as folder, bind("127.0.0.1", 0) as listener:
        card = hub.resolve(str(model_folder(Path(folder) / "made-up", config)), load_format="dummy")
        runner = InstantRunner(args.clients, args.prompt + args.new + 16)
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
