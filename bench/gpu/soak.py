"""Many requests at once, some of which leave: no wrong token, nothing left behind.

    python bench/gpu/soak.py --minutes 5 [--model qwen3-0.6b] [--concurrency 512]

Random prompts, half of them with shared beginnings, greedy or with seeds, streamed or not, in KV memory for about half
of them, so that sequences are preempted and prefixes found. One of eight is aborted at a random moment. Of those that
finish, a sample is checked: prompt and answer are computed again, alone, as one prompt, and each token of the answer
must be what the sampler's rule gives under those log-probabilities, each of which may be off by half of --tolerance.
Memory is compared before and after. Prints one JSON object; exit code 1 when anything is wrong.
"""

from __future__ import annotations

import argparse
import json
import resource
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "src"))

import numpy as np

from martlet.engine.engine import Engine, drain
from martlet.engine.options import EngineOptions
from martlet.engine.request import Request
from martlet.kernels.philox import gumbel
from martlet.runners.base import TokenLogprobs
from martlet.sampling_params import SamplingParams

TOP_K, TEMPERATURE, VOCABULARY = 8, 0.8, 32000
KEPT = 256  # finished requests that are computed again
GRAPHS = 64 << 20  # bytes that graphs which were captured after the first measurement may keep


@dataclass
class Tally:
    finished: int = 0
    aborted: int = 0
    tokens: int = 0
    checked: int = 0
    checked_tokens: int = 0
    worst_tie: float = 0.0  # by how much a token was short of the best, in log-probability
    ties: dict[float, int] = field(
        default_factory=lambda: {0.02: 0, 0.05: 0, 0.15: 0}
    )  # tokens that were more than so short
    wrong: list[str] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)


@dataclass
class Load:
    """Requests as they are asked for, and what came of those that run. kept: finished ones to be checked."""

    engine: Engine
    random: np.random.Generator
    longest: int
    tally: Tally = field(default_factory=Tally)
    running: dict[str, tuple[Request, list[int]]] = field(default_factory=dict)
    kept: list[tuple[Request, list[int]]] = field(default_factory=list)
    asked: int = 0

    def ask(self) -> None:
        draw = self.random
        prompt = draw.integers(0, VOCABULARY, int(draw.integers(1, self.longest // 2))).tolist()
        if draw.random() < 0.5:  # one of a few beginnings
            first = np.random.default_rng(int(draw.integers(0, 6)))
            prompt = first.integers(0, VOCABULARY, self.longest // 4).tolist() + prompt[: self.longest // 4]
        settings = {"temperature": 0.0}
        if draw.random() < 0.5:
            settings = {"temperature": TEMPERATURE, "top_k": TOP_K, "seed": int(draw.integers(0, 2**62))}
        length = int(draw.integers(1, self.longest // 2))
        params = SamplingParams(max_tokens=length, ignore_eos=True, detokenize=False, **settings)
        request = Request(f"r{self.asked}", prompt, params, stream=bool(draw.random() < 0.5))
        self.asked += 1
        self.running[request.id] = request, []
        self.engine.add(request)

    def step(self, abort: float) -> None:
        """One step of the engine; each step aborts a request with probability `abort`."""
        if self.running and self.random.random() < abort:
            self.engine.abort(str(self.random.choice(list(self.running))))
        for output in self.engine.step():
            request, tokens = self.running[output.request_id]
            tokens += output.token_ids
            if output.last:
                del self.running[output.request_id]
                self._ended(request, tokens, output)

    def _ended(self, request: Request, tokens: list[int], output) -> None:
        tally = self.tally
        tally.tokens += len(tokens)
        if output.error is not None:
            tally.errors.append(repr(output.error)[:200])
        elif output.finish_reason == "abort":
            tally.aborted += 1
        else:
            tally.finished += 1
            if len(tokens) != request.params.max_tokens:
                tally.wrong.append(f"{request.id} has {len(tokens)} tokens, not {request.params.max_tokens}")
            place = int(self.random.integers(0, tally.finished))  # a sample of all that finish, of even chance
            if len(self.kept) < KEPT:
                self.kept.append((request, tokens))
            elif place < KEPT:
                self.kept[place] = request, tokens


def shortfall(entry: TokenLogprobs, seed: int | None, position: int, noise: float) -> float:
    """By how much a token's log-probability is short of what the sampler's rule asks; more than `noise` is wrong.

    entry: the token and the first TOP_K + 1. With seed None the rule is the largest. With a seed it is the largest of
    log-probability / TEMPERATURE + Gumbel noise among the first TOP_K. Which tokens those are is itself known only
    within the noise: one that is hardly better than the next may have been cut off where the token was drawn, and then
    its Gumbel noise, however large, counted for nothing. So a token is held against those alone that are surely in.
    """
    if seed is None:
        return float(entry.top_logprobs[0]) - entry.logprob
    likely = np.asarray(entry.top_logprobs, np.float64)
    surely = likely[:TOP_K] > likely[TOP_K] + noise
    ids, logprobs = np.asarray(entry.top_ids)[:TOP_K][surely], likely[:TOP_K][surely]
    own = entry.logprob + TEMPERATURE * float(gumbel(seed, position, np.array(entry.token)))
    others = logprobs + TEMPERATURE * gumbel(seed, position, ids)
    cut = float(likely[TOP_K - 1]) - entry.logprob  # above 0 for a token outside of the first k
    return max(float(others.max(initial=own)) - own, cut)


def check(alone: Engine, request: Request, tokens: list[int], tally: Tally, tolerance: float) -> None:
    """Each token of an answer is the one that the rule of the sampler gives, or as good as it."""
    prompt = [*request.prompt_token_ids, *tokens]
    params = SamplingParams(temperature=0, max_tokens=1, ignore_eos=True, prompt_logprobs=TOP_K + 1, detokenize=False)
    outputs = drain(alone, [Request("check", prompt, params)])
    entries = next(output.prompt_logprobs for output in outputs if output.prompt_logprobs)
    first = len(request.prompt_token_ids)
    tally.checked += 1
    for position in range(first, len(prompt)):
        seed = request.params.seed
        short = shortfall(entries[position], seed, position, tolerance)
        tally.checked_tokens += 1
        tally.worst_tie = max(tally.worst_tie, short)
        for bound in tally.ties:
            tally.ties[bound] += short > bound
        if short > tolerance:
            kind = "greedy" if seed is None else "seeded"
            tally.wrong.append(f"{request.id}, {kind}: token {position - first} of {len(tokens)} is {short:.3f} short")
            return


def soak(runner, minutes: float, concurrency: int, longest: int, tolerance: float, used) -> dict:
    """used: gives bytes of device memory that are allocated."""
    engine = Engine(runner, options=EngineOptions(seed=0))
    load = Load(engine, np.random.default_rng(0), longest)

    def run(seconds: float) -> None:
        ends = time.monotonic() + seconds
        while time.monotonic() < ends:
            while len(load.running) < concurrency:
                load.ask()
            load.step(0.5)
        while engine.has_work:
            load.step(0.0)

    run(min(15.0, 20 * minutes))  # graphs of all sizes are captured, and buffers have their size
    before = used(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    began = time.monotonic()
    run(60 * minutes)
    took = time.monotonic() - began
    after = used(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    stats = engine.stats()
    alone = Engine(runner, options=EngineOptions(enable_prefix_caching=False))
    for request, tokens in load.kept:
        check(alone, request, tokens, load.tally, tolerance)
    tally = load.tally
    left = stats.running + stats.waiting + stats.kv_blocks_used
    fine = not tally.wrong and not tally.errors and not left and after[0] - before[0] <= GRAPHS and tally.checked > 0
    return {
        "ok": fine, "seconds": round(took, 1), "concurrency": concurrency, "asked": load.asked,
        "finished": tally.finished, "aborted": tally.aborted, "tokens": tally.tokens, "checked": tally.checked,
        "checked_tokens": tally.checked_tokens, "worst_tie": tally.worst_tie, "ties": tally.ties,
        "wrong_requests": len(tally.wrong), "wrong": tally.wrong[:8],
        "errors": tally.errors[:5], "preemptions": stats.preemptions, "prefix_hits": stats.prefix_hits, "left": left,
        "device_bytes": [before[0], after[0]], "peak_kb": [before[1], after[1]],
    }  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=5.0)
    parser.add_argument("--model", default="qwen3-0.6b", help="one of report.MODELS, with random weights")
    parser.add_argument("--concurrency", type=int, default=512)
    parser.add_argument("--longest", type=int, default=1024, help="tokens of prompt and answer")
    parser.add_argument("--tolerance", type=float, default=0.15, help="of log-probabilities, for ties; fits bfloat16")
    args = parser.parse_args()
    import torch
    from report import runner_for

    tokens = args.concurrency * args.longest // 4
    runner = runner_for(
        args.model, max_num_seqs=args.concurrency, max_model_len=2 * args.longest, kv_cache_tokens=tokens
    )
    with torch.inference_mode():
        found = soak(runner, args.minutes, args.concurrency, args.longest, args.tolerance, torch.cuda.memory_allocated)
    print(json.dumps({"section": "soak", "model": args.model, **found}))
    return int(not found["ok"])


if __name__ == "__main__":
    sys.exit(main())
