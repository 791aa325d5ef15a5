"""What a runner keeps of each row between steps, in host memory: token ids, block table, sampling settings.

The engine sends changes (`Batch`), and this turns a step into flat arrays: a Layout for attention, a Sampling for the
sampler. Plain numpy, so runners with and without torch can share it.
"""

from __future__ import annotations

import numpy as np

from martlet.kernels.ops import Layout, Penalties, Sampling
from martlet.runners.base import Batch, MemoryPlan, NewRow


class Rows:
    """Rows 0 ... memory.max_rows - 1. tokens: int32 [rows, max_model_len + 1]. blocks: int32 [rows, blocks a row]."""

    def __init__(self, memory: MemoryPlan, vocab_size: int):
        rows = memory.max_rows
        self.block_size, self.vocab_size = memory.block_size, vocab_size
        self.tokens = np.zeros((rows, memory.max_model_len + 1), np.int32)
        self.blocks = np.zeros((rows, -(-memory.max_model_len // memory.block_size)), np.int32)
        self.prompt_len = np.zeros(rows, np.int64)
        self.seed = np.zeros(rows, np.uint64)
        self.temperature, self.top_p, self.min_p = (np.zeros(rows, np.float32) for _ in range(3))
        self.repetition, self.presence, self.frequency = (np.zeros(rows, np.float32) for _ in range(3))
        self.top_k, self.min_tokens = np.zeros(rows, np.int64), np.zeros(rows, np.int64)
        self.logprobs, self.prompt_logprobs = np.full(rows, -1), np.full(rows, -1)  # -1: not asked for
        self.penalised = np.zeros(rows, bool)
        self.adapter = np.zeros(rows, np.int32)  # slot, 0 for none
        self.end_ids: dict[int, np.ndarray] = {}  # only rows with min_tokens
        self.bias: dict[int, tuple[np.ndarray, np.ndarray]] = {}
        self.allowed: dict[int, np.ndarray] = {}

    def apply(self, batch: Batch) -> None:
        """Take in the rows and block table entries that change with this step."""
        for new in batch.new_rows:
            self._enter(new)
        self.blocks[batch.block_rows, batch.block_slots] = batch.block_ids

    def _enter(self, new: NewRow) -> None:
        row, params = new.row, new.params
        self.tokens[row, : len(new.tokens)] = new.tokens
        self.prompt_len[row], self.seed[row] = new.prompt_len, new.seed
        self.temperature[row], self.top_p[row], self.min_p[row] = params.temperature, params.top_p, params.min_p
        self.top_k[row] = params.top_k if 0 < params.top_k < self.vocab_size else 0
        self.repetition[row], self.presence[row] = params.repetition_penalty, params.presence_penalty
        self.frequency[row], self.penalised[row] = params.frequency_penalty, params.has_penalties
        self.logprobs[row] = -1 if params.logprobs is None else params.logprobs
        self.prompt_logprobs[row] = -1 if params.prompt_logprobs is None else params.prompt_logprobs
        self.adapter[row] = new.adapter
        self.min_tokens[row] = params.min_tokens if new.end_ids else 0
        for table in (self.end_ids, self.bias, self.allowed):
            table.pop(row, None)
        if self.min_tokens[row]:
            self.end_ids[row] = np.array(new.end_ids, np.int64)
        if params.logit_bias:
            ids, values = zip(*params.logit_bias.items(), strict=True)
            self.bias[row] = np.array(ids, np.int64), np.array(values, np.float32)
        if params.allowed_token_ids is not None:
            self.allowed[row] = np.array(params.allowed_token_ids, np.int64)

    def layout(self, batch: Batch) -> tuple[Layout, np.ndarray]:
        """Where the step's tokens lie, and their ids, int64 [N]."""
        start, count = batch.start.astype(np.int64), batch.count.astype(np.int64)
        rows = np.repeat(batch.rows, count)
        positions = np.arange(len(rows)) + np.repeat(start - (np.cumsum(count) - count), count)
        blocks = self.blocks[batch.rows, : -(-int((start + count).max()) // self.block_size)]
        slots = self.blocks[rows, positions // self.block_size] * self.block_size + positions % self.block_size
        layout = Layout(start, count, blocks, positions, slots.astype(np.int64), self.block_size)
        return layout, self.tokens[rows, positions].astype(np.int64)

    def sampling(
        self, rows: np.ndarray, position: np.ndarray, masks: tuple[np.ndarray, np.ndarray] | None = None
    ) -> Sampling:
        """How `rows` [S] choose their tokens number `position` [S]. masks: as in Sampling."""
        short = np.flatnonzero(position - self.prompt_len[rows] < self.min_tokens[rows])
        return Sampling(
            temperature=self.temperature[rows],
            top_k=self.top_k[rows],
            top_p=self.top_p[rows],
            min_p=self.min_p[rows],
            seed=self.seed[rows],
            position=position.astype(np.int64),
            penalties=self._penalties(rows, position),
            bias=_ragged([(i, *self.bias[row]) for i, row in enumerate(rows.tolist()) if row in self.bias]),
            banned=_ragged([(i, self.end_ids[int(rows[i])]) for i in short.tolist()]),
            allowed=_ragged([(i, self.allowed[row]) for i, row in enumerate(rows.tolist()) if row in self.allowed]),
            masks=masks,
        )

    def _penalties(self, rows: np.ndarray, position: np.ndarray) -> Penalties | None:
        chosen = np.flatnonzero(self.penalised[rows])
        if not len(chosen):
            return None
        rows, position = rows[chosen], position[chosen]
        index = np.arange(position.max())
        tokens = np.where(index < position[:, None], self.tokens[rows, : len(index)], -1).astype(np.int64)
        return Penalties(
            rows=chosen,
            tokens=tokens,
            prompt_len=self.prompt_len[rows],
            repetition=self.repetition[rows],
            presence=self.presence[rows],
            frequency=self.frequency[rows],
        )


def masks_of(batch: Batch, sampled: np.ndarray) -> tuple[np.ndarray, np.ndarray] | None:
    """Wait for the step's masks, for a Sampling of the batch's sequences `sampled` [S]."""
    if batch.masks is None:
        return None
    place = np.empty(len(batch.rows), np.int64)
    place[sampled] = np.arange(len(sampled))
    return place[batch.masks.entries], batch.masks.wait()


def _ragged(entries: list[tuple]) -> tuple[np.ndarray, ...] | None:
    """[(row, ids, values ...)] -> flat (rows, ids, values ...); None when there are none."""
    if not entries:
        return None
    rows = np.repeat([row for row, *_ in entries], [len(ids) for _, ids, *_ in entries])
    columns = zip(*(columns for _, *columns in entries), strict=True)
    return rows.astype(np.int64), *(np.concatenate(column) for column in columns)
