"""Grammars at work: each constrained sequence's matcher, kept one token ahead of the runner, and the masks it gives.

Matchers live in a worker process (martlet.grammar.worker). When a token of a sequence arrives, it is sent there at
once; the mask of what may follow is computed while the next forward pass runs and waited for just before sampling.
Nobody waits long: a mask that is late costs its sequence a step, not its neighbours, and a grammar that keeps the
worker busy for seconds fails its request. The worker is then killed, and a new one is told what the others know.
"""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from martlet.errors import InvalidRequest, MartletError, Overloaded
from martlet.grammar import Grammar
from martlet.hub.tokenizer import Tokenizer

if TYPE_CHECKING:
    from martlet.engine.sequence import RowTable
    from martlet.runners.base import Batch

CHECK_SECONDS = 4.0  # to compile a grammar and compute its first masks
MASK_SECONDS = 3.0  # to compute a mask, or to compile again
PATIENCE = 0.05  # how long a step waits for its masks
START_SECONDS = 30.0  # for a worker's start, on a busy machine
QUEUE_SECONDS = 20.0  # for grammars of others that are being checked
CHECKED = 512  # verdicts that are kept


class Port(Protocol):
    """What is needed of martlet.grammar.process.Worker."""

    masks: np.ndarray
    waiting: list[int]
    busy_since: float
    alive: bool

    def send(self, what: str, *rest: Any) -> int: ...
    def receive(self, timeout: float) -> Sequence[tuple[int, Any]]: ...
    def close(self) -> None: ...


@dataclass(slots=True, eq=False)
class Constraint:
    """A sequence's matcher. tokens: the output it was fed. slot: the row its masks are for, -1 while it has none.

    ticket: number of the message that its newest mask comes with. error: why it failed.
    """

    key: int
    grammar: Grammar
    owner: Any = field(repr=False)  # its sequence
    tokens: list[int] = field(default_factory=list)
    slot: int = -1
    ticket: int = 0
    ready: bool = False
    deaths: int = 0  # of workers that had nothing else to do
    error: MartletError | None = None


@dataclass(slots=True)
class StepMasks:
    """martlet.runners.base.Masks of one step. late: bool [M], which did not come in time; known after `wait`."""

    constraints: Constraints
    entries: np.ndarray
    members: list[Constraint]
    bits: np.ndarray | None = None
    late: np.ndarray | None = None

    def wait(self) -> np.ndarray:
        if self.bits is None:
            self.bits, self.late = self.constraints.collect(self.members)
        return self.bits

    def allows(self, tokens: np.ndarray) -> np.ndarray:
        """Which of `tokens` [M] their masks allow, bool [M]."""
        assert self.bits is not None
        word = self.bits[np.arange(len(tokens)), tokens >> 5]
        return (word >> (tokens & 31).astype(np.uint32)) & 1 == 1

    def judged(self, tokens: np.ndarray) -> np.ndarray:
        """A step's sampled tokens, [B] or [B, 1 + D], without those whose mask was late or did not allow them."""
        tokens = tokens.copy()
        column = tokens.reshape(len(tokens), -1)[:, 0]  # a view
        allowed = self.allows(column[self.entries])
        for constraint, fine in zip(self.members, allowed, strict=True):
            if not fine and constraint.error is None:
                constraint.error = InvalidRequest(
                    "the grammar and the request's other settings (min_tokens, allowed_token_ids, logit_bias) together "
                    f"leave no token after {len(constraint.tokens)} tokens",
                    param="grammar",
                )
        column[self.entries[self.late | ~allowed]] = -1
        return tokens

    def follow(self, rows: np.ndarray, tokens: np.ndarray, going_on: np.ndarray, held: np.ndarray) -> None:
        """Tell the matchers of `judged` tokens, where the sequences [B] go on; rows without one are held, or fail."""
        constraints, column = self.constraints, tokens.reshape(len(tokens), -1)[:, 0]
        for b, constraint in zip(self.entries.tolist(), self.members, strict=True):
            if not going_on[b]:
                continue
            if column[b] >= 0:
                constraints.advance(constraint, int(column[b]))
            else:
                held[rows[b]] = not constraint.ready
                if constraint.error is not None and constraint not in constraints.failed:
                    constraints.failed.append(constraint)
        constraints.flush()


class Checks:
    """Verdicts on grammars, from a worker of their own, so that a hostile one disturbs nobody. Any thread may ask."""

    def __init__(self, start: Callable[[], Port]):
        self._start = start
        self._port: Port | None = None
        self._busy = threading.Lock()
        self._verdicts: OrderedDict[Grammar, str | None] = OrderedDict()
        self._closed = False

    def check(self, grammar: Grammar) -> None:
        """Compile `grammar`. Raises InvalidRequest when it cannot be followed, Overloaded when too many are waiting."""
        if grammar not in self._verdicts:
            if not self._busy.acquire(timeout=QUEUE_SECONDS):
                raise Overloaded("too many grammars are waiting to be compiled; try again later")
            try:
                if grammar not in self._verdicts:
                    self._verdicts[grammar] = self._ask(grammar)
                    if len(self._verdicts) > CHECKED:
                        self._verdicts.popitem(last=False)
            finally:
                self._busy.release()
        error = self._verdicts.get(grammar)
        if error is not None:
            raise InvalidRequest(error, param="grammar")

    def _ask(self, grammar: Grammar) -> str | None:
        if self._closed:
            raise MartletError("the engine is shut down")
        if self._port is None or not self._port.alive:
            self._port = self._start()
            self._port.send("check", _data(Grammar("json_object")))  # its answer says that the worker has started
            if not self._port.receive(START_SECONDS):
                self._stop()
                raise MartletError("the process that compiles grammars does not start")
        self._port.send("check", _data(grammar))
        answers = self._port.receive(CHECK_SECONDS)
        if answers:
            return answers[0][1]
        alive = self._port.alive
        self._stop()
        what = f"takes more than {CHECK_SECONDS:g} s" if alive else "takes too much memory"
        return f"the grammar {what} to compile; a simpler one will do"

    def _stop(self) -> None:
        if self._port is not None:
            self._port.close()
            self._port = None

    def close(self) -> None:
        self._closed = True
        with self._busy:
            self._stop()


class Constraints:
    """All matchers of an engine. `check` may be called by any thread, everything else by the engine's alone.

    start: makes a worker with a mask for each of so many slots. failed: constraints that broke and wait for the engine
    to end their requests.
    """

    def __init__(self, start: Callable[[int], Port], rows: int):
        self._start = lambda: start(rows)
        self._checks = Checks(lambda: start(1))
        self._port: Port | None = None
        self._spare: Port | None = None  # started with the first check, to be warm for the first sequence
        self._starting = threading.Lock()
        self._started = self._warmed = False
        self.live: dict[int, Constraint] = {}
        self.failed: list[Constraint] = []
        self._last_key = 0
        self._opens: list[tuple[int, Any]] = []
        self._fills: list[tuple[int, list[int], int]] = []
        self._closes: list[int] = []
        self._asked: dict[int, list[Constraint]] = {}  # message under way -> whose masks it brings

    def check(self, grammar: Grammar) -> None:
        """Compile `grammar`. Raises InvalidRequest when it cannot be followed, Overloaded when others are in line."""
        with self._starting:
            if not self._warmed:
                self._warmed, self._spare = True, self._start()
        self._checks.check(grammar)

    @property
    def active(self) -> bool:
        return bool(self.live or self.failed)

    def open(self, grammar: Grammar, owner: Any) -> Constraint:
        """A matcher at the beginning of an answer."""
        self._last_key += 1
        constraint = Constraint(self._last_key, grammar, owner)
        self.live[constraint.key] = constraint
        self._opens.append((constraint.key, _data(grammar)))
        return constraint

    def enter(self, constraint: Constraint, row: int) -> None:
        """Its sequence has row `row` from now on: ask for the mask of its next token there."""
        constraint.slot = row
        self._ask(constraint, [])

    def advance(self, constraint: Constraint, token: int) -> None:
        """A token arrived: ask for the mask of the next one."""
        constraint.tokens.append(token)
        self._ask(constraint, [token])

    def close(self, constraint: Constraint) -> None:
        if self.live.pop(constraint.key, None) is not None:
            self._closes.append(constraint.key)

    def _ask(self, constraint: Constraint, tokens: list[int]) -> None:
        constraint.ready = False
        self._fills.append((constraint.key, tokens, constraint.slot))

    def flush(self) -> None:
        """Send what was asked for since the last time."""
        if not (self._opens or self._fills or self._closes):
            return
        if self._port is None or not self._port.alive:
            if self.live:
                self._restart(())
            return
        number = self._port.send("step", self._opens, self._closes, self._fills)
        self._asked[number] = [self.live[key] for key, _, _ in self._fills if key in self.live]
        for constraint in self._asked[number]:
            constraint.ticket = number
        self._opens, self._fills, self._closes = [], [], []

    def poll(self, timeout: float = 0.0) -> None:
        """Take in what the worker has answered; waits up to `timeout` seconds for news."""
        if self._port is None:
            return
        for number, errors in self._port.receive(timeout):
            self._started = True
            broken = {int(key): message for key, message in errors.items()}
            for constraint in self._asked.pop(number, ()):
                if constraint.ticket == number:
                    constraint.ready = constraint.key not in broken
            for key, message in broken.items():
                if key in self.live:
                    self._fail(self.live[key], message)
        limit = MASK_SECONDS if self._started else START_SECONDS
        if self._asked and (not self._port.alive or time.monotonic() - self._port.busy_since > limit):
            self._give_up()

    def masks_of(self, batch: Batch, table: RowTable) -> StepMasks | None:
        """Ask for the masks of rows that begin; those of the step's rows that sample, None where there are none."""
        for new in batch.new_rows:
            if (found := table.sequences[new.row].constraint) is not None:
                self.enter(found, new.row)
        self.flush()
        entries = np.flatnonzero(batch.sample & table.stepwise[batch.rows])
        if not len(entries):
            return None
        return StepMasks(self, entries, [table.sequences[row].constraint for row in batch.rows[entries]])

    def collect(self, members: Sequence[Constraint]) -> tuple[np.ndarray, np.ndarray]:
        """Masks of the members' next tokens, copied, uint32 [M, words], and which of them are late, bool [M]."""
        deadline = time.monotonic() + PATIENCE
        self.poll()
        while not all(one.ready or one.error for one in members) and (left := deadline - time.monotonic()) > 0:
            self.poll(left)
        late = np.array([not one.ready for one in members])
        assert self._port is not None
        bits = self._port.masks[[one.slot for one in members]]
        bits[late] = 0xFFFFFFFF
        return bits, late

    def _fail(self, constraint: Constraint, why: str) -> None:
        constraint.error = InvalidRequest(
            f"the grammar cannot be followed after {len(constraint.tokens)} tokens: {why}", param="grammar"
        )
        self.close(constraint)
        self.failed.append(constraint)

    def _give_up(self) -> None:
        """The worker is stuck or dead: kill it. Who was asked for alone is to blame; several get a second chance."""
        assert self._port is not None
        asked = self._asked[min(self._asked)]
        suspects = [one for one in asked if one.key in self.live]
        if len(suspects) == len(asked) == 1 and self._started:  # else it may have been one that has ended meanwhile
            suspects[0].deaths += not self._port.alive  # once may be somebody else's doing
            if self._port.alive or suspects[0].deaths > 1:
                self._fail(suspects[0], "it takes too much " + ("time" if self._port.alive else "memory"))
        elif not self._started:
            for constraint in list(self.live.values()):
                self._fail(constraint, "the process that follows grammars does not start")
        self._restart(suspects)

    def _restart(self, suspects: Iterable[Constraint]) -> None:
        """A new worker, told of every sequence in a message of its own, suspects last."""
        if self._port is not None:
            self._port.close()
        self._port, self._spare = self._spare or self._start(), None
        self._started = False
        self._opens, self._fills, self._closes = [], [], []
        self._asked = {self._port.send("step", [], [], []): []}  # its answer says that the worker has started
        suspected = {one.key for one in suspects}
        for constraint in sorted(self.live.values(), key=lambda one: one.key in suspected):
            key = constraint.key
            fill = (key, list(constraint.tokens), constraint.slot)
            constraint.ready = False
            constraint.ticket = self._port.send("step", [(key, _data(constraint.grammar))], [], [fill])
            self._asked[constraint.ticket] = [constraint]

    def shutdown(self) -> None:
        self._checks.close()
        for port in (self._port, self._spare):
            if port is not None:
                port.close()
        self._port = self._spare = None


def _data(grammar: Grammar) -> list[str | None]:
    return [grammar.kind, grammar.text, grammar.trigger]


def constraints_for(tokenizer: Tokenizer, vocab_size: int, rows: int) -> Constraints:
    """Constraints over a model's vocabulary; nothing is computed or started before the first grammar."""

    @cache
    def words() -> bytes:
        from martlet.grammar.process import vocabulary

        return vocabulary(tokenizer, vocab_size)

    def start(slots: int) -> Port:
        from martlet.grammar.process import Worker

        return Worker(words(), slots, -(-vocab_size // 32))

    return Constraints(start, rows)
