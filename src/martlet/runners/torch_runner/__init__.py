"""The runner on torch: every operation through the table, so one file serves any device torch knows."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator

import numpy as np
import torch

from martlet.errors import BackendUnavailable, UsageError
from martlet.hub.card import ModelCard
from martlet.hub.checkpoint import Tensor, open_checkpoint
from martlet.hub.dummy import DummyCheckpoint
from martlet.kernels import ops_for
from martlet.kernels.ops import Layout, Plan
from martlet.model import weights
from martlet.model.adapters import Adapter
from martlet.model.shard import split
from martlet.model.spec import Attention, DecoderSpec, Mixer
from martlet.runners import machine
from martlet.runners.base import Batch, Done, LoadOptions, StepResult, TokenLogprobs
from martlet.runners.rows import Rows, masks_of
from martlet.runners.sizing import kv_dtype, plan_memory
from martlet.runners.torch_runner.adapters import Groups, Layers, upload
from martlet.runners.torch_runner.collectives import Alone, Collectives
from martlet.runners.torch_runner.decoder import Decoder
from martlet.runners.torch_runner.recurrence import States
from martlet.runners.torch_runner.rounding import LINEARS_AND_TABLES, dtype_of, rounded

__all__ = ["TorchRunner", "default_device"]

log = logging.getLogger("martlet")

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
DEFAULT_ROWS = 64
STEP_TOKENS = 256
LOGIT_ROWS = 128  # most rows of prompt logits at once: 25 MB for a vocabulary of 49,152


class TorchRunner:
    """Runs one model with torch. Computes at once, so its lag is 0. Contract: martlet.runners.base.Runner."""

    lag = 0
    max_drafts = 0

    def __init__(
        self,
        card: ModelCard,
        options: LoadOptions,
        progress: Callable[[int, int], None] | None = None,
        ranks: Collectives | None = None,
    ):
        """Load `card`, or the share of one of the `ranks` that run it together.

        progress(done, total) is called for each parameter. Raises any of martlet.errors.
        """
        kv_dtype(options, "the torch runner")
        self.ranks = ranks or Alone()
        self.device = _device(options.device)
        if self.device == "cpu":
            torch.set_num_threads(max(1, machine.usable_cores() // self.ranks.size))
        began = time.perf_counter()
        self.spec = spec = split(weights.read_spec(card), self.ranks.rank, self.ranks.size)
        blocks = 4 * weights.num_parameters(spec) if card.format == "gguf" else 0
        self.dtype, reason = _dtype(dtype_of(options.quant, options.dtype, self.device), self.device, blocks)
        self.ops = ops_for(self.device)
        with torch.inference_mode():
            checkpoint = DummyCheckpoint(options.seed) if card.format == "dummy" else open_checkpoint(card)
            try:
                stream = _counted(rounded(weights.load(card, spec, checkpoint), spec, options.quant), spec, progress)
                self.decoder = Decoder(spec, stream, self.ops, self.device, self.dtype, self.ranks)
            finally:
                checkpoint.close()
            if options.quant in LINEARS_AND_TABLES:
                log.info("weights are rounded to %s and kept as floats", options.quant)
            log.info(
                "loaded %s in %.2f s: %s, torch on %s, %d threads, %s (%s)",
                card.name,
                time.perf_counter() - began,
                f"{weights.num_parameters(spec) / 1e6:.1f} M parameters",
                self.device,
                torch.get_num_threads(),
                str(self.dtype).removeprefix("torch."),
                reason,
            )
            self.memory = plan_memory(
                spec,
                options,
                free=self.ranks.least(_free_memory(self.device) // (self.ranks.size if self.device == "cpu" else 1)),
                weights=self.decoder.weight_bytes,
                element_size=self.dtype.itemsize,
                default_rows=DEFAULT_ROWS,
            )
            self.vocab_size = spec.vocab_size
            self.max_step_tokens = self.max_prefill_tokens = STEP_TOKENS
            self.rows = Rows(self.memory, spec.vocab_size)
            self.mixers = list(dict.fromkeys(layer.mixer for layer in spec.layers))
            self.states = None
            if spec.recurrent:
                self.states = States(spec, self.memory, self.device)
            self.caches = [self._cache(layer.mixer) for layer in spec.layers if isinstance(layer.mixer, Attention)]
            self.rotations = {
                rope: self.ops.rotation(rope, self.memory.max_model_len, self.device)
                for rope in {mixer.rope for mixer in self.mixers if isinstance(mixer, Attention)}
            }
            self.max_adapters = options.max_adapters
            self.adapters: dict[int, Layers] = {}  # by slot

    def _cache(self, attention: Attention) -> torch.Tensor:
        """Zeros. On CPU from the allocator's untouched pages, so that memory is taken only as it is written."""
        shape = (self.memory.num_blocks, self.memory.block_size, 2, attention.kv_heads, attention.head_dim)
        if self.device != "cpu":
            return torch.zeros(shape, dtype=self.dtype, device=self.device)
        plain = np.zeros(shape, {2: np.int16, 4: np.int32}[self.dtype.itemsize])
        return torch.from_numpy(plain).view(self.dtype)

    @torch.inference_mode()
    def load_adapter(self, slot: int, adapter: Adapter) -> None:
        self.adapters[slot] = upload(adapter, self.spec, self.device, self.dtype)

    @torch.inference_mode()
    def launch(self, batch: Batch) -> Done:
        self.rows.apply(batch)
        if len(batch.copies):
            source, target = (self._tensor(column) for column in batch.copies.T)
            for cache in self.caches:
                self.ops.copy_blocks(cache, source, target)
        if not len(batch.rows):
            return Done(StepResult(np.empty(0, np.int32)))
        layout, ids = self.rows.layout(batch)
        plans = self._recurrence(batch, layout) if self.states else self._attention(layout)
        sampled, last = np.flatnonzero(batch.sample), np.cumsum(layout.count) - 1
        scored = self._prompt_positions(batch)  # token numbers whose prompt logprobs are asked for
        wanted = np.concatenate([last[sampled], scored])
        slots = self.rows.adapter[batch.rows]
        groups = Groups(np.repeat(slots, layout.count), self.adapters, self.device) if slots.any() else None
        memory = self.states.layers if self.states else self.caches
        hidden = self.decoder.forward(self._tensor(ids), plans, memory, self._tensor(wanted), groups)

        tokens = np.full(len(batch.rows), -1, np.int32)
        logprobs: dict[int, TokenLogprobs] = {}
        if len(sampled):
            rows, position = batch.rows[sampled], (layout.start + layout.count)[sampled]
            masks = masks_of(batch, sampled)
            tokens[sampled], logprobs = self._sample(hidden[: len(sampled)], rows, position, sampled, masks)
            self.rows.tokens[rows, position] = tokens[sampled]
        prompt = self._prompt_logprobs(hidden[len(sampled) :], scored, batch, layout.positions) if len(scored) else {}
        if self.states:
            self.states.slots.end(batch)
        return Done(StepResult(tokens, logprobs, prompt))

    def _attention(self, layout: Layout) -> dict[Mixer, Plan]:
        return {
            mixer: self.ops.plan(layout, mixer, self.rotations[mixer.rope], self.dtype)
            for mixer in self.mixers
            if isinstance(mixer, Attention)
        }

    def _recurrence(self, batch: Batch, layout: Layout) -> dict[Mixer, Plan]:
        """One plan for all layers; the rows' states are brought to where the step begins."""
        states = self.states
        assert states is not None
        states.begin(batch, self.rows.blocks)
        kept = states.slots.snapshots(batch)
        chunk = 1 if any(mixer.generation == 7 for mixer in self.mixers) else STEP_TOKENS
        plan = self.ops.recurrence_plan(layout, batch.rows, kept, chunk, self.device)
        return dict.fromkeys(self.mixers, plan)

    def _sample(
        self,
        hidden: torch.Tensor,
        rows: np.ndarray,
        position: np.ndarray,
        sequences: np.ndarray,
        masks: tuple[np.ndarray, np.ndarray] | None,
    ) -> tuple[np.ndarray, dict[int, TokenLogprobs]]:
        logits = self.decoder.logits(hidden)
        asked = np.flatnonzero(self.rows.logprobs[rows] >= 0)
        raw = logits[self._tensor(asked)] if len(asked) else None
        tokens = self.ops.sample(logits, self.rows.sampling(rows, position, masks))
        found: list[TokenLogprobs] = []
        if raw is not None:
            found = self._report(raw, tokens[self._tensor(asked)], self.rows.logprobs[rows[asked]])
        return tokens.cpu().numpy(), dict(zip(sequences[asked].tolist(), found, strict=True))

    def _prompt_positions(self, batch: Batch) -> np.ndarray:
        """Numbers, in the step, of tokens that predict a prompt token whose logprobs are asked for; int64 [Q]."""
        asked = self.rows.prompt_logprobs[batch.rows] >= 0
        if not asked.any():
            return np.empty(0, np.int64)
        end = np.minimum(batch.start + batch.count, self.rows.prompt_len[batch.rows] - 1)
        length = np.where(asked, np.maximum(end - batch.start, 0), 0)
        first = np.cumsum(batch.count) - batch.count
        return np.arange(length.sum()) + np.repeat(first - (np.cumsum(length) - length), length)

    def _prompt_logprobs(
        self, hidden: torch.Tensor, scored: np.ndarray, batch: Batch, positions: np.ndarray
    ) -> dict[int, list[TokenLogprobs]]:
        sequence = np.repeat(np.arange(len(batch.rows)), batch.count)[scored]
        rows = batch.rows[sequence]
        targets = self.rows.tokens[rows, positions[scored] + 1]
        found: dict[int, list[TokenLogprobs]] = {}
        for cut in range(0, len(scored), LOGIT_ROWS):
            part = slice(cut, cut + LOGIT_ROWS)
            logits = self.decoder.logits(hidden[part])
            entries = self._report(logits, self._tensor(targets[part]), self.rows.prompt_logprobs[rows[part]])
            for owner, entry in zip(sequence[part].tolist(), entries, strict=True):
                found.setdefault(owner, []).append(entry)
        return found

    def _report(self, logits: torch.Tensor, tokens: torch.Tensor, k: np.ndarray) -> list[TokenLogprobs]:
        """One entry a row of logits; row i gets its k[i] likeliest tokens."""
        columns = self.ops.logprobs(logits, tokens, int(k.max()))
        logprob, rank, ids, top = (column.cpu().numpy() for column in columns)
        chosen = zip(tokens.tolist(), logprob.tolist(), rank.tolist(), k.tolist(), strict=True)
        return [
            TokenLogprobs(token, value, place, ids[i, :n].astype(np.int32), top[i, :n])
            for i, (token, value, place, n) in enumerate(chosen)
        ]

    def _tensor(self, array: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(np.ascontiguousarray(array, dtype=np.int64)).to(self.device)

    def close(self) -> None:
        """Free weights and cache. The runner cannot be used afterwards."""
        self.caches.clear()
        self.states = None
        self.decoder.blocks.clear()
        self.adapters.clear()
        self.ranks.close()


def _counted(
    stream: Iterator[tuple[str, Tensor]], spec: DecoderSpec, progress: Callable[[int, int], None] | None
) -> Iterator[tuple[str, Tensor]]:
    total = sum(1 for _ in weights.parameters(spec))
    for done, item in enumerate(stream, 1):
        yield item
        if progress is not None:
            progress(done, total)


def default_device() -> str:
    """What "auto" means: "cuda" where torch has it, else "cpu"."""
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return "cuda" if accelerator is not None and accelerator.type == "cuda" else "cpu"


def count_gpus() -> int:
    """GPUs that CUDA shows this process."""
    return torch.cuda.device_count()


def _device(asked: str) -> str:
    """A torch device that is there."""
    if asked == "auto":
        return default_device()
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if asked == "cpu" or (accelerator is not None and asked.split(":")[0] == accelerator.type):
        return asked
    there = "the CPU" if accelerator is None else f"the CPU and {accelerator.type}"
    raise BackendUnavailable(f"device {asked!r} is not here; torch {torch.__version__} sees {there}", param="device")


def _dtype(asked: str, device: str, blocks: int = 0) -> tuple[torch.dtype, str]:
    """The dtype to compute in, and why. bfloat16 halves the bytes a decoding step reads: with hardware for it, up to
    twice as fast as float32 at batch 1; without, slower.

    blocks: bytes in float32 of weights that come in blocks of integers, else 0. The C++ kernels keep to those blocks,
    so float32 answers as they do; what bfloat16 rounds can turn a close choice around.
    """
    if asked in DTYPES:
        return DTYPES[asked], "as asked"
    if asked != "auto":
        raise UsageError(f"dtype {asked!r} is none of auto, {', '.join(DTYPES)}", param="dtype")
    if device != "cpu":
        return torch.bfloat16, "default of the device"
    if blocks and blocks < machine.free_memory() // 2:
        return torch.float32, "weights from blocks of integers"
    if machine.has_fast_bfloat16():
        return torch.bfloat16, "this CPU multiplies bfloat16"
    return torch.float32, "this CPU does not multiply bfloat16"


def _free_memory(device: str) -> int:
    return machine.free_memory() if device == "cpu" else torch.accelerator.get_memory_info(device)[0]
