"""The runner on the C++ library. One launch is one C call: numpy prepares flat arrays, C++ does everything else.

A launch finishes the step before and returns when the next one has begun, on all threads but the caller's. That one is
lent to the step in `help`, in the next launch, or when the result is asked for. Until a step is finished C++ reads and
writes: the rows' tokens, block tables and sampling settings with the lists they point at, caches or states, the tables
of adapters, and the step's own arrays, which nobody else knows. What Python writes of these waits for the step, but for
one thing: new blocks of a row that goes on. They stand behind all that a step under way looks up.

What it computes for a token depends on its own sequence alone, bit for bit: not on the batch, the chunk or the threads.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from martlet.errors import BackendUnavailable, UsageError
from martlet.hub.card import ModelCard
from martlet.hub.checkpoint import Tensor, open_checkpoint
from martlet.hub.dummy import DummyCheckpoint
from martlet.kernels.cpu import program as c
from martlet.kernels.cpu.library import Executor
from martlet.model import weights

if TYPE_CHECKING:
    from martlet.model.adapters import Adapter
from martlet.model.spec import DecoderSpec
from martlet.runners import machine
from martlet.runners.base import Batch, Done, LoadOptions, NewRow, Step, StepResult, TokenLogprobs
from martlet.runners.cpu_runner.decoder import Decoder, check
from martlet.runners.cpu_runner.pace import Pace
from martlet.runners.cpu_runner.packed_cache import packed_cache
from martlet.runners.cpu_runner.packing import PRECISIONS, Precision
from martlet.runners.sizing import kv_dtype, plan_memory

log = logging.getLogger("martlet")

DEFAULT_ROWS = 32
PREFILL_TOKENS = 512  # weights are read once for so many: prompts alone go 1.2 to 1.3 times as fast as in steps of 128
MAX_DRAFTS = 8
KV_DTYPES = {"bf16": c.CacheKind.BF16, "int8": c.CacheKind.INT8}  # that LoadOptions.kv_dtype may name
NOTHING = c.BEFORE_HEAD()
KV_BYTES = {c.CacheKind.F32: 4, c.CacheKind.BF16: 2, c.CacheKind.INT8: 1}


class CpuRunner:
    """Runs one model on this machine's cores. Contract: martlet.runners.base.Runner."""

    max_prefill_tokens = PREFILL_TOKENS

    def __init__(
        self,
        card: ModelCard,
        options: LoadOptions,
        progress: Callable[[int, int], None] | None = None,
        reading: Callable[[], object] = lambda: None,
    ):
        """Load `card`. progress(done, total) is called for each parameter, reading() before weights are read.

        Raises BackendUnavailable when the library or this model cannot run here (torch_runner may), and any other of
        martlet.errors.
        """
        precision = choose_precision(card, options)
        began = time.perf_counter()
        self.spec = spec = weights.read_spec(card)
        check(spec, options.block_size)
        cores = machine.usable_cores()
        self.executor = Executor(cores, cores=cores)
        self.lag = 1 if cores > 1 else 0  # a thread that is alone has nobody to compute while Python runs
        self._current: _Step | None = None  # the step under way
        checkpoint = DummyCheckpoint(options.seed) if card.format == "dummy" else open_checkpoint(card)
        try:
            stream = weights.load(card, spec, checkpoint)
            if progress is not None:
                stream = _counted(stream, spec, progress)
            kept = options.packed_cache and card.format != "dummy" and card.merge is None
            cache = packed_cache(card, spec, precision, self.executor, reading) if kept else None
            reading()
            self.decoder = Decoder(spec, stream, self.executor, precision, cache)
        finally:
            checkpoint.close()
        self.memory = plan_memory(
            spec,
            options,
            free=max(0, machine.free_memory() - (cache.shared if cache else 0)),
            weights=self.decoder.weight_bytes,
            element_size=KV_BYTES[precision.kv],
            scale_size=4 if precision.kv == c.CacheKind.INT8 else 0,
            default_rows=DEFAULT_ROWS,
        )
        self.vocab_size = spec.vocab_size
        self.states = self.decoder.states(self.memory) if spec.recurrent else None
        self.caches = [] if self.states else self.decoder.caches(self.memory.num_blocks, self.memory.block_size)
        rows, longest = self.memory.max_rows, self.memory.max_model_len
        self.tokens = np.zeros((rows, longest + 1), np.int32)
        self.blocks = np.zeros((rows, -(-longest // self.memory.block_size)), np.int32)
        self.sampling = np.zeros(rows, c.SAMPLING)
        self.logprobs, self.prompt_logprobs = np.full(rows, -1, np.int32), np.full(rows, -1, np.int32)
        self.max_drafts = 0 if spec.recurrent else MAX_DRAFTS  # a state cannot forget a wrong guess
        self.max_adapters = options.max_adapters
        self.adapters = np.zeros(rows, np.int32)  # slot of each row's adapter
        self.adapter_tables = self.decoder.adapter_tables(options.max_adapters)
        self._lists: dict[int, tuple[np.ndarray, ...]] = {}  # keeps alive what `sampling` points at
        self._tables = (
            self.tokens.ctypes.data,
            self.tokens.shape[1],
            self.blocks.ctypes.data,
            self.blocks.shape[1],
            self.memory.block_size,
        )
        self._sampling = self.sampling.ctypes.data
        self._capacity = 0
        self._asked = self._adapted = False  # whether a row ever asked for log-probabilities, or had an adapter
        self._pace = Pace()
        log.info(
            "loaded %s in %.2f s: %.1f M parameters, C++ (%s), %d threads, %s",
            card.name,
            time.perf_counter() - began,
            weights.num_parameters(spec) / 1e6,
            self.executor.isa,
            cores,
            _describe(self.decoder),
        )
        for stored, format in self.decoder.widened.items():
            log.info("%s weights have no kernel on the CPU: they run as %s", stored, format.name.lower())

    @property
    def max_step_tokens(self) -> int:
        return self._pace.tokens

    def load_adapter(self, slot: int, adapter: Adapter) -> None:
        self._finish()
        self.adapter_tables.put(slot, adapter)

    def launch(self, batch: Batch) -> Step:
        if batch.new_rows or len(batch.copies) or batch.drafts is not None or self.states:
            self._finish()
        for new in batch.new_rows:
            self._enter(new)
        self.blocks[batch.block_rows, batch.block_slots] = batch.block_ids
        if len(batch.copies):
            source, target = batch.copies.T
            for cache in self.caches:
                cache.keys[target] = cache.keys[source]
                cache.values[target] = cache.values[source]
        if not len(batch.rows):
            return Done(StepResult(np.empty(0, np.int32)))
        step = self._lay_out(batch)
        self.executor.begin(self.program, step.arguments, step)
        self._ended()
        self._current, step.arguments, step.began = step, None, time.perf_counter()
        if batch.masks is not None:
            self._finish()
            if step.failure is not None:
                raise step.failure
        return step

    def help(self, to_the_end: bool) -> None:
        if to_the_end:
            self._finish()
        else:
            self.executor.help()

    def _finish(self) -> None:
        if self._current is not None:
            self.executor.finish()
            self._ended()

    def _ended(self) -> None:
        """The step that was under way is done."""
        step, self._current = self._current, None
        if step is None:
            return
        self._pace.saw(step.batch.num_tokens, time.perf_counter() - step.began)
        if self.states:
            self.states.slots.end(step.batch)
        if step.batch.masks is not None:
            self.sampling["mask"][step.batch.rows] = 0

    def _enter(self, new: NewRow) -> None:
        row, params = new.row, new.params
        self.tokens[row, : len(new.tokens)] = new.tokens
        ends = np.array(new.end_ids if params.min_tokens else (), np.int32)
        allowed = np.array(params.allowed_token_ids or (), np.int32)
        bias_ids = np.array(list(params.logit_bias), np.int32)
        biases = np.array(list(params.logit_bias.values()), np.float32)
        self._lists[row] = (bias_ids, biases, allowed, ends)
        self.sampling[row] = (
            new.seed,
            *(array.ctypes.data for array in self._lists[row]),
            0,
            len(bias_ids),
            len(allowed),
            len(ends),
            new.prompt_len,
            params.min_tokens,
            params.top_k if 0 < params.top_k < self.vocab_size else 0,
            params.temperature,
            params.top_p,
            params.min_p,
            params.presence_penalty,
            params.frequency_penalty,
            params.repetition_penalty,
        )
        self.adapters[row] = new.adapter
        self._adapted = self._adapted or new.adapter > 0
        self._asked = self._asked or params.logprobs is not None or params.prompt_logprobs is not None
        self.logprobs[row] = -1 if params.logprobs is None else params.logprobs
        self.prompt_logprobs[row] = -1 if params.prompt_logprobs is None else params.prompt_logprobs

    def _lay_out(self, batch: Batch) -> _Step:
        """A step as C++ takes it. Where nothing is under way it may write into tables and states."""
        numbers = np.array((batch.rows, batch.start, batch.count), np.int32)
        rows, start, count = numbers
        places = numbers.ctypes.data + 4 * len(rows) * np.arange(3)
        ends = count.cumsum(dtype=np.int32)
        if ends[-1] > self._capacity:
            self._capacity = int(ends[-1])
            memory = self.states or self.caches
            self.program = self.decoder.program(self._capacity, memory, self.memory.max_model_len, self.adapter_tables)
        kept = self.states.begin(batch, self.blocks) if self.states else None
        sequences = batch.sample.nonzero()[0]
        drafted = None if batch.drafts is None else self._put_drafts(batch, rows)
        queries, owners = self._sample_queries(rows, ends, sequences, drafted)
        sampled, most = len(queries), -1  # -1: nobody asks for log-probabilities
        if self._asked:
            if (self.prompt_logprobs[rows] >= 0).any():
                prompt, prompt_owners = self._prompt_queries(rows, start, count, ends)
                queries, owners = np.concatenate([queries, prompt]), np.concatenate([owners, prompt_owners])
            most = int(queries["top"].max(initial=-1))
        step = _Step(
            self, batch, numbers, sequences, drafted, queries, owners, sampled, np.zeros(len(queries), c.ANSWER)
        )
        if most >= 0:
            step.tops = np.empty((len(queries), most), np.int32), np.empty((len(queries), most), np.float32)
        if self._adapted and (slots := self.adapters[rows]).any():
            step.slots = slots
        step.arguments = c.Batch(
            len(rows),
            len(queries),
            *places.tolist(),
            *self._tables,
            max(0, most),
            queries.ctypes.data,
            self._sampling,
            step.answers.ctypes.data,
            *((top.ctypes.data for top in step.tops) if step.tops else (None, None)),
            NOTHING if batch.masks is None else c.BEFORE_HEAD(step.take_masks),
            c.address(step.slots),
            kept,
        )
        return step

    def _put_drafts(self, batch: Batch, rows: np.ndarray) -> np.ndarray:
        """Write the guesses into the rows' tokens; how many each sequence has, int32 [B]."""
        assert batch.drafts is not None
        drafted = (batch.drafts >= 0).sum(1, dtype=np.int32)
        sequence, i = np.nonzero(batch.drafts >= 0)
        at = (batch.start + batch.count - drafted)[sequence] + i
        self.tokens[rows[sequence], at] = batch.drafts[sequence, i]
        return drafted

    def _sample_queries(
        self, rows: np.ndarray, ends: np.ndarray, sequences: np.ndarray, drafted: np.ndarray | None
    ) -> tuple[np.ndarray, np.ndarray]:
        """A query for the last token of each sequence that samples, and for those its guesses follow; owners too."""
        owner, before = sequences, 1  # 1 for the last token of a sequence
        if drafted is not None:
            wanted = drafted[sequences] + 1
            owner = np.repeat(sequences, wanted)
            before = np.repeat(np.cumsum(wanted), wanted) - np.arange(len(owner))
        queries = np.empty(len(owner), c.QUERY)
        asking = rows[owner]
        queries["token"], queries["row"] = ends[owner] - before, asking
        queries["target"], queries["top"] = -1, self.logprobs[asking]
        return queries, owner

    def _prompt_queries(
        self, rows: np.ndarray, start: np.ndarray, count: np.ndarray, ends: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """A query for each token of the step that predicts a prompt token whose logprobs are asked for; owners too."""
        stop = np.minimum(start + count, self.sampling["prompt_len"][rows] - 1)
        length = np.where(self.prompt_logprobs[rows] >= 0, np.maximum(stop - start, 0), 0)
        owner = np.repeat(np.arange(len(rows)), length)
        offset = np.arange(len(owner)) - np.repeat(np.cumsum(length) - length, length)
        queries = np.empty(len(owner), c.QUERY)
        queries["token"], queries["row"] = (ends - count)[owner] + offset, rows[owner]
        queries["target"] = self.tokens[rows[owner], start[owner] + offset + 1]
        queries["top"] = self.prompt_logprobs[rows[owner]]
        return queries, owner

    def close(self) -> None:
        """Stop the threads and free weights and cache. The runner cannot be used afterwards."""
        self._finish()
        self.executor.close()
        self.caches.clear()
        self.states = self.program = None


@dataclass(slots=True, eq=False)
class _Step:
    """A step that was begun: what C++ reads and writes of it, and what becomes of that. Contract: runners.base.Step.

    sequences: int64, numbers of those that sample; drafted: how many guesses each of the batch has; queries: `sampled`
    of them sample, the others ask of the prompt; owners: whose they are, by number.
    """

    runner: CpuRunner
    batch: Batch
    numbers: np.ndarray  # int32 [3, B]: rows, start, count
    sequences: np.ndarray
    drafted: np.ndarray | None
    queries: np.ndarray
    owners: np.ndarray
    sampled: int
    answers: np.ndarray
    tops: tuple[np.ndarray, np.ndarray] | None = None  # of those who ask for log-probabilities: ids, and these
    slots: np.ndarray | None = None  # of adapters
    arguments: c.Batch | None = None  # until it is begun
    masks: np.ndarray | None = None
    failure: Exception | None = None
    began: float = 0.0

    def take_masks(self) -> None:
        """What C++ calls before it samples: waits for the masks and points the rows at them."""
        entries = self.batch.masks.entries
        try:
            bits = self.masks = self.batch.masks.wait()
        except Exception as error:  # it cannot pass through C
            self.failure = error
        else:
            addresses = bits.ctypes.data + np.arange(len(bits)) * bits.strides[0]
            self.runner.sampling["mask"][self.batch.rows[entries]] = addresses

    def result(self) -> StepResult:
        runner, batch = self.runner, self.batch
        if runner._current is self:
            runner._finish()
        chosen = self.answers["token"][: self.sampled]
        if batch.drafts is None:
            tokens = np.full(len(batch.rows), -1, np.int32)
            tokens[self.sequences] = chosen
        else:
            tokens = _accepted(batch.drafts, self.sequences, self.drafted, chosen)
        result = StepResult(tokens)
        for i in np.flatnonzero(self.queries["top"] >= 0).tolist() if self.tops else ():
            token, rank, logprob, _ = self.answers[i].item()
            k = min(int(self.queries["top"][i]), runner.vocab_size)
            entry = TokenLogprobs(token, logprob, rank, *(top[i, :k] for top in self.tops))
            if i < self.sampled:
                result.logprobs[int(self.owners[i])] = entry
            else:
                result.prompt_logprobs.setdefault(int(self.owners[i]), []).append(entry)
        return result


def _accepted(drafts: np.ndarray, sequences: np.ndarray, drafted: np.ndarray, chosen: np.ndarray) -> np.ndarray:
    """Each sequence's tokens up to the first wrong guess, int32 [B, 1 + D]; chosen: those after each of its tokens."""
    tokens = np.full((len(drafts), drafts.shape[1] + 1), -1, np.int32)
    at = 0
    for b in sequences.tolist():
        drawn = chosen[at : at + drafted[b] + 1]
        at += len(drawn)
        wrong = np.flatnonzero(drawn[:-1] != drafts[b, : drafted[b]])
        keep = int(wrong[0]) + 1 if len(wrong) else len(drawn)
        tokens[b, :keep] = drawn[:keep]
    return tokens


def choose_precision(card: ModelCard, options: LoadOptions) -> Precision:
    """What to run in: `quant`, else `dtype`, else what the checkpoint holds.

    quant "auto" is what runs fastest within the bounds of martlet.runners.quality: the blocks of a quantised checkpoint
    as they are, else int8, else bf16. One log line tells what it came to, and how good that is.
    """
    if options.device not in ("auto", "cpu"):
        raise BackendUnavailable(f"the native CPU kernels do not run on device {options.device!r}")
    quant = options.quant
    if quant == "auto":
        from martlet.runners import quality

        quantised = card.format == "gguf" or card.config.get("quantization_config")
        quant = quality.choose(card, ("stored",) if quantised else ("int8", "bf16"))
    if quant is None:
        by_dtype = {"auto": "stored", "float32": "float32", "bfloat16": "bf16"}
        if options.dtype not in by_dtype:
            raise BackendUnavailable(f"the native CPU kernels compute in float32 or bfloat16, not {options.dtype}")
        quant = by_dtype[options.dtype]
    if quant not in PRECISIONS:
        raise UsageError(f"quant {quant!r} is none of auto, {', '.join(PRECISIONS)}", param="quant")
    precision = PRECISIONS[quant]
    asked = kv_dtype(options, "the CPU runner", *KV_DTYPES)
    return precision if asked == "auto" else precision._replace(kv=KV_DTYPES[asked])


def _describe(decoder: Decoder) -> str:
    """Which formats the matrices run in: 'q4_1 weights, q8_0 head with a screen, bfloat16 KV'."""
    linears = [one for block in decoder.blocks for one in block.linears]
    formats = dict.fromkeys(c.Format(one.matrix.format).name.lower() for one in linears)
    head = c.Format(decoder.head.format).name.lower() + (" head with a screen" if decoder.screen.rows else " head")
    memory = "float32 states" if decoder.spec.recurrent else f"{decoder.precision.kv.name.lower()} KV"
    return f"{'/'.join(formats)} weights, {head}, {memory}"


def _counted(
    stream: Iterator[tuple[str, Tensor]], spec: DecoderSpec, progress: Callable[[int, int], None]
) -> Iterator[tuple[str, Tensor]]:
    total = sum(1 for _ in weights.parameters(spec))
    for done, item in enumerate(stream, 1):
        yield item
        progress(done, total)
