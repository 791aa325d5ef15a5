"""Token ids to text as they come: byte-exact, never cutting a character, finding stop strings across tokens."""

from __future__ import annotations

import codecs
from collections.abc import Iterable

from martlet.hub.tokenizer import Tokenizer
from martlet.sampling_params import SamplingParams


class Detokenizer:
    """Text of one sequence's output. `text` is everything decided so far, `delta()` what was not given out yet.

    Bytes that do not yet make a character wait for the next token; text that may be the beginning of a stop string is
    held back until it is decided.
    """

    def __init__(self, tokenizer: Tokenizer, params: SamplingParams):
        self.text = ""
        self.stop: str | None = None  # the stop string that was found
        self._tokenizer = tokenizer
        hidden = tokenizer.special_ids if params.skip_special_tokens else frozenset()
        self._hidden = hidden.difference(params.shown_token_ids)
        self._decode = codecs.getincrementaldecoder("utf-8")("replace").decode
        self._stops: tuple[str, ...] = params.stop
        self._keep_stop = params.include_stop_str_in_output
        self._quiet_tokens = params.min_tokens  # stop strings are not looked for in the first min_tokens tokens
        self._given = 0
        self._searched = 0

    def feed(self, tokens: Iterable[int]) -> str | None:
        """Add tokens; returns the stop string they complete, after which the text ends before (or with) it."""
        for token in tokens:
            self._quiet_tokens -= 1
            if token not in self._hidden:
                self.text += self._decode(self._tokenizer.token_bytes(token))
            if self._quiet_tokens >= 0:
                self._searched = len(self.text)
            elif self._stops and self._find_stop():
                return self.stop
        return None

    def finish(self) -> None:
        """No more tokens will come: a broken character at the end becomes U+FFFD."""
        if self.stop is None:
            self.text += self._decode(b"", True)

    def delta(self, *, final: bool = False) -> str:
        """Text since the last call, without what may still turn into a stop string (unless final)."""
        end = len(self.text) if final or self.stop is not None else len(self.text) - self._undecided()
        text, self._given = self.text[self._given : end], max(end, self._given)
        return text

    def _find_stop(self) -> bool:
        """Cut the text at the earliest stop string."""
        found = [(at, stop) for stop in self._stops if (at := self.text.find(stop, self._from(stop))) >= 0]
        self._searched = len(self.text)
        if not found:
            return False
        at, self.stop = min(found, key=lambda pair: pair[0])
        self.text = self.text[: at + len(self.stop) if self._keep_stop else at]
        return True

    def _from(self, stop: str) -> int:
        return max(0, self._searched - len(stop) + 1)

    def _undecided(self) -> int:
        """Length of the longest end of the text that begins a stop string."""
        longest = 0
        for stop in self._stops:
            for size in range(min(len(stop) - 1, len(self.text)), longest, -1):
                if self.text.endswith(stop[:size]):
                    longest = size
                    break
        return longest
