"""The real SmolLM2 on the GPU: the tokens and log-probabilities of the float32 reference on a CPU.

    python bench/gpu/smollm2.py --write bench/gpu/smollm2.json      # on any machine: what the reference gives
    python bench/gpu/smollm2.py [--gguf FILE] [--expected FILE]     # on a GPU

In float32, greedy tokens must be the same: with graphs and without, in chunks, found in the prefix cache, preempted,
alone, and in the other order. In bfloat16, log-probabilities of that text are compared, in the same ways.
The file comes to a machine that cannot download in two parts (`split -b 50M`), put together with `cat`.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "src"))

import numpy as np

from martlet import hub
from martlet.bench import workloads
from martlet.engine.engine import Engine, drain
from martlet.engine.options import EngineOptions
from martlet.engine.request import Request
from martlet.runners.base import LoadOptions
from martlet.sampling_params import SamplingParams

NEW = 32
SIZES = {"max_num_seqs": 16, "max_model_len": 1152, "kv_cache_tokens": 8192}
TIGHT = {"kv_cache_tokens": 1392}  # less than all of them need together, more than the longest
BOUND = 2e-2  # mean difference of log-probabilities in bfloat16


def prompts() -> list[list[int]]:
    """Real text: eight of W3's prompts, 64 to 256 tokens, and the first 700 tokens of W2's."""
    return [list(p) for p in workloads.load("W3").prompts[:8]] + [list(workloads.load("W2").prompts[0][:700])]


def answers(runner, *, order=None, alone: bool = False, **settings) -> tuple[list[list[int]], int]:
    """(greedy tokens of each prompt, preemptions)."""
    engine = Engine(runner, options=EngineOptions(seed=0, **settings))
    params = SamplingParams(temperature=0, max_tokens=NEW, ignore_eos=True, detokenize=False)
    requests = [Request(str(i), prompt, params) for i, prompt in enumerate(prompts())]
    requests = requests if order is None else [requests[i] for i in order]
    found: dict[str, list[int]] = {}
    for group in [[r] for r in requests] if alone else [requests]:
        for output in drain(engine, group):
            if output.error is not None:
                raise output.error
            found.setdefault(output.request_id, []).extend(output.token_ids)
    return [found[str(i)] for i in range(len(found))], engine.stats().preemptions


def scores(runner, texts: list[list[int]], **settings) -> np.ndarray:
    """Log-probabilities of all tokens of `texts` but their first ones."""
    engine = Engine(runner, options=EngineOptions(seed=0, **settings))
    params = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0, ignore_eos=True, detokenize=False)
    outputs = drain(engine, [Request(str(i), text, params) for i, text in enumerate(texts)])
    entries = {o.request_id: o.prompt_logprobs for o in outputs if o.prompt_logprobs}
    return np.array([e.logprob for i in range(len(texts)) for e in entries[str(i)][1:]])


def write(path: Path, card) -> None:
    from martlet.runners.torch_runner import TorchRunner

    runner = TorchRunner(card, LoadOptions(device="cpu", dtype="float32", **SIZES))
    tokens, _ = answers(runner)
    texts = [prompt + answer for prompt, answer in zip(prompts(), tokens, strict=True)]
    told = {"model": card.name, "tokens": tokens, "logprobs": [round(float(x), 6) for x in scores(runner, texts)]}
    path.write_text(json.dumps(told) + "\n", encoding="utf-8")


def compare(card, want: dict, say) -> bool:
    """One line of results a way of running it; whether all were right."""
    from martlet.runners.cuda_runner import CudaRunner

    count = len(want["tokens"])
    ways = {
        "whole": {},
        "prefix hit": {},
        "chunks of 37": {"max_num_batched_tokens": 37, "enable_prefix_caching": False},
        "other order": {"order": range(count)[::-1], "enable_prefix_caching": False},
        "alone": {"alone": True, "enable_prefix_caching": False},
    }
    fine = True
    for graphs in (True, False):
        runner = CudaRunner(card, LoadOptions(device="cuda", dtype="float32", **SIZES), graphs=graphs)
        for name, settings in ways.items():
            got, _ = answers(runner, **settings)
            same = sum(a == b for a, b in zip(got, want["tokens"], strict=True))
            fine &= same == count
            say(dtype="float32", graphs=graphs, way=name, same=same, of=count)
        runner.close()
    tight = CudaRunner(card, LoadOptions(device="cuda", dtype="float32", **(SIZES | TIGHT)))
    got, preemptions = answers(tight, enable_prefix_caching=False)
    same = sum(a == b for a, b in zip(got, want["tokens"], strict=True))
    fine &= same == count and preemptions > 0
    say(dtype="float32", way="preempted", preemptions=preemptions, same=same, of=count)
    tight.close()

    texts = [prompt + answer for prompt, answer in zip(prompts(), want["tokens"], strict=True)]
    expected = np.array(want["logprobs"])
    for graphs in (True, False):
        runner = CudaRunner(card, LoadOptions(device="cuda", dtype="bfloat16", **SIZES), graphs=graphs)
        for name, settings in {"whole": {}, "chunks of 37": {"max_num_batched_tokens": 37}}.items():
            apart = np.abs(scores(runner, texts, enable_prefix_caching=False, **settings) - expected)
            fine &= bool(apart.mean() < BOUND)
            say(dtype="bfloat16", graphs=graphs, way=name, tokens=len(apart), mean=round(float(apart.mean()), 5),
                p99=round(float(np.quantile(apart, 0.99)), 4), worst=round(float(apart.max()), 4))  # fmt: skip
        got, _ = answers(runner)
        same = sum(a == b for a, b in zip(got, want["tokens"], strict=True))
        say(dtype="bfloat16", graphs=graphs, way="greedy tokens", same=same, of=count)
        runner.close()
    return fine


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gguf", default=hub.DEFAULT_MODEL, help="the file, or a name of the registry")
    parser.add_argument("--expected", default=str(Path(__file__).with_name("smollm2.json")))
    parser.add_argument("--write", metavar="FILE", help="compute what is expected, on the CPU")
    args = parser.parse_args()
    card = hub.resolve(args.gguf)
    if args.write:
        write(Path(args.write), card)
        return 0
    want = json.loads(Path(args.expected).read_text(encoding="utf-8"))
    fine = compare(card, want, lambda **result: print(json.dumps({"section": "smollm2", **result}), flush=True))
    print(json.dumps({"section": "smollm2", "ok": fine}))
    return int(not fine)


if __name__ == "__main__":
    sys.exit(main())
