"""Fixed-size KV blocks with reference counts, and the prefix cache that lives in them.

A block nobody refers to is free, yet keeps its content until it is taken for something else: the free list is in
least-recently-released order, so the prefix cache is an LRU that costs no memory of its own. A full block whose tokens
are known is *registered* under a digest of its whole prefix; a later sequence with the same prefix finds it there.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Iterable

import numpy as np


def root_digest(adapter: str | None, salt: str | None) -> bytes:
    """Digest that starts a chain: sequences of different adapters or salts never share a block."""
    return hashlib.blake2b(repr((adapter, salt)).encode(), digest_size=16).digest()


def chain_digest(parent: bytes, tokens: np.ndarray) -> bytes:
    """Digest of a full block: its int32 tokens, behind everything before them. Cryptographic, so equal means equal."""
    return hashlib.blake2b(tokens.tobytes(), key=parent, digest_size=16).digest()


class BlockPool:
    """Blocks 0 ... num_blocks - 1. Invariant: a block is in the free list exactly when its reference count is 0."""

    def __init__(self, num_blocks: int):
        self.num_blocks = num_blocks
        self.references = [0] * num_blocks
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(range(num_blocks))
        self._digest: list[bytes | None] = [None] * num_blocks
        self._registered: dict[bytes, int] = {}

    @property
    def num_free(self) -> int:
        return len(self._free)

    def take(self, count: int) -> list[int]:
        """`count` blocks of the caller's own, least recently used content first to go. The caller checks num_free."""
        blocks = [self._free.popitem(last=False)[0] for _ in range(count)]
        for block in blocks:
            self.forget(block)
            self.references[block] = 1
        return blocks

    def share(self, blocks: Iterable[int]) -> None:
        """One more owner for each block; a free block comes back to life with its content."""
        for block in blocks:
            if self.references[block] == 0:
                del self._free[block]
            self.references[block] += 1

    def release(self, blocks: list[int]) -> None:
        """One owner less for each block of a sequence, given in its order: its tail is reused before its beginning."""
        for block in reversed(blocks):
            self.references[block] -= 1
            if self.references[block] == 0:
                if self._digest[block] is None:
                    self._free[block] = None
                    self._free.move_to_end(block, last=False)  # nothing worth keeping: reuse it first
                else:
                    self._free[block] = None

    def register(self, block: int, digest: bytes) -> None:
        """Make a full block findable. The first block with some content stays the one that is found."""
        if self._digest[block] is None and digest not in self._registered:
            self._digest[block] = digest
            self._registered[digest] = block

    def forget(self, block: int) -> None:
        """The block's content is about to change: nobody may find it any more."""
        digest, self._digest[block] = self._digest[block], None
        if digest is not None:
            del self._registered[digest]

    def find(self, digests: Iterable[bytes]) -> list[int]:
        """Blocks that hold the longest registered beginning of a chain of digests. Their counts are unchanged."""
        found = []
        for digest in digests:
            block = self._registered.get(digest)
            if block is None:
                break
            found.append(block)
        return found

    def count_free(self, blocks: Iterable[int]) -> int:
        """How many of `blocks` are in the free list now."""
        return sum(self.references[block] == 0 for block in blocks)

    def check(self, owners: Iterable[list[int]]) -> None:
        """Raise AssertionError unless the pool agrees with the block lists of all its owners (for the simulator)."""
        counted = [0] * self.num_blocks
        for blocks in owners:
            for block in blocks:
                counted[block] += 1
        assert counted == self.references, "reference counts differ from what sequences hold"
        assert set(self._free) == {b for b, n in enumerate(counted) if n == 0}, "free list differs from the counts"
        assert all(self._digest[block] == digest for digest, block in self._registered.items()), "digest maps differ"
        assert len(self._registered) == sum(digest is not None for digest in self._digest), "a digest is lost"
