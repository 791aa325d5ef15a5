"""Who computes how many tokens in the next step.

There are no phases. A sequence has tokens that are known and tokens that are computed; a step gives each sequence some
of the difference, under a budget. Prefill, chunked prefill, decode, a prefix-cache hit and resumption after preemption
are all that one rule. Sequences run in the order (priority, arrival); memory that runs out is taken from the last.
"""

from __future__ import annotations

import bisect
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

from martlet.engine.adapters import AdapterSlots
from martlet.engine.memory import Found, memory_for
from martlet.engine.ngram import propose
from martlet.engine.sequence import RowTable, Sequence
from martlet.runners.base import Batch, MemoryPlan, NewRow

OVERTAKERS = 32  # sequences with an adapter that may pass one that waits for a slot
GUESSED_STEP_TOKENS = 16  # about where a step on a CPU turns from bound by memory to bound by arithmetic


class Plan(NamedTuple):
    """A batch, and the epochs its rows had: a result counts only for rows that have not changed hands since."""

    batch: Batch
    epochs: np.ndarray


class Scheduler:
    """Owns the queue, the rows and the blocks. Knows nothing of text, networks or devices.

    Between `plan` and `complete` of a step further steps may be planned: a token that is being sampled counts as known.
    """

    def __init__(
        self,
        memory: MemoryPlan,
        max_step_tokens: int,
        max_prefill_tokens: int,
        *,
        prefix_caching: bool = True,
        speculative_tokens: int = 0,
        adapters: AdapterSlots | None = None,
    ):
        self.adapters = adapters or AdapterSlots(0, lambda slot, adapter: None)
        self.refused: list[tuple[Sequence, Exception]] = []  # those whose adapter could not be loaded; the engine's
        self.speculative_tokens = speculative_tokens
        self.max_step_tokens = max_step_tokens
        self.max_prefill_tokens = max_prefill_tokens  # of a step in which nobody decodes
        self.table = RowTable(memory.max_rows, memory.max_model_len)
        self.memory = memory_for(memory, self.table, prefix_caching=prefix_caching)
        self.pool = self.memory.pool
        self.waiting: list[Sequence] = []  # sorted by order
        self.running: list[Sequence] = []  # sorted by order
        self.suspects: list[Sequence] = []  # of a step that failed; see `suspect`
        self.preemptions = self.prefix_queries = self.prefix_hits = 0
        self.guesses = self.guessed_tokens = 0
        self.right_guesses = np.zeros(speculative_tokens, np.int64)  # by their place in the guess
        self._rows = np.empty(0, np.int32)  # rows of `running`; rebuilt when that changes
        self._watermark = max(1, memory.num_blocks // 100)
        self._overtaken = 0  # how many passed the first one that waits for a slot
        self._new_rows: list[NewRow] = []

    def add(self, sequences: Iterable[Sequence]) -> None:
        for seq in sequences:
            bisect.insort(self.waiting, seq, key=_order)

    def remove(self, seq: Sequence) -> None:
        """Take a sequence out for good, wherever it is, and give back what it holds."""
        seq.finished = True
        if seq in self.suspects:
            self.suspects.remove(seq)
        if seq.row >= 0:
            self._stop_running(seq)
        else:
            at = bisect.bisect_left(self.waiting, seq.order, key=_order)
            if at < len(self.waiting) and self.waiting[at] is seq:
                del self.waiting[at]

    def plan(self) -> Plan | None:
        """Decide the next step; None when nothing can be computed now.

        Suspects come first, each in steps of its own. While one cannot run, the others do, but nobody new enters: their
        memory is what it may be waiting for.
        """
        if self.suspects:
            return self._plan(alone=self.suspects[0]) or self._plan(admits=False)
        return self._plan()

    def suspect(self, sequences: Iterable[Sequence]) -> None:
        """A step of these running sequences failed, and one of them may be why: each does its part again, alone."""
        for seq in sequences:
            self._preempt(seq)
            if seq not in self.suspects:
                self.suspects.append(seq)

    def clear(self, plan: Plan) -> None:
        """A step went well: the suspects that it brought up to date are suspects no more."""
        batch = plan.batch
        fine = {self.table.sequences[row] for row in batch.rows[batch.sample & self._is_live(plan)].tolist()}
        self.suspects = [seq for seq in self.suspects if seq not in fine]

    def _is_live(self, plan: Plan) -> np.ndarray:
        return self.table.epoch[plan.batch.rows] == plan.epochs

    def _plan(self, alone: Sequence | None = None, *, admits: bool = True) -> Plan | None:
        table = self.table
        rows = self._running_rows()
        known = table.known[rows]
        going = known < table.limit[rows]
        if table.num_stepwise:
            going &= ~(table.held[rows] | (table.stepwise[rows] & (known > table.arrived[rows])))
        want = (known - table.computed[rows]) * going
        if alone is not None:
            want[rows != alone.row] = 0

        # Decodes first: one token each, so that nobody's stream waits behind a long prompt. Prompts share the rest of
        # the budget in order; a quarter of it is theirs even when decodes alone would fill a step. When nobody decodes,
        # nobody minds a longer step.
        is_decode = want == 1
        decodes = np.count_nonzero(is_decode)
        budget = (
            max(self.max_step_tokens - decodes, self.max_step_tokens // 4, 1) if decodes else self.max_prefill_tokens
        )
        count = want
        if decodes < len(rows):
            queued = np.where(is_decode, 0, want)
            share = np.clip(budget - (np.cumsum(queued) - queued), 0, queued)
            count = np.where(is_decode, 1, share)
            budget -= int(share.sum())
        drafts = self._guess(rows, is_decode)
        if drafts is not None:
            count += (drafts >= 0).sum(1)

        if self._make_room(rows, table.computed[rows] + count):
            count[[table.sequences[row] is None for row in rows]] = 0  # some were preempted
        elif self.waiting and table.num_free and admits and (alone is None or alone.row < 0):
            admitted, counts = self._admit(budget, alone)
            rows, count = np.append(rows, admitted), np.append(count, counts)
            if drafts is not None:
                drafts = np.pad(drafts, ((0, len(admitted)), (0, 0)), constant_values=-1)

        if np.count_nonzero(count) < len(count):
            chosen = np.flatnonzero(count)
            rows, count = rows[chosen], count[chosen]
            drafts = None if drafts is None else drafts[chosen]
        if not len(rows):
            return None
        rows, count = rows.astype(np.int32, copy=False), count.astype(np.int32, copy=False)
        start = table.computed[rows]
        after = start + count
        sample = after >= table.known[rows]
        table.computed[rows] = after
        table.known[rows] += sample
        updates, copies = _columns(self.memory.updates, 3), _columns(self.memory.copies, 2)
        batch = Batch(
            rows=rows,
            start=start,
            count=count,
            sample=sample,
            drafts=drafts,
            new_rows=self._new_rows,
            block_rows=updates[0],
            block_slots=updates[1],
            block_ids=updates[2],
            copies=copies.T,
        )
        self._new_rows, self.memory.updates, self.memory.copies = [], [], []
        return Plan(batch, table.epoch[rows])

    def complete(self, plan: Plan, tokens: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Take in a step's sampled tokens (int32 [B] or, with guesses, [B, 1 + D]; -1 for none).

        A sequence that was to sample and has no token computes its newest known one again, in a later step.
        Returns (live, ended), bool [B]: batch entries whose sequence is still there, and those that reached an end
        token or their limit. The caller removes the ended ones.
        """
        table, batch = self.table, plan.batch
        live = self._is_live(plan)
        ended = np.zeros(len(batch.rows), bool)
        after = position = batch.start + batch.count  # of the next token to arrive
        if batch.drafts is not None:
            position = position - (batch.drafts >= 0).sum(1).astype(np.int32)
        for column in tokens.reshape(len(batch.rows), -1).T:
            got = live & batch.sample & (column >= 0) & ~ended
            rows, token = batch.rows[got], column[got]
            table.tokens[rows, position[got]] = token
            position = position + got
            table.arrived[rows] = reached = position[got]
            ended[got] = (reached >= table.limit[rows]) | (table.end_ids[rows] == token[:, None]).any(1)
        again = live & batch.sample
        if batch.drafts is None:
            again &= tokens < 0  # its mask was late; else wrong guesses were computed for nothing
        else:
            self._count_guesses(batch.drafts[again], tokens[again])
            after = after.copy()
            after[again] = table.arrived[batch.rows[again]] - 1
        self.memory.computed(batch.rows[live], batch.start[live], after[live])
        if again.any():
            rows = batch.rows[again]
            table.known[rows] = table.arrived[rows]
            self.memory.rewind(rows)
        return live, ended

    def _count_guesses(self, drafts: np.ndarray, tokens: np.ndarray) -> None:
        """drafts: int32 [B, D]; tokens: int32 [B, 1 + D], those sampled: one more than were guessed right."""
        guessed = drafts >= 0
        self.guesses += int(guessed.any(1).sum())
        self.guessed_tokens += int(guessed.sum())
        self.right_guesses += (guessed & (tokens[:, 1:] >= 0)).sum(0)

    def check(self) -> None:
        """Raise AssertionError when an invariant is broken (for the simulator)."""
        table = self.table
        self.pool.check(seq.blocks for seq in self.running)
        self.adapters.check([seq.adapter for seq in self.running if seq.adapter is not None])
        assert all(not seq.blocks and seq.row < 0 and not seq.finished for seq in self.waiting), "a waiter holds memory"
        assert [s.order for s in self.waiting] == sorted(s.order for s in self.waiting), "queue out of order"
        assert [s.order for s in self.running] == sorted(s.order for s in self.running), "running out of order"
        assert {s.row for s in self.running} == {r for r, s in enumerate(table.sequences) if s is not None}, "rows"
        for seq in self.running:
            row = seq.row
            assert table.sequences[row] is seq and not seq.finished, "row and sequence disagree"
            assert table.computed[row] <= table.known[row] <= seq.limit, "computed more than is known"
        self.memory.check(self.running)

    # Rows and memory

    def _running_rows(self) -> np.ndarray:
        if len(self._rows) != len(self.running):
            self._rows = np.array([seq.row for seq in self.running], np.int32)
        return self._rows

    def _make_room(self, rows: np.ndarray, target: np.ndarray) -> bool:
        """Give running rows the blocks to hold `target` tokens. True when somebody had to be preempted for it."""
        table = self.table
        short = target > table.capacity[rows]
        if not short.any():
            return False
        preempted = False
        for row, tokens in zip(rows[short].tolist(), target[short].tolist(), strict=True):
            seq = table.sequences[row]
            while seq is not None and seq.row >= 0 and not self.memory.extend(seq, tokens):
                self._preempt(self.running[-1])  # in the end the sequence itself, when it is the last one left
                preempted = True
        return preempted

    def _preempt(self, seq: Sequence) -> None:
        """Back to the queue, in its old place; what it computed stays findable until the blocks are needed."""
        self._stop_running(seq)
        bisect.insort(self.waiting, seq, key=_order)
        self.preemptions += 1

    def _stop_running(self, seq: Sequence) -> None:
        del self.running[bisect.bisect_left(self.running, seq.order, key=_order)]
        self._rows = np.empty(0, np.int32)
        self._new_rows = [new for new in self._new_rows if new.row != seq.row]
        self.memory.release(seq)
        self.table.leave(seq)
        self.adapters.release(seq.adapter)

    def _guess(self, rows: np.ndarray, is_decode: np.ndarray) -> np.ndarray | None:
        """Guesses for the next tokens of decoding rows, int32 [len(rows), D], padded with -1; None when there are none.

        Verifying them is nearly free while a step is bound by reading the weights, so only small batches get any.
        """
        width = self.speculative_tokens
        if not width or int(is_decode.sum()) * (1 + width) > GUESSED_STEP_TOKENS:
            return None
        if self.pool.num_free < len(rows) + self._watermark:  # nobody is to be preempted for a guess
            return None
        table, drafts = self.table, np.full((len(rows), width), -1, np.int32)
        for i in np.flatnonzero(is_decode & table.guessable[rows]).tolist():
            row = rows[i]
            room = min(width, int(table.limit[row] - table.known[row]) - 1)
            if room > 0:
                guess = propose(table.tokens[row, : table.known[row]], room)
                drafts[i, : len(guess)] = guess
        return drafts if (drafts >= 0).any() else None

    # Admission

    def _admit(self, budget: int, alone: Sequence | None = None) -> tuple[list[int], list[int]]:
        """Move sequences from the queue into rows while budget, rows and memory last, in order.

        A sequence gets the blocks for all it knows at once, so a prompt in chunks never runs out half way. Some blocks
        stay free for those that run already, else the newcomer would soon be thrown out again. One whose adapter has no
        slot lets others pass: those without an adapter always, since they keep no slot from it, of the others so many.
        """
        rows: list[int] = []
        counts: list[int] = []
        at, slotless = 0, False
        while at < len(self.waiting) and budget > 0 and self.table.num_free:
            seq = self.waiting[at]
            if alone is not None and seq is not alone:
                at += 1
                continue
            if seq.adapter is not None:
                held_back = slotless and self._overtaken >= OVERTAKERS
                if held_back or not self.adapters.has_room(seq.adapter):
                    at, slotless = at + 1, True
                    continue
            found = self.memory.reusable(seq)
            if not self.memory.has_room(seq, found, self._watermark if self.running else 0):
                break
            del self.waiting[at]
            try:
                slot = self.adapters.acquire(seq.adapter)
            except Exception as error:  # told to this request alone
                self.refused.append((seq, error))
                continue
            if seq.adapter is not None:
                self._overtaken = self._overtaken + 1 if slotless else 0
            bisect.insort(self.running, seq, key=_order)
            self._enter(seq, found, slot)
            rows.append(seq.row)
            counts.append(min(budget, len(seq.tokens) - found.computed))
            self.memory.extend(seq, found.computed + counts[-1])
            budget -= counts[-1]
        return rows, counts

    def _enter(self, seq: Sequence, found: Found, adapter: int) -> None:
        row = self.table.enter(seq, found.computed)
        self.memory.adopt(seq, found)
        if seq.cached_tokens < 0:
            seq.cached_tokens = found.computed
            self.prefix_queries += seq.prompt_len
            self.prefix_hits += found.computed
        self._new_rows.append(
            NewRow(row, seq.tokens, seq.prompt_len, seq.request.params, seq.seed, seq.end_ids, adapter)
        )


def _columns(entries: list[tuple[int, ...]], width: int) -> np.ndarray:
    """Tuples as int32 [width, len(entries)]."""
    return np.array(entries, np.int32).T if entries else np.empty((width, 0), np.int32)


def _order(seq: Sequence) -> tuple[int, int, int]:
    return seq.order
