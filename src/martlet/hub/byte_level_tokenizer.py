"""A tokenizer of a GGUF file's byte-level vocabulary that is there in milliseconds.

What cuts a text into words of bytes is the `tokenizers` library with a vocabulary of 256 bytes and the control tokens,
which it reads at once. What merges the bytes are the tables of martlet.hub.kept_merges, and how a token is spelled the
file says. For a prompt that is as fast as the library, for a book it is not: after the first pages the library reads
the whole vocabulary and does everything.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from functools import cached_property
from itertools import pairwise
from typing import Any

import numpy as np
import tokenizers

from martlet.hub import gguf_tokenizer
from martlet.hub.byte_level import CHARACTERS
from martlet.hub.gguf_header import TOKENS, GGUFHeader
from martlet.hub.kept_merges import Merges
from martlet.hub.tokenizer import Tokenizer, byte_level_bytes, encodable, literal_twin

SHORT = 10_000  # characters of all texts so far, which take 10 ms; reading the vocabulary takes 50 to 100
LONGEST = 256  # bytes of a word: each round of merging goes over all of a text


class ByteLevelTokenizer(Tokenizer):
    """See Tokenizer. Every answer is that of one which has read the whole vocabulary."""

    _piece_bytes = staticmethod(byte_level_bytes)
    _frame = None

    def __init__(self, header: GGUFHeader, merges: Merges, **facts: Any):
        """facts: as for Tokenizer."""
        self._header, self._merges = header, merges
        self._left, self.vocab_size = SHORT, len(merges.order)
        self._whole_words_first = gguf_tokenizer.takes_whole_words(header)
        self._alphabet = [CHARACTERS[byte] for byte in range(256) if merges.alphabet[byte] >= 0]
        self._cutter = gguf_tokenizer.cutter_of(header, self._alphabet)
        added = self._cutter.get_added_tokens_decoder()
        self._literal_cutter = literal_twin(self._cutter, added)
        ids = {item.content: self.token_id(item.content) for item in added.values()}
        self._meant = np.zeros(self._cutter.get_vocab_size(with_added_tokens=True), np.int64)  # by the cutter's tokens
        self._meant[: len(self._alphabet)] = merges.alphabet[merges.alphabet >= 0]
        for token, item in added.items():
            self._meant[token] = ids[item.content]
        special = [ids[item.content] for item in added.values() if item.special]
        self._describe({token: text for text, token in ids.items()}, special, self.vocab_size, **facts)

    @cached_property
    def _core(self) -> tokenizers.Tokenizer:
        return gguf_tokenizer.tokenizer_from(self._header)

    @cached_property
    def _literal(self) -> tokenizers.Tokenizer:
        return literal_twin(self._core, self._core.get_added_tokens_decoder())

    def encode(self, text: str, *, special: bool = False) -> list[int]:
        self._left -= len(text)
        if self._left >= 0:
            cutter = self._cutter if special else self._literal_cutter
            cut = cutter.encode(encodable(text), add_special_tokens=False)
            ids, words = np.array(cut.ids, np.int64), np.array(cut.word_ids, np.int64)
            if not len(ids) or np.bincount(words).max() <= LONGEST:
                return self._merged(ids, words).tolist()
        return super().encode(text, special=special)

    def _merged(self, cut: np.ndarray, words: np.ndarray) -> np.ndarray:
        ids = self._meant[cut]
        if self._whole_words_first:
            begins = np.flatnonzero(np.diff(words, prepend=-1)).tolist()
            for begin, end in pairwise((*begins, len(words))):
                # control tokens have no letters
                word = "".join(self._alphabet[token] for token in cut[begin:end] if token < len(self._alphabet))
                if word and (token := self.token_id(word)) is not None:
                    ids[begin], words[begin + 1 : end] = token, -1
            ids, words = ids[words >= 0], words[words >= 0]
        return self._merges.merged(ids, words)

    def decode(self, ids: Sequence[int], *, skip_special: bool = True) -> str:
        pieces = (self._piece(token) or "" for token in ids if not (skip_special and token in self.special_ids))
        return b"".join(map(byte_level_bytes, pieces)).decode("utf-8", "replace")

    def token_id(self, token: str) -> int | None:
        order = self._merges.order
        at = bisect_left(order, token, key=self._piece)
        return int(order[at]) if at < len(order) and self._piece(order[at]) == token else None

    def _piece(self, token: int) -> str | None:
        return self._header.items(TOKENS, [token])[0] if 0 <= token < self.vocab_size else None
