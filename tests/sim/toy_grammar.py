"""A worker of grammars without a process: what it allows is a hash of the text so far, and it can be late or stuck."""

from __future__ import annotations

import random
import zlib

import numpy as np

from martlet.engine.constraints import Constraints

END = 5  # the only token allowed once a grammar is over
WORDS = 4


def allowed(text: str, output: list[int]) -> np.ndarray:
    """The mask after `output`, uint32 [WORDS], by a grammar "kind:length": random until it ends."""
    length = int(text.split(":")[1])
    bits = np.zeros(32 * WORDS, np.uint8)
    if len(output) >= length:
        bits[END] = 1
    else:
        state = zlib.crc32(f"{text}{output}".encode())
        bits[np.random.default_rng(state).integers(0, 97, 5)] = 1
    return np.packbits(bits, bitorder="little").view(np.uint32)


class ToyPort:
    """martlet.engine.constraints.Port. A "dead:n" grammar breaks after n tokens, a "stuck:n" one never answers."""

    def __init__(self, rng: random.Random, slots: int, words: int = WORDS):
        self.masks = np.zeros((slots, words), np.uint32)
        self.waiting: list[int] = []
        self.busy_since = float("inf")
        self.alive = True
        self._rng, self._number = rng, 0
        self._queue: list[tuple[int, str, tuple]] = []
        self._texts: dict[int, tuple[str, list[int]]] = {}

    def send(self, what: str, *rest) -> int:
        self._number += 1
        self._queue.append((self._number, what, rest))
        return self._number

    def receive(self, timeout: float):
        answers = []
        while self._queue and self.alive and (self._queue[0][1] == "check" or self._rng.random() < 0.7):
            number, what, rest = self._queue[0]
            answer = None if what == "check" else self._step(*rest)
            if answer == "stuck":
                self.busy_since = float("-inf")
                break
            self._queue.pop(0)
            answers.append((number, answer))
        return answers

    def _step(self, opens, closes, fills):
        fills = [(key, list(tokens), slot) for key, tokens, slot in fills]
        for key, tokens, _ in fills:
            text, known = self._texts.get(key) or ({k: g[1] for k, g in opens}[key], [])
            if text.startswith("stuck") and len(known) + len(tokens) >= int(text.split(":")[1]):
                return "stuck"
        for key, grammar in opens:
            self._texts[key] = (grammar[1], [])
        errors = {}
        for key, tokens, slot in fills:
            text, known = self._texts[key]
            for token in tokens:
                word, bit = divmod(token, 32)
                assert allowed(text, known)[word] >> np.uint32(bit) & 1, "a matcher was fed what it does not allow"
                known.append(token)
            if text.startswith("dead") and len(known) >= int(text.split(":")[1]):
                errors[str(key)] = "dead"
            elif slot >= 0:
                self.masks[slot, :WORDS] = allowed(text, known)
        for key in closes:
            self._texts.pop(key, None)
        return errors

    def close(self) -> None:
        self.alive = False


class Prompt(ToyPort):
    """Never late."""

    def __init__(self, slots: int, words: int):
        super().__init__(random.Random(0), slots, words)
        self._rng.random = lambda: 0.0


def constraints(rng: random.Random | None, rows: int, words: int = WORDS) -> Constraints:
    return Constraints(lambda slots: Prompt(slots, words) if rng is None else ToyPort(rng, slots, words), rows)
