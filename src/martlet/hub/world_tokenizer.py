"""RWKV's World tokenizer: a list of byte strings, and of those that fit the longest comes first. No merges, no words.

A vocabulary file has a line `id repr length` a token, repr being Python's of a str (then UTF-8 counts) or of bytes.
Id 0 is in no file: it ends a text.
"""

from __future__ import annotations

import ast
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from martlet.errors import CheckpointError
from martlet.hub.tokenizer import Tokenizer, encodable

END = "<|endoftext|>"
FILES = "rwkv_vocab*.txt"


class WorldTokenizer(Tokenizer):
    """See Tokenizer; here nothing of the `tokenizers` library is behind it."""

    def __init__(self, tokens: dict[int, bytes], *, chat_template: str | None = None):
        """tokens: without id 0. Every single byte must be among them, or some texts could not be read."""
        self._bytes = tokens
        self._ids = {piece: token for token, piece in tokens.items()}
        if missing := [byte for byte in range(256) if bytes([byte]) not in self._ids]:
            raise CheckpointError(f"a World vocabulary has all single bytes; this one lacks {missing[:5]}")
        # For the first two bytes of a place in a text, the lengths of the tokens that begin so, longest first.
        lengths: dict[bytes, set[int]] = {}
        for piece in self._ids:
            if len(piece) > 1:
                lengths.setdefault(piece[:2], set()).add(len(piece))
        self._lengths = {start: sorted(found, reverse=True) for start, found in lengths.items()}
        self.vocab_size = max(tokens) + 1
        self.special_ids = frozenset({0})
        self.bos_id, self.add_bos = None, False
        self.eos_ids = (0,)
        self.chat_template = chat_template
        self.special_tokens = {"eos_token": END}

    def encode(self, text: str, *, special: bool = False) -> list[int]:
        if not special:
            return list(self._encode(encodable(text).encode()))
        parts = [self.encode(part) for part in text.split(END)]
        return parts[0] + [token for part in parts[1:] for token in (0, *part)]

    def _encode(self, data: bytes) -> Iterator[int]:
        at, ids, lengths = 0, self._ids, self._lengths
        while at < len(data):
            for length in lengths.get(data[at : at + 2], ()):
                if (token := ids.get(data[at : at + length])) is not None:
                    break
            else:
                length, token = 1, ids[data[at : at + 1]]
            yield token
            at += length

    def encode_prompt(self, text: str) -> list[int]:
        return self.encode(text, special=True)

    def decode(self, ids: Sequence[int], *, skip_special: bool = True) -> str:
        pieces = (self.token_bytes(token) for token in ids if token or not skip_special)
        return b"".join(pieces).decode("utf-8", "replace")

    def token_bytes(self, token: int) -> bytes:
        return END.encode() if token == 0 else self._bytes.get(token, b"")

    def token_id(self, token: str) -> int | None:
        return 0 if token == END else self._ids.get(token.encode())

    def state(self) -> dict[str, Any]:
        raise CheckpointError("a World vocabulary has no tokenizer.json")

    def pre_tokenize(self, text: str) -> list[tuple[str, tuple[int, int]]]:
        return [(text, (0, len(text)))]

    def save(self, folder: Path) -> None:
        """Write rwkv_vocab.txt and chat_template.jinja."""
        lines = [f"{token} {piece!r} {len(piece)}\n" for token, piece in sorted(self._bytes.items())]
        (folder / "rwkv_vocab.txt").write_text("".join(lines), encoding="ascii")
        if self.chat_template:
            (folder / "chat_template.jinja").write_text(self.chat_template, encoding="utf-8")


def find_vocabulary(folder: Path) -> Path | None:
    """A World vocabulary in a model's folder."""
    return next(iter(sorted(folder.glob(FILES))), None)


def read_vocabulary(file: Path) -> dict[int, bytes]:
    """The tokens of a vocabulary file by id. Raises CheckpointError that names the line which cannot be read."""
    with file.open(encoding="utf-8", newline="\n") as lines:
        return dict(_tokens(lines, file))


def _tokens(lines: Iterable[str], file: Path) -> Iterator[tuple[int, bytes]]:
    for number, line in enumerate(lines, 1):
        try:
            token, _, rest = line.strip("\r\n").partition(" ")
            literal, _, length = rest.rpartition(" ")
            value = ast.literal_eval(literal)
            piece = value.encode() if isinstance(value, str) else bytes(value)
            if len(piece) != int(length) or int(token) < 1 or not piece:
                raise ValueError(f"{len(piece)} bytes, or a bad id")
        except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError) as error:
            raise CheckpointError(f"{file}, line {number}: not `id repr length` of a token ({error})") from error
        yield int(token), piece
