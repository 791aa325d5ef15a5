"""What LoRA costs on a CPU: 16 sequences decode together, with 0, 1, 4 and 16 distinct adapters dealt out among them.

    python bench/lora.py                      # the default model, adapters of rank 16 on every linear
    taskset -c 0 python bench/lora.py         # on one core, where processor time is the kernels' alone

Rounds of all four take turns, so that a machine that slows down slows all of them. Per case the least of the rounds:
processor seconds a token in user mode, and wall-clock tokens a second. Goal: at most 15 % fewer tokens with 4 adapters.
Adapters are random; how long a step takes does not depend on what they hold.
"""

from __future__ import annotations

import argparse
import json
import resource
import time

from martlet import hub
from martlet.bench.lora import random_adapter
from martlet.engine.engine import Engine, drain
from martlet.engine.options import EngineOptions
from martlet.engine.request import Request
from martlet.model.weights import read_spec
from martlet.runners import LoadOptions, load
from martlet.sampling_params import SamplingParams

SEQUENCES, CASES, GOAL = 16, (0, 1, 4, 16), 0.15


def run(engine: Engine, adapters: int, prompt: int, tokens: int) -> tuple[float, float]:
    """(user seconds, wall seconds) of SEQUENCES answers, their prompts computed before the clock starts."""
    params = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, detokenize=False)
    for i in range(SEQUENCES):
        name = f"a{i % adapters}" if adapters else None
        engine.add(Request(str(i), [1 + (7 * i + j) % 999 for j in range(prompt)], params, adapter=name))
    while engine.scheduler.waiting or any(
        engine.scheduler.table.arrived[s.row] <= prompt for s in engine.scheduler.running
    ):
        engine.step()
    before, began = resource.getrusage(resource.RUSAGE_SELF).ru_utime, time.perf_counter()
    drain(engine, [])
    return resource.getrusage(resource.RUSAGE_SELF).ru_utime - before, time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--quant", default=None)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--prompt", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    card = hub.resolve(args.model)
    options = LoadOptions(
        device="cpu", quant=args.quant, max_num_seqs=SEQUENCES, max_model_len=512, max_adapters=max(CASES),
        max_lora_rank=args.rank,
    )  # fmt: skip
    engine = Engine(load(card, options), options=EngineOptions(enable_prefix_caching=False))
    for number in range(max(CASES)):
        engine.adapters.put(f"a{number}", random_adapter(read_spec(card), args.rank, number))
    found: dict[int, list[tuple[float, float]]] = {case: [] for case in CASES}
    for case in CASES:
        run(engine, case, args.prompt, 4)
    for _ in range(args.rounds):
        for case in CASES:
            found[case].append(run(engine, case, args.prompt, args.tokens))
    count = SEQUENCES * (args.tokens - 1)
    base = [min(column) for column in zip(*found[0], strict=True)]
    for case in CASES:
        user, wall = (min(column) for column in zip(*found[case], strict=True))
        line = {"adapters": case, "user_ms_per_token": round(1e3 * user / count, 4), "tok_s": round(count / wall, 1)}
        line |= {"user_to_none": round(user / base[0], 3), "tok_s_to_none": round(base[1] / wall, 3)}
        if case == 4:
            line["goal_met"] = base[1] / wall >= 1 - GOAL
        print(json.dumps(line))
    engine.close()


if __name__ == "__main__":
    main()
