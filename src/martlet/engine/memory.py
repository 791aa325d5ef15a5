"""What sequences hold of the runner's memory: two kinds, one interface, and the scheduler knows of neither.

`PagedMemory` is for attention: block i of a sequence holds the keys and values of its i-th block of tokens, and it
holds all of them while it runs. `SnapshotMemory` is for recurrences: the state that a sequence goes on from belongs to
its row, and a block holds a snapshot of it, taken after the block's last token. A sequence holds a snapshot only while
a step writes it or begins from it, so its memory does not grow; what it gave back stays findable in the prefix cache
until it is reused. Where no block is free the snapshot is left out, which costs time later and never an answer.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

from martlet.engine.block_pool import BlockPool
from martlet.engine.sequence import RowTable, Sequence
from martlet.runners.base import MemoryPlan


class Found(NamedTuple):
    """What has been computed of a sequence already. blocks: to share; computed: tokens they cover; tail: to copy."""

    blocks: list[int]
    computed: int
    tail: int | None = None


class PagedMemory:
    """Owns the pool, and until the next batch the changes to block tables and the copies that it shall carry."""

    def __init__(self, plan: MemoryPlan, table: RowTable, *, prefix_caching: bool = True):
        self.block_size, self.table, self.prefix_caching = plan.block_size, table, prefix_caching
        self.pool = BlockPool(plan.num_blocks)
        self.updates: list[tuple[int, int, int]] = []  # row, slot, block
        self.copies: list[tuple[int, int]] = []  # source, target

    def reusable(self, seq: Sequence) -> Found:
        """KV that somebody has computed already.

        The last known token is never among them: computing it gives the logits to sample from. That is also the write
        by which a fork first differs from its leader, so a fork copies the leader's partial block right when it enters.
        """
        usable = len(seq.tokens) - 1
        full, partial = divmod(usable, self.block_size)
        leader = seq.leader
        if (
            leader is not None
            and leader.row >= 0
            and self.table.computed[leader.row] >= usable  # not so after it was itself preempted
            and len(seq.tokens) == seq.prompt_len
        ):
            return Found(leader.blocks[:full], usable, leader.blocks[full] if partial else None)
        if not self.prefix_caching or seq.request.params.prompt_logprobs is not None:
            return Found([], 0)
        blocks = self.pool.find(seq.block_digests(seq.tokens, full, self.block_size)[:full])
        return Found(blocks, len(blocks) * self.block_size)

    def has_room(self, seq: Sequence, found: Found, spare: int) -> bool:
        """Whether a newcomer gets the blocks for all it knows, and `spare` are left."""
        need = -(-len(seq.tokens) // self.block_size) - len(found.blocks)
        return self.pool.num_free - self.pool.count_free(found.blocks) >= need + spare

    def adopt(self, seq: Sequence, found: Found) -> None:
        """A newcomer has its row: give it what was found and blocks for the rest of what it knows."""
        self.pool.share(found.blocks)
        seq.blocks, seq.registered = list(found.blocks), len(found.blocks)
        self.updates += [(seq.row, slot, block) for slot, block in enumerate(found.blocks)]
        if not self.extend(seq, len(seq.tokens)):
            raise AssertionError("admission promised memory that is not there")
        if found.tail is not None:
            self.copies.append((found.tail, seq.blocks[len(found.blocks)]))

    def extend(self, seq: Sequence, tokens: int) -> bool:
        """What computing up to `tokens` tokens needs. False, and nothing done, when there is not enough."""
        more = max(0, -(-tokens // self.block_size) - len(seq.blocks))
        if self.pool.num_free < more:
            return False
        for block in self.pool.take(more):
            self.updates.append((seq.row, len(seq.blocks), block))
            seq.blocks.append(block)
        self.table.capacity[seq.row] = len(seq.blocks) * self.block_size
        return True

    def computed(self, rows: np.ndarray, start: np.ndarray, after: np.ndarray) -> None:
        """Steps of live rows are done; `after` leaves out tokens that are to be computed again. All [n]."""
        if not self.prefix_caching:
            return
        for i in np.flatnonzero(after // self.block_size > start // self.block_size):
            seq = self.table.sequences[rows[i]]
            assert seq is not None
            full = int(after[i]) // self.block_size
            digests = seq.block_digests(self.table.tokens[seq.row], full, self.block_size)
            for slot in range(seq.registered, full):
                self.pool.register(seq.blocks[slot], digests[slot])
            seq.registered = full

    def rewind(self, rows: np.ndarray) -> None:
        """Rows whose newest token is to be computed again: keys and values of it are just written once more."""
        self.table.computed[rows] = self.table.arrived[rows] - 1

    def release(self, seq: Sequence) -> None:
        """A sequence has left its row (whose number it still has)."""
        self.updates = [update for update in self.updates if update[0] != seq.row]
        self.pool.release(seq.blocks)
        seq.blocks = []

    def check(self, running: Iterable[Sequence]) -> None:
        """Raise AssertionError when an invariant is broken (for the simulator)."""
        for seq in running:
            held = len(seq.blocks) * self.block_size
            assert self.table.computed[seq.row] <= self.table.capacity[seq.row] == held, "KV without a block"


class SnapshotMemory(PagedMemory):
    """Snapshots of states. `seq.slots` says which block of tokens each of `seq.blocks` stands behind, in order."""

    def __init__(self, plan: MemoryPlan, table: RowTable, *, prefix_caching: bool = True):
        super().__init__(plan, table, prefix_caching=prefix_caching)
        self._holding = np.zeros(len(table.sequences), bool)  # rows whose sequence holds a block

    def reusable(self, seq: Sequence) -> Found:
        """The newest snapshot. A leader's state is of no use to a fork: it has seen all of the prompt, or more."""
        if seq.request.params.prompt_logprobs is not None:
            return Found([], 0)
        return self._newest(seq, seq.tokens)

    def _newest(self, seq: Sequence, tokens: np.ndarray) -> Found:
        """The newest snapshot before the last of `tokens`."""
        if not self.prefix_caching:
            return Found([], 0)
        full = (len(tokens) - 1) // self.block_size
        digests = seq.block_digests(tokens, full, self.block_size)[:full]
        for slot in range(full - 1, -1, -1):
            if (block := self.pool.find(digests[slot : slot + 1])) != []:
                return Found(block, (slot + 1) * self.block_size)
        return Found([], 0)

    def has_room(self, seq: Sequence, found: Found, spare: int) -> bool:
        return True

    def adopt(self, seq: Sequence, found: Found) -> None:
        self.pool.share(found.blocks)
        for block in found.blocks:
            self._hold(seq, found.computed // self.block_size - 1, block)
        self._set_capacity(seq, found.computed)

    def extend(self, seq: Sequence, tokens: int) -> bool:
        """Blocks for the snapshots that are due before `tokens`, as many of the last ones as are free."""
        first, last = int(self.table.computed[seq.row]) // self.block_size, tokens // self.block_size
        if self.prefix_caching and last > first:
            count = min(self.pool.num_free, last - first)
            for slot, block in zip(range(last - count, last), self.pool.take(count), strict=True):
                self._hold(seq, slot, block)
        self._set_capacity(seq, tokens)
        return True

    def _hold(self, seq: Sequence, slot: int, block: int) -> None:
        self.updates.append((seq.row, slot, block))
        seq.blocks.append(block)
        seq.slots.append(slot)
        self._holding[seq.row] = True

    def _set_capacity(self, seq: Sequence, tokens: int) -> None:
        """A row needs nothing before the step that ends the block it is in."""
        self.table.capacity[seq.row] = (tokens // self.block_size + 1) * self.block_size - 1

    def computed(self, rows: np.ndarray, start: np.ndarray, after: np.ndarray) -> None:
        """Give back what the steps wrote or began from, the oldest first, so that it is also the first to go."""
        for i in np.flatnonzero(self._holding[rows]):
            seq = self.table.sequences[rows[i]]
            assert seq is not None
            done = sum((slot + 1) * self.block_size <= after[i] for slot in seq.slots)
            digests = seq.block_digests(self.table.tokens[seq.row], int(after[i]) // self.block_size, self.block_size)
            for slot, block in zip(seq.slots[:done], seq.blocks[:done], strict=True):
                self.pool.register(block, digests[slot])
                self.pool.release([block])
            del seq.slots[:done], seq.blocks[:done]
            self._holding[rows[i]] = bool(seq.blocks)

    def rewind(self, rows: np.ndarray) -> None:
        """A state cannot forget a token: the row goes on from its newest snapshot, or from the beginning."""
        for row in rows.tolist():
            seq = self.table.sequences[row]
            assert seq is not None
            self._drop(seq)
            found = self._newest(seq, self.table.tokens[row, : self.table.arrived[row]])
            self.adopt(seq, found)
            self.table.computed[row] = found.computed

    def _drop(self, seq: Sequence) -> None:
        self.pool.release(seq.blocks)
        seq.blocks, seq.slots = [], []
        self._holding[seq.row] = False

    def release(self, seq: Sequence) -> None:
        super().release(seq)
        self._drop(seq)

    def check(self, running: Iterable[Sequence]) -> None:
        for seq in running:
            assert len(seq.slots) == len(seq.blocks) and seq.slots == sorted(set(seq.slots)), "slots and blocks differ"
            assert self._holding[seq.row] == bool(seq.blocks), "a held block would never be given back"


def memory_for(plan: MemoryPlan, table: RowTable, *, prefix_caching: bool) -> PagedMemory:
    kind = SnapshotMemory if plan.snapshots else PagedMemory
    return kind(plan, table, prefix_caching=prefix_caching)
