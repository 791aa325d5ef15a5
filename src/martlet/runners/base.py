"""The seam between the engine and whatever computes: flat numpy arrays in, tokens out.

Who owns what. The engine owns requests, the order in which they run, blocks and their reference counts. A runner owns
the network, the KV memory and, for each *row*, the token ids, the block table and the sampling state. The engine sends
only what changed: sequences that enter a row, block-table entries, and how many tokens each row computes in the step.
A runner writes the token it samples into the row's token list by itself, so the next step can be launched before any
Python has seen it (`Runner.lag`). No torch here: a runner without torch can stand behind this seam.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple, Protocol

import numpy as np

from martlet.sampling_params import SamplingParams

if TYPE_CHECKING:
    from martlet.model.adapters import Adapter

NONE = np.empty(0, np.int32)
KV_DTYPES = ("auto", "bf16", "fp8", "int8")  # how keys and values are kept; a runner refuses what it lacks


@dataclass(frozen=True, slots=True)
class LoadOptions:
    """How to load a model. Every None or "auto" is decided by the runner from the model and the machine, and printed.

    device: "auto", "cpu" or "cuda". dtype: "auto", "float32", "bfloat16" or "float16". max_model_len: longest sequence,
    at most what the model allows. max_num_seqs: sequences in a batch. kv_cache_tokens: size of the KV memory in tokens;
    None sizes it from `memory_utilization` of the memory that is free. block_size: tokens of a KV block. kv_dtype: one
    of KV_DTYPES; "auto" is what the runner computes in, and int8 beside int8 weights on a CPU. seed: of dummy weights.
    packed_cache: keep packed weights in the user's cache, so that the next start is faster.
    max_adapters: LoRA adapters that may be active in a batch, 0 for none; max_lora_rank: the largest rank of one.
    tensor_parallel_size: processes that share the model, one a GPU (martlet.runners.parallel). symmetric_memory: they
    add up through memory they can all read; without, through NCCL alone, to measure what it gives.
    """

    device: str = "auto"
    dtype: str = "auto"
    quant: str | None = None
    kv_dtype: str = "auto"
    max_model_len: int | None = None
    max_num_seqs: int | None = None
    kv_cache_tokens: int | None = None
    memory_utilization: float = 0.9
    block_size: int = 16
    seed: int = 0
    packed_cache: bool = True
    max_adapters: int = 0
    max_lora_rank: int = 64
    tensor_parallel_size: int = 1
    symmetric_memory: bool = True


class MemoryPlan(NamedTuple):
    """What a runner can keep for sequences, decided when it loads.

    block_size: tokens a KV block holds; num_blocks: how many blocks there are. Block ids are 0 ... num_blocks - 1.
    max_rows: sequences that may be in a batch; max_model_len: longest sequence in tokens, prompt and output together.
    bytes_per_token: KV bytes of one token over all layers (for reports).
    snapshots: the model is a recurrence. A row's state is then the row's own, of fixed size, and a block holds what it
    was after the block's last token: see `Batch`.
    """

    block_size: int
    num_blocks: int
    max_rows: int
    max_model_len: int
    bytes_per_token: int = 0
    snapshots: bool = False

    @property
    def longest(self) -> int:
        """Tokens of the longest sequence that this memory can hold."""
        return self.max_model_len if self.snapshots else min(self.max_model_len, self.num_blocks * self.block_size)


class NewRow(NamedTuple):
    """A sequence enters `row` (first time, or again after a preemption); whatever the row held before is void.

    tokens: int32 [n], all tokens known now: the prompt, and after a preemption also the output so far.
    prompt_len: how many of them are prompt. seed: always a concrete 64-bit value, 0 <= seed < 2**64.
    end_ids: tokens that end this sequence, not to be sampled before `params.min_tokens` outputs.
    adapter: slot of the LoRA adapter it runs with, 0 for none.
    """

    row: int
    tokens: np.ndarray
    prompt_len: int
    params: SamplingParams
    seed: int
    end_ids: tuple[int, ...] = ()
    adapter: int = 0


class Masks(Protocol):
    """Which tokens some sequences of a step may choose, by their grammars; computed while the forward pass runs.

    entries: int64 [M], numbers of those sequences in the batch, in order.
    """

    entries: np.ndarray

    def wait(self) -> np.ndarray:
        """Block until the masks are there, or late: uint32 [M, ceil(V / 32)], bit t % 32 of word t // 32 for token t.

        To be called on the thread that launches, right before sampling and before `launch` returns: who has masks may
        end any time later. Again, it gives the same. A mask that is late allows everything; the engine then drops what
        was sampled.
        """
        ...


class Batch(NamedTuple):
    """One step. B sequences take part; sequence b computes tokens start[b] ... start[b] + count[b] - 1 of its row.

    Applied in this order: new_rows; block table writes table[block_rows, block_slots] = block_ids; KV block copies
    (source, target), all reads before all writes; then the forward pass; then sampling for the sequences with
    sample[b], whose last computed token is the newest one the row holds. The sampled token becomes the row's token
    number start[b] + count[b].

    Where blocks hold snapshots of a row's state (`MemoryPlan.snapshots`): a row that begins a step elsewhere than its
    last one ended, or that has just been entered, takes its state from the block in the slot that ends at start[b], and
    the empty state at 0. For a slot that is written into its block table and that the step computes to the end of, a
    snapshot goes into that block. There are no copies.

    With d guesses for sequence b, the row's tokens start[b] + count[b] - d ... are those guesses, for now, and a token
    is sampled after each of the last d + 1 tokens, by the same rule as ever. The guesses up to the first that differs
    from the token sampled in its place were right; with the one sampled after the last right guess, they are the row's
    new tokens, just those that d + 1 steps would have given. Only rows without penalties, log-probabilities or a
    minimum length get guesses, and only from runners whose max_drafts allows them.
    """

    rows: np.ndarray  # int32 [B]
    start: np.ndarray  # int32 [B], tokens computed before this step (their KV is in the blocks)
    count: np.ndarray  # int32 [B], tokens to compute now, >= 1
    sample: np.ndarray  # bool [B]
    drafts: np.ndarray | None = None  # int32 [B, D], guesses of the tokens to come, padded with -1
    new_rows: Sequence[NewRow] = ()
    block_rows: np.ndarray = NONE  # int32 [U]
    block_slots: np.ndarray = NONE  # int32 [U]
    block_ids: np.ndarray = NONE  # int32 [U]
    copies: np.ndarray = NONE.reshape(0, 2)  # int32 [C, 2] source, target
    masks: Masks | None = None  # a sequence with a mask has no guesses

    @property
    def num_tokens(self) -> int:
        return int(self.count.sum())


class TokenLogprobs(NamedTuple):
    """Log-probabilities at one position: of the token that stands there, and of the k most likely ones (descending).

    rank: 1 for the most likely token of the vocabulary.
    """

    token: int
    logprob: float
    rank: int
    top_ids: np.ndarray  # int32 [k]
    top_logprobs: np.ndarray  # float32 [k]


@dataclass(frozen=True, slots=True, eq=False)
class StepResult:
    """What a step gave. tokens: int32 [B], -1 where nothing was sampled; with guesses int32 [B, 1 + D], padded with -1.

    logprobs[b]: of the sampled token, for sequences whose params ask. prompt_logprobs[b]: one entry for each position
    p in start[b] ... start[b] + count[b] - 1 with p + 1 < prompt_len, telling of token p + 1 given tokens 0 ... p.
    """

    tokens: np.ndarray
    logprobs: dict[int, TokenLogprobs] = field(default_factory=dict)
    prompt_logprobs: dict[int, list[TokenLogprobs]] = field(default_factory=dict)


class Step(Protocol):
    """A step under way."""

    def result(self) -> StepResult:
        """Wait for the step and return what it gave; to be called once, in launch order."""
        ...


class Runner(Protocol):
    """Runs steps of one model on one device.

    lag: how many steps may be in flight before the engine must ask for the oldest one's result. 0: `launch` computes
    at once; 1: the engine launches step n + 1 before it reads step n.
    max_step_tokens: most tokens of a step that this machine should compute, so that a mixed step stays short. Asked for
    before every step: a runner may learn it from the steps it ran.
    max_prefill_tokens: most tokens of a step in which nobody decodes, so that nobody's stream waits for it.
    max_drafts: most guesses a sequence may get in a step; 0 where `Batch.drafts` is not understood. An engine that
    guesses reads each step before it launches the next, whatever the lag.
    max_adapters: slots for LoRA adapters, numbered from 1; 0 where there are none.

    A runner that computes on the calling thread as well as on others also has `help(to_the_end)`: lends it that thread
    until the steps in flight are done, or little is left of them. Its `launch` waits for the step before, so that when
    it returns the results of all but the newest step are there.

    A runner that has more to get ready than a start shall wait for has `get_ready()`: does a piece of it, some tens of
    milliseconds long, and returns False when nothing is left. Asked for while no step is in flight.
    """

    memory: MemoryPlan
    vocab_size: int
    lag: int
    max_step_tokens: int
    max_prefill_tokens: int
    max_drafts: int
    max_adapters: int

    def load_adapter(self, slot: int, adapter: Adapter) -> None:
        """Put an adapter's weights into a slot, in place of what it held. Steps that were launched keep what they had.

        No row of a step yet to be launched may run with what is replaced.
        """
        ...

    def launch(self, batch: Batch) -> Step: ...

    def close(self) -> None: ...


class Done(NamedTuple):
    """A step that is already computed."""

    value: StepResult

    def result(self) -> StepResult:
        return self.value
