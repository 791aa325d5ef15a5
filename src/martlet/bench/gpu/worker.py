"""One engine with one model, in a process of its own: G1-G4 and start, or G6, a JSON line on standard output for each.

Reads an order as JSON from the standard input: device, backend, options (fields of LoadOptions), folder (the model),
scratch (a folder for what is made), workloads, spawned (the parent's monotonic clock when it started us). What
libraries print goes to stderr.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from martlet import backends, hub
from martlet.bench.gpu.shapes import ADAPTERS, MAX_MODEL_LEN, MAX_SEQUENCES, RANK, SETTLES, Prompts
from martlet.engine.options import EngineOptions
from martlet.engine.request import Request
from martlet.errors import MartletError
from martlet.runners.base import LoadOptions
from martlet.sampling_params import SamplingParams

Run = Callable[..., float]


def opened(order: dict[str, Any]) -> backends.Backend:
    load = LoadOptions(
        device=order["device"],
        dtype="bfloat16",
        max_model_len=MAX_MODEL_LEN,
        max_num_seqs=MAX_SEQUENCES,
        memory_utilization=0.85,
        max_adapters=max(ADAPTERS) if "G6" in order["workloads"] else 0,
        max_lora_rank=RANK,
        **order["options"],
    )
    card = hub.resolve(order["folder"], load_format="dummy")
    engine = EngineOptions(enable_prefix_caching=False, seed=0)
    return backends.load(card, backend=order["backend"], load=load, engine=engine)


class Timed:
    """Runs prompts to their end, greedily and without regard to end tokens, and says how many seconds they took."""

    def __init__(self, backend: backends.Backend):
        self.backend = backend
        self._number = 0

    def __call__(self, prompts: Sequence[Sequence[int]], lengths: Sequence[int], adapters: int = 0) -> float:
        requests = []
        for at, (prompt, length) in enumerate(zip(prompts, lengths, strict=True)):
            params = SamplingParams(temperature=0, ignore_eos=True, max_tokens=length, detokenize=False)
            self._number += 1
            name = f"a{at % adapters}" if adapters else None
            requests.append(Request(f"{self._number}", prompt, params, adapter=name))
        began = time.perf_counter()
        found = dict.fromkeys((request.id for request in requests), 0)
        for output in self.backend.generate(requests):
            if output.error is not None:
                raise output.error
            found[output.request_id] += len(output.token_ids)
        took = time.perf_counter() - began
        if list(found.values()) != list(lengths):
            raise MartletError("answers are not as long as was asked")
        return took


def measured(run: Run, names: Sequence[str]) -> Iterator[tuple[str, Callable[[], dict[str, float]]]]:
    """(workload, what measures it). The best of a few runs, since a GPU is alone and the rest is noise."""
    prompts = Prompts()
    warm = [prompts.ids(64) for _ in range(8)]
    many_prompts, many_lengths = [], []
    for _ in range(256):
        many_prompts.append(prompts.ids(prompts.length()))
    for _ in range(256):
        many_lengths.append(prompts.length())
    one, long, streams = [prompts.ids(512)], [prompts.ids(8192)], [prompts.ids(128) for _ in range(64)]

    def best(texts, length: int, times: int, adapters: int = 0) -> float:
        return min(run(texts, [length] * len(texts), adapters) for _ in range(times))

    def g1() -> dict[str, float]:
        seconds = min(run(many_prompts, many_lengths) for _ in range(2))
        return {"output_tok_s": sum(many_lengths) / seconds, "seconds": seconds}

    def g2() -> dict[str, float]:
        first, whole = best(one, 1, 4), best(one, 257, 3)
        return {"ttft_ms": 1e3 * first, "token_ms": 1e3 * (whole - first) / 256}

    def g3() -> dict[str, float]:
        return {"prefill_tok_s": 8192 / best(long, 1, 4)}

    def g4(adapters: int = 0) -> dict[str, float]:
        step = (best(streams, 257, 3, adapters) - best(streams, 1, 3, adapters)) / 256
        return {"decode_tok_s": 64 / step, "step_ms": 1e3 * step}

    def g6() -> dict[str, float]:
        rates = {count: g4(count)["decode_tok_s"] for count in ADAPTERS}
        return {f"x{count}": rate for count, rate in rates.items()} | {"kept": rates[max(ADAPTERS)] / rates[0]}

    if "start" not in names:
        run(warm, [8] * len(warm))
    time.sleep(SETTLES)
    for name, function in {"G2": g2, "G3": g3, "G4": g4, "G1": g1, "G6": g6}.items():
        if name in names:
            yield name, function


def with_adapters(backend: backends.Backend, config: dict[str, Any], folder: Path) -> None:
    """The same random numbers under all names: each slot is read from its own memory. They are written to `folder`,
    which must stay, since vLLM reads an adapter when a request first names it."""
    from martlet.bench.lora import peft_folder

    path = peft_folder(folder, config, RANK)
    for number in range(max(ADAPTERS)):
        backend.load_adapter(f"a{number}", path)


def work(order: dict[str, Any], tell: Callable[[dict[str, Any]], None]) -> None:
    backend = opened(order)
    run, spawned = Timed(backend), order["spawned"]
    loaded = time.monotonic() - spawned
    if "start" in order["workloads"]:
        run([list(range(100, 612))], [1])
        tell({"workload": "start", "figures": {"start_s": time.monotonic() - spawned, "load_s": loaded}})
    if "G6" in order["workloads"]:
        config = json.loads((Path(order["folder"]) / "config.json").read_text(encoding="utf-8"))
        with_adapters(backend, config, Path(order["scratch"]))
    for name, measure in measured(run, order["workloads"]):
        try:
            tell({"workload": name, "figures": measure()})
        except Exception as error:  # the next one may still be measured
            tell({"workload": name, "error": f"{type(error).__name__}: {error}"})
    backend.close()


def main() -> int:
    with os.fdopen(os.dup(1), "w") as out:
        os.dup2(2, 1)

        def tell(answer: dict[str, Any]) -> None:
            out.write(json.dumps(answer) + "\n")
            out.flush()

        work(json.load(sys.stdin), tell)
    return 0


if __name__ == "__main__":
    code = main()
    sys.stderr.flush()
    os._exit(code)  # nothing is kept, and taking an engine down takes seconds
