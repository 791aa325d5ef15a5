"""A tokenizer of a few tokens, some of which begin with others, one hole, one control token and one end token."""

from __future__ import annotations

PIECES = [b"a", b"b", b"c", b"ab", b"bc", b"abc", b"<go>", b"", b"<end>", b"\xc3", b"\xa9", b"\xc3\xa9", b"\n", b" "]
GO, HOLE, END = 6, 7, 8


class ToyTokenizer:
    eos_ids = (END,)
    special_ids = frozenset((GO, END))

    def token_bytes(self, token: int) -> bytes:
        return PIECES[token] if token < len(PIECES) else b""
