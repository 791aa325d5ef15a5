"""Byte-level BPE as tables that a start reads from a file of the user's cache, so that nothing has to be built.

The `tokenizers` library takes a vocabulary of 49,152 tokens and as many merges in 40 to 110 ms, and keeps Python to
itself meanwhile. Tables of numbers need no building: a pair of tokens is looked up where it lies in order. They are
kept under a name that tells the file they came from, as it lies on the disk now, from any other; a checksum tells
damaged ones, which are made again.
"""

from __future__ import annotations

import logging
import os
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np

from martlet.hub.byte_level import CHARACTERS
from martlet.hub.cache import cache_dir
from martlet.hub.files import fingerprint

log = logging.getLogger("martlet")

MOST = 16  # vocabularies that are kept, of 1 to 10 MB each; the least recently used goes first
LAYOUT = 1  # of the file: this and a checksum, the numbers of merges and of tokens, the tables
HEAD = 4  # int64

Vocabulary = tuple[dict[str, int], list[tuple[str, ...]]]


class Merges(NamedTuple):
    """pairs: int64 [M], left token << 32 | right token, ascending. ranks, results: int32 [M], for each pair how many
    merges come before it, and the token that it becomes. order: int32 [V], all tokens by their spelling. alphabet:
    int32 [256], the token of each byte, or -1: bytes that UTF-8 does not use are often left out."""

    pairs: np.ndarray
    ranks: np.ndarray
    results: np.ndarray
    order: np.ndarray
    alphabet: np.ndarray

    def merged(self, ids: np.ndarray, words: np.ndarray) -> np.ndarray:
        """The tokens that the bytes of words become. ids, words: int64 [N], tokens of bytes and the number of the word
        that each is in.

        All words at once, each by the one pair that comes first among the merges, until none has any.
        """
        while True:
            pairs = ids[:-1] << 32 | ids[1:]
            at = np.minimum(self.pairs.searchsorted(pairs), len(self.pairs) - 1)
            found = np.flatnonzero((self.pairs[at] == pairs) & (words[:-1] == words[1:]))
            if not len(found):
                return ids
            at = at[found]
            begins = np.flatnonzero(np.diff(words[found], prepend=-1))  # where the pairs of another word begin
            best = np.minimum.reduceat(self.ranks[at].astype(np.int64) << 32 | np.arange(len(at)), begins)
            best &= (1 << 32) - 1
            ids[found[best]] = self.results[at[best]]
            left = np.ones(len(ids), bool)
            left[found[best] + 1] = False
            ids, words = ids[left], words[left]


def merges_of(source: Path, read: Callable[[], Vocabulary]) -> Merges | None:
    """The merges of `source`, kept from an earlier start or made of what `read` gives; None where there are none.

    Raises KeyError for merges of, or to, what is no token.
    """
    file = cache_dir() / "merges" / f"{fingerprint(source)[:32]}.bin"
    try:
        if (kept := _read(file)) is not None:
            os.utime(file)  # used just now: last to be removed
            return kept
    except OSError:  # not kept yet, or removed this moment
        pass
    made = _made(*read())
    if made is not None:
        try:
            _keep(file, made)
        except OSError as error:
            log.info("the vocabulary is not kept: %s", error)
    return made


def _made(vocabulary: dict[str, int], merges: list[tuple[str, ...]]) -> Merges | None:
    if not merges:
        return None
    ranks = {}  # of what is listed twice, the last counts
    for rank, (left, right) in enumerate(merges):
        ranks[vocabulary[left] << 32 | vocabulary[right]] = rank, vocabulary[left + right]
    pairs = np.fromiter(ranks, np.int64, len(ranks))
    table = np.array(list(ranks.values()), np.int32)[np.argsort(pairs)]
    order = [vocabulary[token] for token in sorted(vocabulary)]
    alphabet = [vocabulary.get(CHARACTERS[byte], -1) for byte in range(256)]
    return Merges(np.sort(pairs), table[:, 0], table[:, 1], np.array(order, np.int32), np.array(alphabet, np.int32))


def _keep(file: Path, made: Merges) -> None:
    import tempfile

    body = b"".join(table.tobytes() for table in made)
    head = np.array([LAYOUT, zlib.crc32(body), len(made.pairs), len(made.order)], np.int64)
    file.parent.mkdir(parents=True, exist_ok=True)
    handle, scratch = tempfile.mkstemp(dir=file.parent)
    try:
        with os.fdopen(handle, "wb") as out:
            out.write(head.tobytes() + body)
        os.replace(scratch, file)
    except BaseException:
        Path(scratch).unlink(missing_ok=True)
        raise
    oldest_last = sorted(file.parent.iterdir(), key=lambda path: path.stat().st_mtime, reverse=True)
    for path in oldest_last[MOST:]:
        path.unlink(missing_ok=True)


def _read(file: Path) -> Merges | None:
    """None for a file that is damaged."""
    data = np.fromfile(file, np.uint8)
    body = data[8 * HEAD :]
    if len(data) < 8 * HEAD:
        return None
    layout, checksum, merges, tokens = data[: 8 * HEAD].view(np.int64).tolist()
    if layout != LAYOUT or len(body) != 16 * merges + 4 * (tokens + 256) or zlib.crc32(body) != checksum:
        return None
    numbers = body[8 * merges :].view(np.int32)
    return Merges(body[: 8 * merges].view(np.int64), *np.split(numbers, np.cumsum([merges, merges, tokens])))
