"""Sequences, and the table of numpy arrays that holds what a step needs to know of the running ones.

Per-step work is vectorised over the table: a step of 256 sequences costs a few numpy calls, and Python looks at a
single sequence only when something happens to it (a block fills up, it ends, its text is being streamed).
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field

import numpy as np

from martlet.engine.adapters import Version
from martlet.engine.block_pool import chain_digest
from martlet.engine.constraints import Constraint
from martlet.engine.detokenizer import Detokenizer
from martlet.engine.request import Request
from martlet.runners.base import TokenLogprobs

Order = tuple[int, int, int]  # priority, arrival number, index: smaller runs first, larger is preempted first


@dataclass(slots=True, eq=False)
class Sequence:
    """One of a request's n continuations. While it runs it has a row; its tokens then grow in the table's row.

    tokens: int32, all tokens known to Python (when not running). limit: total length at which it ends.
    adapter: what it runs with, to its end.
    leader: the sequence with the same prompt whose blocks this one may adopt, while that one runs.
    """

    request: Request
    index: int
    order: Order
    tokens: np.ndarray
    prompt_len: int
    limit: int
    seed: int
    end_ids: tuple[int, ...]
    root: bytes
    adapter: Version | None = None
    leader: Sequence | None = None
    row: int = -1
    finished: bool = False
    blocks: list[int] = field(default_factory=list)
    slots: list[int] = field(default_factory=list)  # of `blocks` in its block table, where that is not their order
    digests: list[bytes] = field(default_factory=list)
    registered: int = 0  # how many of `blocks` the prefix cache knows
    detokenizer: Detokenizer | None = None
    constraint: Constraint | None = None
    cached_tokens: int = -1  # tokens the prefix cache gave at first admission; -1 before it
    entered: float = 0.0  # when it first got a row, by time.monotonic(); 0 before
    reported: int = 0  # output tokens already given out
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    prompt_logprobs: list[TokenLogprobs | None] = field(default_factory=list)

    def block_digests(self, tokens: np.ndarray, count: int, block_size: int) -> list[bytes]:
        """Digests of the first `count` full blocks; extends what was computed before."""
        while len(self.digests) < count:
            first = len(self.digests) * block_size
            parent = self.digests[-1] if self.digests else self.root
            self.digests.append(chain_digest(parent, tokens[first : first + block_size]))
        return self.digests


class RowTable:
    """State of running sequences, one row each; row numbers are shared with the runner.

    computed: tokens whose KV is in the blocks once all launched steps are done. known: tokens that exist, counting
    those being sampled right now. arrived: tokens Python has seen (known - arrived are in flight). epoch changes
    whenever a row changes hands, so a late result finds out that its sequence is gone.
    """

    def __init__(self, max_rows: int, max_len: int):
        self.tokens = np.zeros((max_rows, max_len), np.int32)
        self.computed = np.zeros(max_rows, np.int32)
        self.known = np.zeros(max_rows, np.int32)
        self.arrived = np.zeros(max_rows, np.int32)
        self.limit = np.zeros(max_rows, np.int32)
        self.capacity = np.zeros(max_rows, np.int32)  # tokens that fit in the blocks held
        self.watched = np.zeros(max_rows, bool)  # Python wants to see every token: streaming, stop strings, logprobs
        self.stepwise = np.zeros(max_rows, bool)  # has a grammar: its newest token must be known before the next step
        self.held = np.zeros(max_rows, bool)  # its mask was late: it waits
        self.num_stepwise = 0  # rows that are
        self.guessable = np.zeros(max_rows, bool)  # its next tokens may be guessed and verified together
        self.end_ids = np.full((max_rows, 4), -1, np.int32)  # tokens that end the sequence, padded with -1
        self.epoch = np.zeros(max_rows, np.int64)
        self.sequences: list[Sequence | None] = [None] * max_rows
        self._free = list(range(max_rows - 1, -1, -1))

    @property
    def num_free(self) -> int:
        """Rows that nobody has."""
        return len(self._free)

    def enter(self, seq: Sequence, computed: int) -> int:
        row = self._free.pop()
        length = len(seq.tokens)
        self.tokens[row, :length] = seq.tokens
        self.computed[row] = computed
        self.known[row] = self.arrived[row] = length
        self.limit[row] = seq.limit
        params = seq.request.params
        self.watched[row] = seq.request.stream or bool(params.stop) or params.logprobs is not None
        self.stepwise[row], self.held[row] = params.grammar is not None, False
        self.num_stepwise += int(self.stepwise[row])
        self.guessable[row] = not (
            params.has_penalties or params.logprobs is not None or params.min_tokens or params.grammar is not None
        )
        if len(seq.end_ids) > self.end_ids.shape[1]:
            more = len(seq.end_ids) - self.end_ids.shape[1]
            self.end_ids = np.pad(self.end_ids, ((0, 0), (0, more)), constant_values=-1)
        self.end_ids[row] = -1
        self.end_ids[row, : len(seq.end_ids)] = seq.end_ids
        self.sequences[row] = seq
        seq.row = row
        seq.entered = seq.entered or time.monotonic()
        return row

    def leave(self, seq: Sequence) -> None:
        row = seq.row
        seq.tokens = self.tokens[row, : self.arrived[row]].copy()
        self.epoch[row] += 1
        self.num_stepwise -= int(self.stepwise[row])
        if seq.constraint is not None:
            seq.constraint.slot = -1
        self.sequences[row] = None
        seq.row = -1
        self._free.append(row)

    def length(self, seq: Sequence) -> int:
        """Tokens of a sequence that Python has seen, running or not."""
        return len(seq.tokens) if seq.row < 0 else int(self.arrived[seq.row])

    def output(self, seq: Sequence, first: int = 0) -> list[int]:
        """Output tokens from number `first` on."""
        begin = seq.prompt_len + first
        if seq.row < 0:
            return seq.tokens[begin:].tolist()
        return self.tokens[seq.row, begin : self.arrived[seq.row]].tolist()
