"""G6: what LoRA costs on the GPU. G4 (64 streams decode) of llama3-8b with 0, 1, 4 and 16 adapters of rank 16 on every
linear, dealt out round-robin. Goal: at most 10 % fewer tokens a second with 16."""

from __future__ import annotations

import random
import time

from report import free, runner_for, say

from martlet.bench.lora import random_adapter
from martlet.engine.engine import Engine, drain
from martlet.engine.options import EngineOptions
from martlet.engine.request import Request
from martlet.sampling_params import SamplingParams

CASES, STREAMS, RANK, GOAL = (0, 1, 4, 16), 64, 16, 0.10


def g6(args) -> None:
    if "llama3-8b" not in args.models:
        say("G6", skipped="it is measured on llama3-8b")
        return
    began = time.perf_counter()
    runner = runner_for("llama3-8b", max_adapters=max(CASES), max_lora_rank=RANK)
    engine = Engine(runner, options=EngineOptions(enable_prefix_caching=False, seed=0))
    one = random_adapter(runner.spec, RANK, 0)  # the same numbers in every slot, read from its own memory
    for number in range(max(CASES)):
        engine.adapters.put(f"a{number}", one)
    say("load", model="llama3-8b", seconds=time.perf_counter() - began)
    numbers = random.Random(0)
    prompts = [[numbers.randint(0, 31999) for _ in range(128)] for _ in range(STREAMS)]

    def run(adapters: int, tokens: int) -> float:
        params = SamplingParams(temperature=0, ignore_eos=True, max_tokens=tokens, detokenize=False)
        requests = [
            Request(str(i), prompt, params, adapter=f"a{i % adapters}" if adapters else None)
            for i, prompt in enumerate(prompts)
        ]
        began = time.perf_counter()
        outputs = drain(engine, requests)
        took = time.perf_counter() - began
        if errors := [output.error for output in outputs if output.error]:
            raise errors[0]
        return took

    base = 0.0
    for adapters in CASES:
        short, long = (min(run(adapters, tokens) for _ in range(3)) for tokens in (1, 257))
        rate = STREAMS * 256 / (long - short)
        base = base or rate
        verdict = {"goal_met": rate >= (1 - GOAL) * base} if adapters == max(CASES) else {}
        say("G6", adapters=adapters, tok_s=rate, ms=(long - short) / 256 * 1e3, to_none=rate / base, **verdict)
    engine.close()
    free()
