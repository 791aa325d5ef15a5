"""A runner whose network is a hash of the context, read back from the KV blocks through the block table.

A block that is shared, copied, reused or freed wrongly changes what is read, hence the token: a scheduler bug shows as
a wrong answer, not only as a broken invariant. An adapter is a tag, written into the KV of what is computed with it.
Of a recurrence (`MemoryPlan.snapshots`) a row's state is the context itself, and blocks hold copies of it.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass

import numpy as np

from martlet.runners.base import Batch, MemoryPlan, StepResult

VOCAB = 97


@dataclass(frozen=True, eq=False)
class FakeAdapter:
    """tag: 0 is the base model's. broken: cannot be put into a slot."""

    tag: int
    broken: bool = False


def next_token(context: np.ndarray, seed: int, mask: np.ndarray | None = None) -> int:
    """The token that follows `context`: what the fake network 'computes', or the next one that the mask allows."""
    token = zlib.crc32(np.ascontiguousarray(context, np.int32).tobytes(), seed & 0xFFFFFFFF) % VOCAB
    if mask is None:
        return token
    allowed = np.flatnonzero(np.unpackbits(mask.view(np.uint8), bitorder="little")[:VOCAB])
    return int(allowed[np.searchsorted(allowed, token) % len(allowed)])


class FakeRunner:
    """lag 0 computes in `launch`; lag 1 also computes in launch order but hands results over one step late."""

    vocab_size = VOCAB

    def __init__(
        self,
        memory: MemoryPlan,
        *,
        lag: int = 0,
        max_step_tokens: int = 64,
        max_prefill_tokens: int = 64,
        max_adapters: int = 0,
    ):
        self.memory, self.lag = memory, lag
        self.max_step_tokens, self.max_prefill_tokens = max_step_tokens, max_prefill_tokens
        self.max_drafts = 0 if lag or memory.snapshots else 8
        self.states: list[np.ndarray | None] = [None] * memory.max_rows
        self.snapshots: list[np.ndarray | None] = [None] * memory.num_blocks
        self.kv = np.full((memory.num_blocks, memory.block_size), -1, np.int32)
        self.tokens = np.full((memory.max_rows, memory.max_model_len + 1), -1, np.int32)
        self.tables = np.full((memory.max_rows, -(-memory.max_model_len // memory.block_size)), -1, np.int32)
        self.seeds = [0] * memory.max_rows
        self.max_adapters = max_adapters
        self.slots = {0: FakeAdapter(0)}
        self.adapters = [0] * memory.max_rows
        self.fail_next = False
        self.poison: int | None = None  # a step that computes a row that begins with this token raises, at its end
        self.under_way = 0
        self.tokens_computed = 0

    def load_adapter(self, slot: int, adapter: FakeAdapter) -> None:
        assert 1 <= slot <= self.max_adapters, "no such slot"
        if adapter.broken:
            raise RuntimeError("injected failure of a load")
        self.slots[slot] = adapter

    def launch(self, batch: Batch):
        self.under_way += 1
        try:
            return self._launch(batch)
        except BaseException:
            self.under_way -= 1
            raise

    def _launch(self, batch: Batch):
        assert self.under_way <= self.lag + 1, "more steps in flight than the runner allows"
        if self.fail_next:
            self.fail_next = False
            raise RuntimeError("injected failure")
        assert len(np.unique(batch.rows)) == len(batch.rows), "a row twice in a step"
        for new in batch.new_rows:
            self.tokens[new.row], self.tables[new.row] = -1, -1
            self.tokens[new.row, : len(new.tokens)] = new.tokens
            self.seeds[new.row], self.adapters[new.row] = new.seed, new.adapter
        self.tables[batch.block_rows, batch.block_slots] = batch.block_ids
        if len(batch.copies):
            self.kv[batch.copies[:, 1]] = self.kv[batch.copies[:, 0]]
        width = 0 if batch.drafts is None else batch.drafts.shape[1]
        guessed = np.zeros(len(batch.rows), int) if batch.drafts is None else (batch.drafts >= 0).sum(1)
        for b in np.flatnonzero(guessed):
            end = batch.start[b] + batch.count[b]
            self.tokens[batch.rows[b], end - guessed[b] : end] = batch.drafts[b, : guessed[b]]
        for row, start, count in zip(batch.rows, batch.start, batch.count, strict=True):
            fresh = self.tokens[row, start : start + count]
            assert len(fresh) >= 1 and (fresh >= 0).all(), "a token is computed before it is known"
        contexts = self._states_after(batch) if self.memory.snapshots else self._kv_after(batch)
        self.tokens_computed += batch.num_tokens
        if self.poison is not None and (self.tokens[batch.rows, 0] == self.poison).any():
            raise RuntimeError("injected poison")
        sampled = np.full((len(batch.rows), 1 + width), -1, np.int32)
        masks = dict(zip(batch.masks.entries.tolist(), batch.masks.wait(), strict=True)) if batch.masks else {}
        for b in np.flatnonzero(batch.sample):
            row, known = batch.rows[b], len(contexts[b]) - guessed[b]
            for i in range(guessed[b] + 1):
                token = next_token(contexts[b][: known + i], self.seeds[row], masks.get(int(b)))
                right = i < guessed[b] and token == batch.drafts[b, i]
                sampled[b, i] = self.tokens[row, known + i] = token
                if not right:
                    break
        return _Result(self, StepResult(sampled if width else sampled[:, 0]))

    def _kv_after(self, batch: Batch) -> list[np.ndarray]:
        """Each sequence's context, written to and read back from the blocks."""
        size = self.memory.block_size
        for row, start, count in zip(batch.rows, batch.start, batch.count, strict=True):
            at = np.arange(start, start + count)
            tagged = self.tokens[row, at] + VOCAB * self.slots[self.adapters[row]].tag
            self.kv[self.tables[row, at // size], at % size] = tagged
        read = [np.arange(end) for end in batch.start + batch.count]  # after all writes
        return [self.kv[self.tables[row, at // size], at % size] for row, at in zip(batch.rows, read, strict=True)]

    def _states_after(self, batch: Batch) -> list[np.ndarray]:
        """Each sequence's context, from its row's state or a snapshot, with snapshots taken where they are due."""
        size = self.memory.block_size
        assert not len(batch.copies) and batch.drafts is None, "a recurrence knows neither copies nor guesses"
        for new in batch.new_rows:
            self.states[new.row] = None
        for row, start in zip(batch.rows, batch.start, strict=True):  # all reads before all writes
            state = self.states[row]
            if state is None or len(state) != start:
                assert start % size == 0, "a state is asked for that nobody kept"
                empty = np.empty(0, np.int32)
                self.states[row] = self.snapshots[self.tables[row, start // size - 1]] if start else empty
        for row, start, count in zip(batch.rows, batch.start, batch.count, strict=True):
            tagged = self.tokens[row, start : start + count] + VOCAB * self.slots[self.adapters[row]].tag
            self.states[row] = np.append(self.states[row], tagged)
        for row, slot, block in zip(batch.block_rows, batch.block_slots, batch.block_ids, strict=True):
            for b in np.flatnonzero(batch.rows == row):
                if batch.start[b] < (slot + 1) * size <= batch.start[b] + batch.count[b]:
                    self.snapshots[block] = self.states[row][: (slot + 1) * size]
        return [self.states[row] for row in batch.rows]

    def close(self) -> None:
        self.kv = None


class LateRunner(FakeRunner):
    """Computes a step when the next one is launched, when it is lent a thread or when it is asked: as the CPU runner
    does, whose results any write of Python's to what a step under way reads would change. Lag 1."""

    def __init__(self, memory: MemoryPlan, **options):
        super().__init__(memory, lag=1, **options)
        self.max_drafts = 0 if memory.snapshots else 8
        self.current: _LateStep | None = None
        self.helped = 0

    def load_adapter(self, slot: int, adapter: FakeAdapter) -> None:
        self.finish()
        super().load_adapter(slot, adapter)

    def launch(self, batch: Batch):
        self.finish()
        if self.fail_next:
            self.fail_next = False
            raise RuntimeError("injected failure")
        self.under_way += 1
        step = self.current = _LateStep(self, batch)
        if batch.masks is not None:
            self.finish()
            if step.failure is not None:
                step.result()
        return step

    def help(self, to_the_end: bool) -> None:
        self.helped += 1
        if to_the_end or self.helped % 2:  # else the next launch does it
            self.finish()

    def finish(self) -> None:
        if (step := self.current) is not None:
            self.current = None
            step.compute()


class _LateStep:
    def __init__(self, runner: LateRunner, batch: Batch):
        self.runner, self.batch, self.given = runner, batch, self._numbers(batch)
        self.value: StepResult | None = None
        self.failure: Exception | None = None

    @staticmethod
    def _numbers(batch: Batch) -> list[list]:
        arrays = (batch.rows, batch.start, batch.count, batch.sample, batch.drafts, batch.block_rows, batch.block_slots)
        arrays += (batch.block_ids, batch.copies, *(new.tokens for new in batch.new_rows))
        return [[] if array is None else array.tolist() for array in arrays]

    def compute(self) -> None:
        runner, batch = self.runner, self.batch
        assert self._numbers(batch) == self.given, "a batch was changed after its launch"
        later, runner.fail_next = runner.fail_next, False
        try:
            self.value = runner._launch(batch).value
        except RuntimeError as error:  # the next step may be on its way, with whatever this one left as its tokens
            self.failure = error
            runner.tokens[batch.rows, batch.start + batch.count] = 0
        runner.fail_next = later

    def result(self) -> StepResult:
        if self.runner.current is self:
            self.runner.finish()
        self.runner.under_way -= 1
        if self.failure is not None:
            raise self.failure
        return self.value


class _Result:
    def __init__(self, runner: FakeRunner, value: StepResult):
        self.runner, self.value = runner, value

    def result(self) -> StepResult:
        self.runner.under_way -= 1
        return self.value


def expected_tokens(prompt, seed: int, limit: int, end_ids=(), tag: int = 0, mask=lambda output: None) -> list[int]:
    """What a request must answer, whatever else runs beside it. tag: of its adapter."""
    context = list(prompt)
    while len(context) < len(prompt) + limit:
        context.append(next_token(np.array(context, np.int32) + VOCAB * tag, seed, mask(context[len(prompt) :])))
        if context[-1] in end_ids:
            break
    return context[len(prompt) :]
