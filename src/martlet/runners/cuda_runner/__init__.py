"""The runner on one NVIDIA GPU: state on the device, deltas sent, decoding steps as CUDA graphs, one step ahead.

What the host sends in a step is one int32 buffer: which rows, how far they are, and the places of the device's state
that change. The device knows tokens, block tables and sampling settings by itself, so a step that only decodes is one
copy, one graph launch (forward, head, sampling, the write of the new token) and one copy back, and the next one can be
launched before Python has read anything.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from functools import partial

import numpy as np
import torch

from martlet.errors import BackendUnavailable, OutOfMemory, UsageError
from martlet.hub.card import ModelCard
from martlet.kernels.cuda import decode_attention, layers, prefill_attention, sampling
from martlet.model.adapters import Adapter
from martlet.model.shard import split
from martlet.model.spec import DecoderSpec
from martlet.model.weights import read_spec
from martlet.runners.base import Batch, LoadOptions, MemoryPlan, Step, StepResult
from martlet.runners.coverage import cuda_lacks
from martlet.runners.cuda_runner import sampler
from martlet.runners.cuda_runner.adapters import Slots, beside, bytes_for
from martlet.runners.cuda_runner.clock import Clock
from martlet.runners.cuda_runner.decoder import Decoder, State, StepTensors, dtype_of_sums
from martlet.runners.cuda_runner.graphs import Graphs, step_limit
from martlet.runners.cuda_runner.mailbox import Mailbox, to_host
from martlet.runners.cuda_runner.mixed import MIXED_SEQUENCES, HostStep
from martlet.runners.cuda_runner.pieces import LEAST, Joined, pieces
from martlet.runners.cuda_runner.ranks import Ranks, shared_memory
from martlet.runners.cuda_runner.weights import Weights, allocate, fill, int4_sizes
from martlet.runners.rows import Rows, masks_of
from martlet.runners.sizing import kv_dtype, plan_memory, size
from martlet.runners.torch_runner.collectives import Alone, Collectives

__all__ = ["CudaRunner"]

log = logging.getLogger("martlet")

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "auto": torch.bfloat16}
DEFAULT_ROWS = 512
STEP_TOKENS = 8192
COMPILING_PATIENCE = 0.02  # seconds at a time, since a request may come
DEFAULT_LENGTH = 32768  # longest sequence unless more is asked for: state and scratch grow with it


class CudaRunner:
    """Runs one model on one GPU. Contract: martlet.runners.base.Runner.

    `device` "cpu" runs the same code under Triton's interpreter, for tests of everything but speed.
    """

    lag = 1
    max_drafts = 0

    def __init__(
        self,
        card: ModelCard,
        options: LoadOptions,
        progress: Callable[[int, int], None] | None = None,
        *,
        graphs: bool = True,
        step_tokens: int = STEP_TOKENS,
        ranks: Collectives | None = None,
    ):
        """Load `card`, or the share of one of the `ranks` that run it together.

        progress(done, total) counts parameters. Raises any of martlet.errors.
        """
        if options.quant not in (None, "fp8", "int4"):
            raise UsageError(f"quant {options.quant!r}: the CUDA runner has fp8 and int4", param="quant")
        if options.quant == "fp8" and options.max_adapters:
            raise UsageError("the CUDA runner has no adapters beside fp8 weights; leave --quant out", param="quant")
        if options.dtype not in DTYPES:
            raise UsageError(f"dtype {options.dtype!r} is none of {', '.join(DTYPES)}", param="dtype")
        self.device = _device(options.device)
        self.kv_dtype = _kv_dtype(options, DTYPES[options.dtype])
        self.dtype = DTYPES[options.dtype]
        self.group = ranks or Alone()
        self.spec = spec = split(read_spec(card), self.group.rank, self.group.size)
        if lacks := cuda_lacks(spec):
            raise BackendUnavailable(f"the CUDA runner has no {lacks}")
        self.max_prefill_tokens, self.max_step_tokens = step_tokens, min(step_tokens, step_limit(spec))
        self.vocab_size = spec.vocab_size
        clock = Clock()
        if self._on_gpu:  # its choices are better by a tenth for 64 rows, and the same for 256 and 8,192
            torch.backends.cuda.preferred_blas_library("cublaslt")
        with torch.inference_mode():
            free = _free_memory(self.device)
            int4 = int4_sizes(card, spec) if options.quant == "int4" else None
            places, loaded = allocate(
                spec, self.device, self.dtype, fp8=options.quant == "fp8", int4=int4,
                beside=beside(options.max_adapters, options.max_lora_rank),
            )  # fmt: skip
            shared = self._ranks(options)
            if shared is not None:
                clock.lap(f"meeting of {self.group.size} ranks", self.device)
            self.memory = self._plan(options, free, loaded)
            self.max_adapters = options.max_adapters
            slots = None
            if self.max_adapters:
                slots = Slots(spec, loaded.blocks, self.max_adapters, options.max_lora_rank, self.device, self.dtype)
            self.decoder = Decoder(spec, loaded, self.memory.max_model_len, slots, shared)
            self.state = _state(spec, self.memory, self.device, self.kv_dtype)
            self.rows = Rows(self.memory, spec.vocab_size)
            self.mailbox = Mailbox(self.device)
            self.graphs = Graphs(self.decoder, self.state, self.memory.max_rows) if graphs and self._on_gpu else None
            clock.lap("memory", self.device)
            whole = bool(self.max_adapters) or self.group.size > 1  # slots would be captured; ranks capture in step
            with self.graphs.compiled(whole=whole) if self.graphs is not None else nullcontext():
                fill(card, spec, places, loaded, seed=options.seed, progress=progress)
                clock.lap(f"weights of {card.name}", self.device)
            if self.graphs is not None:
                clock.lap("kernels, which were compiled meanwhile,", self.device)
                self.graphs.prepare()
                clock.lap(f"{len(self.graphs.captured)} graphs", self.device)
                if not whole:
                    self.graphs.compile_others()
        log.info("started in %.2f s: %s", clock.total, clock)

    @property
    def _on_gpu(self) -> bool:
        return self.device.type == "cuda"

    def _ranks(self, options: LoadOptions) -> Ranks | None:
        """How the ranks join their shares; by the same way on all of them."""
        if self.group.size == 1:
            return None
        rows = max(options.max_num_seqs or DEFAULT_ROWS, sampler.LOGIT_ROWS) + MIXED_SEQUENCES
        memory = None
        if self._on_gpu and options.symmetric_memory:
            memory = partial(shared_memory, self.group, device=self.device)
        sums = dtype_of_sums(self.spec, self.dtype)
        return Ranks(self.group, self.spec, sums, self.max_prefill_tokens, rows, memory)

    def _plan(self, options: LoadOptions, free: int, loaded: Weights) -> MemoryPlan:
        spec, element = self.spec, self.dtype.itemsize
        longest = options.max_model_len or min(spec.max_positions, DEFAULT_LENGTH)
        options = replace(options, max_model_len=longest)
        rows = options.max_num_seqs or DEFAULT_ROWS
        state = 4 * rows * (longest + -(-longest // options.block_size)) + 8 * rows * spec.vocab_size
        widest = max(2 * layer.mixer.q_size + 2 * layer.mixer.kv_size + 3 * layer.mlp.hidden for layer in spec.layers)
        sums = dtype_of_sums(spec, self.dtype)
        activations = self.max_prefill_tokens * (widest + 4 * spec.width) * sums.itemsize
        adapters = bytes_for(spec, loaded.blocks, options.max_adapters, options.max_lora_rank, element)
        left = (_free_memory(self.device) if self._on_gpu else free) - state - activations - adapters
        left = self.group.least(left)
        return plan_memory(
            spec,
            options,
            free=left,
            weights=loaded.nbytes,
            element_size=self.kv_dtype.itemsize,
            scale_size=4 if self.kv_dtype == torch.float8_e4m3fn else 0,
            default_rows=DEFAULT_ROWS,
        )

    @torch.inference_mode()
    def load_adapter(self, slot: int, adapter: Adapter) -> None:
        assert self.decoder.slots is not None
        self.decoder.slots.put(slot, adapter)

    @torch.inference_mode()
    def get_ready(self) -> bool:
        """Compile and capture what a step would have to wait for, a little at a time. Whether there is more."""
        if self.graphs is None:
            return False
        if self.graphs.is_compiling(COMPILING_PATIENCE):
            return True
        try:
            return self.graphs.capture_next()
        except torch.cuda.OutOfMemoryError:
            if self.group.size > 1:  # the others may have got through, and all must have the same graphs
                raise
            log.warning("no memory is left for more graphs; a lower --memory_utilization leaves some")
            torch.cuda.empty_cache()
            return False

    @torch.inference_mode()
    def launch(self, batch: Batch) -> Step:
        """Start a step. Where its activations do not fit it runs in pieces; OutOfMemory when not even these fit."""
        self.rows.apply(batch)
        changes = self._changes(batch)
        self._copy(batch.copies)
        most = batch.num_tokens
        try:
            return self._launch(batch, changes)
        except torch.cuda.OutOfMemoryError as error:
            failure = error
        if self.group.size > 1:  # the others may have got through: pieces are for one rank that knows what was done
            raise OutOfMemory(
                f"a step of {most} tokens did not fit: {size(_free_memory(self.device))} are free; a lower "
                "--memory_utilization leaves more"
            ) from failure
        self._apply(changes)
        while most > LEAST:
            torch.cuda.empty_cache()
            most = max(LEAST, most // 2)
            try:
                parts = [(which, self._eager(piece)) for which, piece in pieces(batch, most)]
            except torch.cuda.OutOfMemoryError as error:
                failure = error
                continue
            log.warning(
                "a step of %d tokens did not fit into %s; steps are of %d from now on (a lower --memory_utilization "
                "leaves more)", batch.num_tokens, size(_free_memory(self.device)), most,
            )  # fmt: skip
            self.max_step_tokens, self.max_prefill_tokens = min(most, self.max_step_tokens), most
            return Joined(len(batch.rows), parts)
        torch.cuda.empty_cache()
        raise OutOfMemory(
            f"a step of {batch.num_tokens} tokens did not fit: {size(_free_memory(self.device))} are free; "
            "a lower --memory_utilization or --max_num_batched_tokens leaves more"
        ) from failure

    def _copy(self, copies: np.ndarray) -> None:
        """Copy KV blocks, [C, 2] source, target; a block's place in tables plays no part."""
        if len(copies):
            source, target = self.mailbox.send(copies.T.reshape(-1)).view(2, -1).long()
            for cache in (*self.state.caches, *filter(torch.is_tensor, self.state.scales)):
                raw = cache.view(torch.uint8)  # torch copies no float8 by index
                raw.index_copy_(1, target, raw.index_select(1, source))

    def _launch(self, batch: Batch, changes: np.ndarray) -> CudaStep:
        total = len(batch.rows)
        decodes = total > 0 and bool((batch.count == 1).all() and batch.sample.all())
        kind = sampler.GREEDY
        if total:
            plain = decodes and batch.masks is None
            kind = sampler.kind_of(self.rows, batch.rows, batch.start + batch.count) if plain else sampler.SPECIAL
        replay = self.graphs is not None and decodes and not self._wants_prompt_logprobs(batch)
        # A graph's first kernel reads tokens while it writes changes: new rows' tokens have to be there before.
        if not replay or batch.new_rows or changes.shape[1] > total:
            self._apply(changes)
            changes = changes[:, :0]
        if not total:
            return CudaStep(self.mailbox, np.empty(0, np.int64), 0, None, [], [])
        if replay:
            assert self.graphs is not None
            order = np.argsort(-batch.start, kind="stable")  # longest first, so that the last to be attended are short
            tokens, logits = self.graphs.run(
                batch.rows[order], batch.start[order], changes, kind, self.mailbox, adapted=self._adapted(batch)
            )
            reports: list[sampler.Report] = []
            if kind == sampler.SPECIAL:
                tokens, reports = self._sample(logits, order, batch)
            return CudaStep(self.mailbox, order, total, tokens, reports, [])
        return self._eager(batch)

    def _changes(self, batch: Batch) -> np.ndarray:
        """What of the device's state this step changes: (place in the flat state, value), int32 [2, n]."""
        state = self.state
        width, pages = state.tokens.shape[1], state.blocks.shape[1]
        blocks_at, settings_at = state.tokens.numel(), state.tokens.numel() + state.blocks.numel()
        adapters_at = settings_at + state.settings.numel()
        places = [blocks_at + batch.block_rows * pages + batch.block_slots]
        values = [batch.block_ids]
        for new in batch.new_rows:
            places.append(new.row * width + np.arange(len(new.tokens)))
            values.append(new.tokens)
            places.append(settings_at + new.row * sampling.SETTINGS + np.arange(sampling.SETTINGS))
            values.append(sampler.settings(self.rows, new.row))
            if self.max_adapters:
                places.append(np.array([adapters_at + new.row]))
                values.append(np.array([new.adapter]))
        return np.stack([np.concatenate(places), np.concatenate(values)]).astype(np.int32)

    def _apply(self, changes: np.ndarray) -> None:
        if changes.shape[1]:
            layers.scatter(self.state.flat, self.mailbox.send(changes.reshape(-1)).view(2, -1))

    def _adapted(self, batch: Batch) -> bool:
        return bool(self.rows.adapter[batch.rows].any())

    def _wants_prompt_logprobs(self, batch: Batch) -> bool:
        return bool((self.rows.prompt_logprobs[batch.rows] >= 0).any())

    def _eager(self, batch: Batch) -> CudaStep:
        """Any step: prefills, chunks, decodes among them, prompt log-probabilities."""
        order = np.lexsort((-batch.start, batch.count > 1))  # sequences of one token first, the longest of them first
        rows, start, count = batch.rows[order], batch.start[order].astype(np.int64), batch.count[order].astype(np.int64)
        sample = batch.sample[order]
        decoding = int((count == 1).sum())
        last = np.cumsum(count) - 1
        positions = np.arange(count.sum()) + np.repeat(start - (last + 1 - count), count)
        token_rows = np.repeat(rows, count)

        fresh = self._fresh(start, count)
        tiled = np.setdiff1d(np.arange(decoding, len(rows)), fresh)
        offset = last + 1 - count
        scored, targets, owner = self._scored(order, rows, start, count, offset)
        step = HostStep(
            rows=token_rows,
            positions=positions,
            decoding=decoding,
            tiles=prefill_attention.tiles(start[tiled], count[tiled], self.decoder.queries),
            sequences=np.stack([part[tiled] for part in (rows, start, count, offset)]),
            picks=np.concatenate([last[sample], scored]),
        )
        mixed = None
        if self.graphs is not None and not len(fresh) and not len(scored):
            mixed = self.graphs.mixed_for(decoding, len(token_rows), len(tiled), adapted=self._adapted(batch))
        if mixed is not None:
            assert self.graphs is not None
            logits = self.graphs.run_mixed(mixed, mixed.words_of(step), self.mailbox)
            chosen = order[sample]
            tokens, reports = self._sample(logits[: len(chosen)], chosen, batch) if len(chosen) else (None, [])
            return CudaStep(self.mailbox, chosen, len(batch.rows), tokens, reports, [])

        parts = [token_rows, positions, step.tiles, step.sequences, step.picks]
        parts += [rows[sample], (start + count - 1)[sample], targets]
        sent = self.mailbox.send(np.concatenate([part.reshape(-1) for part in parts]).astype(np.int32))
        (
            sent_rows, sent_positions, sent_tiles, sent_sequences, sent_picks, sampled_rows, sampled_at, sent_targets,
        ) = sent.split([part.size for part in parts])  # fmt: skip
        unit = prefill_attention.FRESH_STEP
        there = StepTensors(
            rows=sent_rows,
            positions=sent_positions,
            decoding=decoding,
            tiles=sent_tiles.view(2, -1) if len(tiled) else None,
            sequences=sent_sequences.view(4, -1) if len(tiled) else None,
            fresh=[(int(offset[i]), int(count[i]), -(-int(count[i]) // unit) * unit) for i in fresh],
            picks=sent_picks,
            adapted=self._adapted(batch),
        )
        hidden = self.decoder.forward(there, self.state)
        chosen = order[sample]
        tokens, reports, prompt_reports = None, [], []
        if len(chosen):
            logits = self.decoder.logits(hidden[: len(chosen)])
            tokens, reports = self._sample(logits, chosen, batch, sampled_rows, sampled_at)
        for begin in range(0, len(scored), sampler.LOGIT_ROWS):
            cut = slice(begin, begin + sampler.LOGIT_ROWS)
            logits = self.decoder.logits(hidden[len(chosen) :][cut])
            k = self.rows.prompt_logprobs[batch.rows[owner[cut]]]
            prompt_reports.append(sampler.report(logits, sent_targets[cut], owner[cut], k))
        return CudaStep(self.mailbox, chosen, len(batch.rows), tokens, reports, prompt_reports)

    def _fresh(self, start: np.ndarray, count: np.ndarray) -> np.ndarray:
        """Which sequences are whole long prompts that cuDNN can take."""
        able = self._on_gpu and self.dtype != torch.float32
        able = able and all(prefill_attention.takes_fresh(layer.mixer) for layer in self.spec.layers)
        long = (start == 0) & (count >= prefill_attention.FRESH)
        return np.flatnonzero(long) if able else np.empty(0, np.int64)

    def _scored(
        self, order: np.ndarray, rows: np.ndarray, start: np.ndarray, count: np.ndarray, offset: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Tokens of the step that predict a prompt token whose log-probability is asked for.

        (their numbers in the step, the token each predicts, the sequence's number in the batch), int64 [Q] each.
        """
        asked = self.rows.prompt_logprobs[rows] >= 0
        end = np.minimum(start + count, self.rows.prompt_len[rows] - 1)
        length = np.where(asked, np.maximum(end - start, 0), 0)
        sequence = np.repeat(np.arange(len(rows)), length)
        within = np.arange(length.sum()) - np.repeat(np.cumsum(length) - length, length)
        targets = self.rows.tokens[rows[sequence], start[sequence] + within + 1]
        return offset[sequence] + within, targets.astype(np.int64), order[sequence]

    def _sample(
        self,
        logits: torch.Tensor,
        chosen: np.ndarray,
        batch: Batch,
        rows: torch.Tensor | None = None,
        positions: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, list[sampler.Report]]:
        """Sample outside a graph for the batch's sequences `chosen` [S]; rows, positions: theirs on the device."""
        host_rows, at = batch.rows[chosen], (batch.start + batch.count)[chosen]
        if rows is None or positions is None:
            rows, positions = self.mailbox.send(np.concatenate([host_rows, at - 1]).astype(np.int32)).view(2, -1)
        kind = sampler.kind_of(self.rows, host_rows, at) if batch.masks is None else sampler.SPECIAL
        asked = np.flatnonzero(self.rows.logprobs[host_rows] >= 0)
        raw = None
        if kind == sampler.SPECIAL:
            index = self.mailbox.send(asked.astype(np.int32)).long()
            raw = logits[index] if len(asked) else None
            wants = self.rows.sampling(host_rows, at, masks_of(batch, chosen))
            sampler.adjust(logits, self.rows, host_rows, wants, self.state.tokens, self.mailbox)
        tokens = sampling.sample(
            logits, rows, positions, self.state.settings, self.state.tokens,
            greedy=kind == sampler.GREEDY, cut=kind in (sampler.CUT, sampler.SPECIAL),
        )  # fmt: skip
        if raw is None:
            return tokens, []
        return tokens, [sampler.report(raw, tokens[index], chosen[asked], self.rows.logprobs[host_rows[asked]])]

    @torch.inference_mode()
    def let_go(self) -> None:
        """Stop waiting for other ranks, one of which is lost: what is under way ends, and means nothing."""
        memory = None if self.decoder.ranks is None else self.decoder.ranks.memory
        if memory is not None:
            with torch.cuda.stream(torch.cuda.Stream(self.device)):
                memory.let_go()

    def close(self) -> None:
        """Free weights, KV and graphs. The runner cannot be used afterwards."""
        if self._on_gpu:
            torch.cuda.synchronize()
        if self.graphs is not None:
            self.graphs.close()
        self.graphs = None
        del self.decoder, self.state
        self.group.close()
        if self._on_gpu:
            torch.cuda.empty_cache()


class CudaStep:
    """A step under way: its results are on their way to pinned memory."""

    def __init__(
        self,
        mailbox: Mailbox,
        sequences: np.ndarray,
        batch_size: int,
        tokens: torch.Tensor | None,
        reports: list[sampler.Report],
        prompt_reports: list[sampler.Report],
    ):
        """tokens int32 [S or more] on the device, of the batch's `sequences` [S]."""
        self.sequences, self.batch_size = sequences, batch_size
        self.reports, self.prompt_reports = reports, prompt_reports
        self.tokens = None if tokens is None else to_host(tokens)
        self.done = None
        if mailbox.device.type == "cuda":
            self.done = torch.cuda.Event()
            self.done.record()

    def result(self) -> StepResult:
        if self.done is not None:
            self.done.synchronize()
        tokens = np.full(self.batch_size, -1, np.int32)
        if self.tokens is not None:
            tokens[self.sequences] = self.tokens[: len(self.sequences)].numpy()
        prompt: dict[int, list] = {}
        for part in self.prompt_reports:
            for owner, entry in part.entries():
                prompt.setdefault(owner, []).append(entry)
        return StepResult(tokens, {o: entry for part in self.reports for o, entry in part.entries()}, prompt)


def _state(spec: DecoderSpec, memory: MemoryPlan, device: torch.device, dtype: torch.dtype) -> State:
    rows, width = memory.max_rows, memory.max_model_len + 1
    pages = -(-memory.max_model_len // memory.block_size)
    sizes = [rows * width, rows * pages, rows * sampling.SETTINGS, rows]
    flat = torch.zeros(sum(sizes), dtype=torch.int32, device=device)
    tokens, blocks, settings, adapters = flat.split(sizes)
    specs = list(dict.fromkeys(layer.mixer for layer in spec.layers))
    scaled = dtype == torch.float8_e4m3fn

    def kept(*shape: int, dtype: torch.dtype) -> torch.Tensor:
        return torch.zeros(2, memory.num_blocks, *shape, dtype=dtype, device=device)

    return State(
        flat=flat,
        tokens=tokens.view(rows, width),
        blocks=blocks.view(rows, pages),
        settings=settings.view(rows, sampling.SETTINGS),
        adapters=adapters,
        caches=[
            kept(layer.mixer.kv_heads, memory.block_size, layer.mixer.head_dim, dtype=dtype) for layer in spec.layers
        ],
        scales=[
            kept(layer.mixer.kv_heads, memory.block_size, dtype=torch.float32) if scaled else None
            for layer in spec.layers
        ],
        room=decode_attention.scratch(specs, device),
    )


def _kv_dtype(options: LoadOptions, dtype: torch.dtype) -> torch.dtype:
    offered = ("bf16", "fp8") if dtype == torch.bfloat16 else ("fp8",)
    asked = kv_dtype(options, f"the CUDA runner, computing in {str(dtype).removeprefix('torch.')},", *offered)
    return torch.float8_e4m3fn if asked == "fp8" else dtype


def _device(asked: str) -> torch.device:
    if asked == "cpu":
        return torch.device("cpu")
    if asked != "auto" and not asked.startswith("cuda"):
        raise UsageError(f"device {asked!r}: this runner takes cuda", param="device")
    if not torch.cuda.is_available():
        raise BackendUnavailable("no CUDA device is here; --device cpu runs without one", param="device")
    return torch.device("cuda" if asked == "auto" else asked)


def _free_memory(device: torch.device) -> int:
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else 1 << 30
