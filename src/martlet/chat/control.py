"""Keeping what people write apart from what the template writes: text never becomes a control token.

A template puts messages and control tokens such as <|im_end|> into one text, and the tokenizer would read a typed
<|im_end|> as the real one. So, before rendering, every character of a message that could take part in a control
token's name is followed by a mark, a character that occurs nowhere else. After rendering the marks are taken out
again, and names that hold a marked character are encoded as plain text. A conversation without such characters is
rendered and encoded exactly as if nothing had been done.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from martlet.errors import InvalidRequest
from martlet.hub.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True)
class ControlNames:
    """How a tokenizer's control tokens are spelt. `edges`: the proper beginnings and ends of names."""

    names: frozenset[str]
    first: frozenset[str]
    lengths: tuple[int, ...]
    edges: frozenset[str]

    @classmethod
    def of(cls, tokenizer: Tokenizer) -> ControlNames:
        names = frozenset(tokenizer.token_bytes(i).decode(errors="replace") for i in tokenizer.special_ids) - {""}
        edges = frozenset(part for name in names for i in range(1, len(name)) for part in (name[:i], name[i:]))
        return cls(names, frozenset(n[0] for n in names), tuple(sorted({len(n) for n in names})), edges)

    def spans(self, text: str) -> list[tuple[int, int]]:
        """Where in `text` a name stands: (start, end), overlapping ones too, by start."""
        starts = (i for c in self.first for i in _positions(text, c))
        return sorted(
            (i, i + n) for i in starts for n in self.lengths if text[i : i + n] in self.names and i + n <= len(text)
        )

    def dangerous(self, text: str, *, prose: bool) -> list[tuple[int, int]]:
        """Spans that could be part of a control token's name once the template has put its own text around `text`.

        Names inside; and at either end, white space aside since templates strip it, the beginning or end of a name.
        prose: text that a person or model wrote. In other strings, which templates compare with words of their own
        ("object", "string"), an end counts only if it has a character that is in no word.
        """
        spans = self.spans(text)
        start, stop = len(text) - len(text.lstrip()), len(text.rstrip())
        for n in range(1, min(max(self.lengths, default=0), stop - start + 1)):
            for a, b in ((start, start + n), (stop - n, stop)):
                if text[a:b] in self.edges and (prose or not text[a:b].isalnum()):
                    spans.append((a, b))
        core = text[start:stop]
        if prose and core and any(core in name for name in self.names if len(core) < len(name)):
            spans.append((start, stop))
        return spans


def _positions(text: str, char: str) -> Iterator[int]:
    i = text.find(char)
    while i >= 0:
        yield i
        i = text.find(char, i + 1)


# Keys whose text people and models write; the rest of a message is structure.
_PROSE = ("content", "text", "reasoning_content", "reasoning", "thinking")


def mark(value: Any, names: ControlNames, sign: str, *, prose: bool = False) -> Any:
    """A copy of JSON data in which each dangerous character is followed by `sign`."""
    if isinstance(value, str):
        marked = {i for a, b in names.dangerous(value, prose=prose) for i in range(a, b)}
        return "".join(c + sign if i in marked else c for i, c in enumerate(value)) if marked else value
    if isinstance(value, dict):
        return {
            _mark_key(k, names, sign): v if k == "role" else mark(v, names, sign, prose=prose or k in _PROSE)
            for k, v in value.items()
        }
    if isinstance(value, list):
        return [mark(v, names, sign, prose=prose) for v in value]
    return value


def _mark_key(key: str, names: ControlNames, sign: str) -> str:
    """Keys are looked up by the template, so only a whole name in one is marked."""
    return mark(key, names, sign) if names.spans(key) else key


def choose_signs(*values: Any) -> tuple[str, str]:
    """Two private-use characters that occur in none of the JSON values."""
    said = repr(values)  # spells such characters out, so that whoever types their spelling uses them, too
    free = (chr(code) for code in range(0xF0000, 0x10FFFE) if f"\\U{code:08x}" not in said)
    first, second = next(free, None), next(free, None)
    if first is None or second is None:
        raise InvalidRequest("messages use every private-use character of Unicode", param="messages")
    return first, second


def encode(text: str, names: ControlNames, sign: str, tokenizer: Tokenizer) -> list[int]:
    """Ids of rendered text. Control tokens are read, but for names that hold a marked character."""
    if sign not in text:
        return tokenizer.encode(text, special=True)
    pieces = text.split(sign)
    text, written, position = "".join(pieces), set(), 0
    for piece in pieces[:-1]:
        position += len(piece)
        written.add(position - 1)
    ids: list[int] = []
    done = 0
    for a, b in _merge((a, b) for a, b in names.spans(text) if not written.isdisjoint(range(a, b))):
        ids += tokenizer.encode(text[done:a], special=True) if a > done else []
        ids += tokenizer.encode(text[a:b], special=False)
        done = b
    return ids + (tokenizer.encode(text[done:], special=True) if done < len(text) else [])


def _merge(spans: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    merged: list[tuple[int, int]] = []
    for a, b in spans:
        if merged and a < merged[-1][1]:
            merged[-1] = (merged[-1][0], max(b, merged[-1][1]))
        else:
            merged.append((a, b))
    return merged
