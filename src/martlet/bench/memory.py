"""How much KV memory the engine's paging wastes, and how much sharing a prompt saves, counted in its real block pool.

The network is left out: which blocks a sequence holds depends on token counts alone. A stand-in runner answers every
step with the same token and looks at the pool while the step runs, when every block of the step is taken.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from martlet.bench import workloads
from martlet.engine import Engine, EngineOptions, Request
from martlet.engine.engine import drain
from martlet.runners.base import Batch, Done, MemoryPlan, Step, StepResult
from martlet.sampling_params import SamplingParams

CONTIGUOUS = 2048  # tokens that an allocator without paging would reserve for each sequence


@dataclass(frozen=True, slots=True)
class Sample:
    """The pool during one step. tokens: length of each sequence that runs; blocks: blocks in use."""

    tokens: np.ndarray
    blocks: int


class CountingRunner:
    """A runner without a network that records the pool at every step."""

    lag = 0
    max_drafts = 0
    max_adapters = 0
    vocab_size = 1 << 16
    max_step_tokens = max_prefill_tokens = 1 << 20  # whole prompts in one step, so that all sequences run together

    def __init__(self, block_size: int, num_blocks: int, rows: int, max_model_len: int):
        self.memory = MemoryPlan(block_size, num_blocks, rows, max_model_len)
        self.engine: Engine | None = None
        self.samples: list[Sample] = []

    def launch(self, batch: Batch) -> Step:
        assert self.engine is not None
        self.samples.append(Sample(batch.start + batch.count, self.engine.stats().kv_blocks_used))
        return Done(StepResult(np.where(batch.sample, 7, -1).astype(np.int32)))

    def close(self) -> None:
        """Nothing to give back."""


@dataclass(frozen=True, slots=True)
class Waste:
    """mean_length: of running sequences, over all steps where it is at least `least`; the rest are shares of 1."""

    block_size: int
    sequences: int
    least: int
    mean_length: float
    measured: float
    formula: float
    contiguous: float


@dataclass(frozen=True, slots=True)
class Sharing:
    """Blocks at the peak, with and without sharing; saved and formula are shares of 1."""

    samples: int
    prompt: int
    output: int
    block_size: int
    shared: int
    unshared: int
    formula: float

    @property
    def saved(self) -> float:
        return 1 - self.shared / self.unshared


def measure_waste(block_size: int = 16, least: int = 200) -> Waste:
    """Waste over W3's prompts and answers, all at once: 1 - tokens / (blocks * block size)."""
    w3 = workloads.load("W3")
    params = SamplingParams(max_tokens=w3.new_tokens, ignore_eos=True)
    samples = run([Request(str(i), p, params, cache_salt=str(i)) for i, p in enumerate(w3.prompts)], block_size)
    seen = [s for s in samples if len(s.tokens) == w3.size and s.tokens.mean() >= least]
    held = sum(s.blocks for s in seen) * block_size
    tokens = sum(int(s.tokens.sum()) for s in seen)
    rounded = sum(int((-(-s.tokens // block_size) * block_size).sum()) for s in seen)
    mean = float(np.mean([s.tokens.mean() for s in seen]))
    return Waste(block_size, w3.size, least, mean, 1 - tokens / held, 1 - tokens / rounded, 1 - mean / CONTIGUOUS)


def measure_sharing(samples: int = 6, prompt: int = 256, output: int = 128, block_size: int = 16) -> Sharing:
    """Peak blocks of one request with n = samples against as many requests that share nothing."""
    ids = list(range(1, prompt + 1))
    together = [Request("n", ids, SamplingParams(n=samples, max_tokens=output, ignore_eos=True))]
    alone = SamplingParams(max_tokens=output, ignore_eos=True)
    apart = [Request(str(i), ids, alone, cache_salt=str(i)) for i in range(samples)]
    shared, unshared = (max(s.blocks for s in run(r, block_size)) for r in (together, apart))
    formula = (samples - 1) * (prompt // block_size) * block_size / (samples * (prompt + output))
    return Sharing(samples, prompt, output, block_size, shared, unshared, formula)


def run(requests: Sequence[Request], block_size: int) -> list[Sample]:
    """Run requests on the real engine and return what its pool held at each step."""
    rows = sum(r.params.n for r in requests)
    longest = max(len(r.prompt_token_ids) + r.params.max_tokens for r in requests) + block_size
    runner = CountingRunner(block_size, rows * -(-longest // block_size) + rows, rows, longest)
    runner.engine = Engine(runner, None, EngineOptions())
    drain(runner.engine, requests)
    return runner.samples


def table(waste: Waste, sharing: Sharing):
    from rich.table import Table

    out = Table("KV memory", "measured", "formula", box=None, pad_edge=False)
    out.add_row(
        f"wasted by blocks of {waste.block_size}, {waste.sequences} sequences, mean length {waste.mean_length:.0f}",
        f"{waste.measured:.2%}",
        f"{waste.formula:.2%}  1 - sum(len) / sum(ceil(len / B) * B)",
    )
    out.add_row(
        f"wasted when {CONTIGUOUS:,} tokens are reserved for each of them",
        "-",
        f"{waste.contiguous:.2%}  1 - mean(len) / max_len",
    )
    out.add_row(
        f"saved by sharing a prompt of {sharing.prompt} among {sharing.samples} answers of {sharing.output} "
        f"({sharing.shared} blocks for {sharing.unshared})",
        f"{sharing.saved:.2%}",
        f"{sharing.formula:.2%}  (n - 1) * floor(P / B) * B / (n * (P + O))",
    )
    return out
