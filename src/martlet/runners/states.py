"""The states of sequences that a recurrence reads: which slot holds what, for every runner.

Slots are numbered by the rows of the batch; behind them stands one a block, for snapshots. A step reads and writes the
slots of its rows. A row whose step begins elsewhere than its last one ended takes its state from the block that ends
there (the first, all zeros, from nowhere): so it is with a row that was entered, and with one that has to compute
tokens again.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from martlet.runners.base import Batch, MemoryPlan


@dataclass(frozen=True, slots=True)
class Moves:
    """States to copy before a step, int64 [Q] each: from slot to slot; all zeros where fresh."""

    targets: np.ndarray
    sources: np.ndarray
    fresh: np.ndarray


class StateSlots:
    def __init__(self, memory: MemoryPlan):
        self.rows, self.block_size = memory.max_rows, memory.block_size
        self.count = memory.max_rows + memory.num_blocks
        self.seen = np.full(self.rows, -1, np.int64)  # tokens that a row's state has seen; -1: not to be continued

    def begin(self, batch: Batch, blocks: np.ndarray) -> Moves | None:
        """A step is about to run; until `end` none of its rows' states may be continued.

        blocks: int32 [rows, blocks a row], the block tables.
        """
        self.seen[[new.row for new in batch.new_rows]] = -1
        moved = self.seen[batch.rows] != batch.start
        self.seen[batch.rows] = -1
        if not moved.any():
            return None
        rows, start = batch.rows[moved].astype(np.int64), batch.start[moved].astype(np.int64)
        assert (start % self.block_size == 0).all(), "a state is asked for that nobody kept"
        return Moves(rows, self.rows + blocks[rows, np.maximum(start // self.block_size - 1, 0)], start == 0)

    def snapshots(self, batch: Batch) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """States that a step is to keep, int64 [Q] each: of which sequence, after how many of its tokens, in which
        slot. A block whose last token is computed holds the state after it."""
        place = np.full(self.rows, -1)
        place[batch.rows] = np.arange(len(batch.rows))
        sequence = place[batch.block_rows]
        position = (batch.block_slots.astype(np.int64) + 1) * self.block_size
        end = (batch.start + batch.count)[sequence]
        due = (sequence >= 0) & (position > batch.start[sequence]) & (position <= end)
        return sequence[due], position[due], self.rows + batch.block_ids[due].astype(np.int64)

    def end(self, batch: Batch) -> None:
        """The step has run."""
        self.seen[batch.rows] = batch.start + batch.count
