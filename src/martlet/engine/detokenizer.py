"""Token ids to text as they come: byte-exact, never cutting a character, finding stop strings across tokens."""

from __future__ import annotations

import codecs
from collections.abc import Sequence

from martlet.hub.tokenizer import Tokenizer
from martlet.sampling_params import SamplingParams


class Detokenizer:
    """Text of one sequence's output; `delta()` gives what was decided since the last call.

    Bytes that do not yet make a character wait for the next token; text that may be the beginning of a stop string is
    held back until it is decided.
    """

    def __init__(self, tokenizer: Tokenizer, params: SamplingParams):
        self.stop: str | None = None  # the stop string that was found
        self._text = ""  # not given out yet
        self._bytes_of = tokenizer.token_bytes
        hidden = tokenizer.special_ids if params.skip_special_tokens else frozenset()
        self._hidden = hidden.difference(params.shown_token_ids)
        self._rest = b""  # of a character that is not whole
        self._stops: tuple[str, ...] = params.stop
        self._keep_stop = params.include_stop_str_in_output
        self._quiet_tokens = params.min_tokens  # stop strings are not looked for in the first min_tokens tokens
        self._searched = 0  # characters of `_text` in which no stop string begins and ends

    def feed(self, tokens: Sequence[int]) -> int | None:
        """Add tokens. When they complete a stop string the text ends before (or with) it, and the number of tokens it
        took is returned."""
        if not self._stops:
            self._add(b"".join([self._bytes_of(token) for token in tokens if token not in self._hidden]))
            return None
        for number, token in enumerate(tokens, 1):
            self._quiet_tokens -= 1
            if token not in self._hidden:
                self._add(self._bytes_of(token))
            if self._quiet_tokens >= 0:
                self._searched = len(self._text)
            elif self._find_stop():
                return number
        return None

    def finish(self) -> None:
        """No more tokens will come: a broken character at the end becomes U+FFFD."""
        if self.stop is None:
            self._add(b"", final=True)

    def delta(self, *, final: bool = False) -> str:
        """Text since the last call, without what may still turn into a stop string (unless final)."""
        if not self._stops:
            text, self._text = self._text, ""
            return text
        end = len(self._text) if final or self.stop is not None else len(self._text) - self._undecided()
        text, self._text, self._searched = self._text[:end], self._text[end:], self._searched - end
        return text

    def _add(self, data: bytes, *, final: bool = False) -> None:
        if not self._rest and data.isascii():  # nearly always
            self._text += data.decode()
            return
        data = self._rest + data
        text, used = codecs.utf_8_decode(data, "replace", final)
        self._text += text
        self._rest = data[used:]

    def _find_stop(self) -> bool:
        """Cut the text at the earliest stop string."""
        found = [(at, stop) for stop in self._stops if (at := self._text.find(stop, self._from(stop))) >= 0]
        self._searched = len(self._text)
        if not found:
            return False
        at, self.stop = min(found, key=lambda pair: pair[0])
        self._text = self._text[: at + len(self.stop) if self._keep_stop else at]
        return True

    def _from(self, stop: str) -> int:
        return max(0, self._searched - len(stop) + 1)

    def _undecided(self) -> int:
        """Length of the longest end of the text that begins a stop string."""
        longest = 0
        for stop in self._stops:
            for size in range(min(len(stop) - 1, len(self._text)), longest, -1):
                if self._text.endswith(stop[:size]):
                    longest = size
                    break
        return longest
