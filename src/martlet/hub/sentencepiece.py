"""SentencePiece: pieces with scores, joined by the best score (BPE) or cut along the likeliest path (unigram).

A tokenizer.model is a protocol buffer of a few fields, read here without SentencePiece's own library; GGUF files bring
the same pieces as lists. Source of the field numbers: sentencepiece_model.proto of google/sentencepiece.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

from martlet.errors import CheckpointError
from martlet.hub.token_types import BYTE, CONTROL, MAX_TOKEN, UNKNOWN, UNUSED, USER_DEFINED

_UNIGRAM, _BPE = 1, 2
_ENDS, _RUNS = Regex(r"\A▁+|▁+\z"), Regex("▁{2,}")


@dataclass(frozen=True, slots=True)
class Pieces:
    """A vocabulary, its rows by id. kinds: int [N]. scores: float [N]. unknown: id of the unknown piece, or None.

    prefix: a text begins with a space it was not written with. joined: by the best score, else unigram. charsmap:
    SentencePiece's compiled table of characters to replace first. squeeze: runs of spaces count as one.
    """

    tokens: Sequence[str]
    kinds: np.ndarray
    scores: np.ndarray
    unknown: int | None = None
    prefix: bool = True
    joined: bool = True
    charsmap: bytes = b""
    squeeze: bool = False


def tokenizer_of(pieces: Pieces, source: Path) -> Tokenizer:
    """source: of the pieces, for errors. Raises CheckpointError for what cannot be done exactly."""
    tokens, kinds = pieces.tokens, pieces.kinds
    vocabulary = {token: index for index, token in enumerate(tokens)}
    if len(vocabulary) != len(tokens):
        raise CheckpointError(f"{source}: {len(tokens) - len(vocabulary)} of its tokens are duplicates")
    if any(len(token) > MAX_TOKEN for token in tokens):
        raise CheckpointError(f"{source}: a token has more than {MAX_TOKEN} characters; the file is corrupt")
    by_bytes = bool((kinds == BYTE).any())
    if pieces.joined:
        unknown = None if pieces.unknown is None else tokens[pieces.unknown]
        merges = _merges(vocabulary, pieces)
        model = models.BPE(vocabulary, merges, unk_token=unknown, fuse_unk=True, byte_fallback=by_bytes)
    else:
        rows = list(zip(tokens, pieces.scores.tolist(), strict=True))
        model = models.Unigram(rows, pieces.unknown, byte_fallback=by_bytes)
    tokenizer = Tokenizer(model)
    if by_bytes and not pieces.joined:
        tokenizer.pre_tokenizer = cut_names(tokens[index] for index in np.flatnonzero(kinds == BYTE))
    _spell(tokenizer, pieces)
    tokenizer.add_tokens(
        [
            AddedToken(tokens[index], special=bool(kinds[index] != USER_DEFINED), normalized=False)
            for index in np.flatnonzero((kinds == CONTROL) | (kinds == USER_DEFINED) | (kinds == UNKNOWN))
            if tokens[index]
        ]
    )
    return tokenizer


def _spell(tokenizer: Tokenizer, pieces: Pieces) -> None:
    """Spaces as ▁, before and after. Behind a control token a text begins anew, with its space; behind a user-defined
    piece too, as transformers has it and SentencePiece has not."""
    steps = [normalizers.Precompiled(pieces.charsmap)] if pieces.charsmap else []
    steps.append(normalizers.Replace(" ", "▁"))
    if pieces.squeeze:
        steps += [normalizers.Replace(_ENDS, ""), normalizers.Replace(_RUNS, "▁")]
    if pieces.prefix:
        steps.append(normalizers.Prepend("▁"))
    tokenizer.normalizer = normalizers.Sequence(steps)
    back = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*back, decoders.Strip(" ", 1, 0)] if pieces.prefix else back)


def cut_names(names: Iterable[str]) -> pre_tokenizers.PreTokenizer:
    """Cuts a text behind the first character of each of `names` that it spells.

    The library's unigram model takes any of its pieces for a text that spells it; SentencePiece keeps control tokens
    and bytes out.
    """
    spelt = "|".join(rf"{re.escape(name[0])}(?={re.escape(name[1:])})" for name in names if len(name) > 1)
    return pre_tokenizers.Split(Regex(spelt or r"(?!)"), "merged_with_previous")


def _merges(vocabulary: dict[str, int], pieces: Pieces) -> list[tuple[str, str]]:
    """Pairs of pieces in the order in which SentencePiece joins them: by the score of the whole, best first."""
    merges: list[tuple[str, str]] = []
    kinds, scores = pieces.kinds, pieces.scores
    ordinary = np.flatnonzero((kinds != CONTROL) & (kinds != UNKNOWN) & (kinds != BYTE))
    for index in ordinary[np.argsort(-scores[ordinary], kind="stable")]:
        whole = pieces.tokens[index]
        for cut in range(1, len(whole)):
            left, right = whole[:cut], whole[cut:]
            if left in vocabulary and right in vocabulary:
                merges.append((left, right))
    return merges


@dataclass(frozen=True, slots=True)
class Model:
    """A tokenizer.model. names: bos_token, eos_token, ... as template variables, of those it has."""

    pieces: Pieces
    names: dict[str, str]


def read(file: Path) -> Model:
    """Raises CheckpointError for a file that is none, or of a kind that cannot be read exactly."""
    try:
        return _read(file, file.read_bytes())
    except (IndexError, struct.error, UnicodeDecodeError, ValueError) as error:
        raise CheckpointError(f"{file} is no readable SentencePiece model: {error}") from error


def _read(file: Path, data: bytes) -> Model:
    tokens, scores, kinds = [], [], []
    trainer: dict[int, int | bytes] = {}
    normaliser: dict[int, int | bytes] = {}
    for number, value in _fields(data):
        if number == 1:
            piece = dict(_fields(_bytes(value)))
            tokens.append(_bytes(piece.get(1, b"")).decode())
            scores.append(struct.unpack("<f", _bytes(piece.get(2, bytes(4))))[0])
            kinds.append(piece.get(3, 1))
        elif number == 2:
            trainer = dict(_fields(_bytes(value)))
        elif number == 3:
            normaliser = dict(_fields(_bytes(value)))
    if not tokens:
        raise ValueError("it holds no pieces")
    kind = trainer.get(3, _UNIGRAM)
    squeeze = bool(normaliser.get(4, 1))
    refused = {
        "words or characters as pieces": kind not in (_UNIGRAM, _BPE),
        "unused pieces": UNUSED in kinds,
        "white space behind words": bool(trainer.get(24, 0)),
        "spaces that are not escaped": not normaliser.get(5, 1),
        "user-defined pieces where spaces are squeezed": squeeze and USER_DEFINED in kinds,
    }
    if found := [what for what, there in refused.items() if there]:
        raise CheckpointError(f"{file}: a SentencePiece model with {', '.join(found)} is not supported")
    ids = {"unk_token": (40, 0), "bos_token": (41, 1), "eos_token": (42, 2), "pad_token": (43, -1)}
    at = {name: _signed(trainer.get(field, default)) for name, (field, default) in ids.items()}
    names = {name: tokens[i] for name, i in at.items() if 0 <= i < len(tokens) and kinds[i] in (UNKNOWN, CONTROL)}
    pieces = Pieces(
        tokens,
        np.array(kinds),
        np.array(scores, np.float32),
        unknown=kinds.index(UNKNOWN) if UNKNOWN in kinds else None,
        prefix=bool(normaliser.get(3, 1)),
        joined=kind == _BPE,
        charsmap=_bytes(normaliser.get(2, b"")),
        squeeze=squeeze,
    )
    return Model(pieces, names)


def _fields(data: bytes) -> Iterator[tuple[int, int | bytes]]:
    """(number, value) of a protocol buffer's fields: numbers as int, all else, floats too, as bytes."""
    at = 0
    while at < len(data):
        key, at = _varint(data, at)
        number, wire = key >> 3, key & 7
        if wire == 0:
            value, at = _varint(data, at)
            yield number, value
            continue
        if wire == 2:
            length, at = _varint(data, at)
        else:
            length = {1: 8, 5: 4}.get(wire, -1)
        if length < 0 or at + length > len(data):
            raise ValueError(f"byte {at} begins no field")
        yield number, data[at : at + length]
        at += length


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[at]
        value |= (byte & 127) << shift
        at, shift = at + 1, shift + 7
        if byte < 128:
            return value, at
        if shift > 63:
            raise ValueError(f"byte {at} belongs to no number")


def _bytes(value: int | bytes) -> bytes:
    if isinstance(value, int):
        raise ValueError("a number stands where bytes belong")
    return value


def _signed(value: int | bytes) -> int:
    """A 32-bit number that is written as 64 bits when it is negative."""
    number = int(value)
    return number - (1 << 64) if number >= 1 << 63 else number
