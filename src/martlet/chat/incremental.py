"""Reading a text that comes in pieces as if it were all there: generators that yield when they need more of it.

A reader is written like any recursive-descent parser over `text` and `at`. Where it needs a character that has not
come yet it yields, and goes on when it has. What it decides thus depends on the text alone, never on where
the text was cut.
"""

from __future__ import annotations

import re
from collections.abc import Generator
from typing import TypeVar

T = TypeVar("T")
Read = Generator[None, None, T]

SPACE = " \t\r\n"
_STRING_RUN = re.compile(r'[^"\\\x00-\x1f]+')
_ESCAPE = re.compile(r'\\(["\\/bfnrt]|u[0-9a-fA-F]{4})')
_ATOM_RUN = re.compile(r"[-+.0-9A-Za-z]+")
_ATOM = re.compile(r"-?(0|[1-9][0-9]*)(\.[0-9]+)?([eE][-+]?[0-9]+)?|true|false|null")
_LONGEST_ATOM = 400
_DEEPEST = 128


class Cursor:
    """A place in a growing text. `text` holds what may still be needed; whoever is done with a beginning forgets it."""

    def __init__(self) -> None:
        self.text = ""
        self.at = 0
        self.ended = False

    def blocked(self) -> None:
        """Called before a reader waits: the moment to give out what is decided."""

    def forget(self) -> None:
        """Drop what has been read."""
        self.text, self.at = self.text[self.at :], 0

    def more(self) -> Read[bool]:
        """Wait for a character at `at`; False at the end of the text."""
        while self.at >= len(self.text):
            if self.ended:
                return False
            self.blocked()
            yield
        return True

    def space(self) -> Read[None]:
        while (yield from self.more()) and self.text[self.at] in SPACE:
            self.at += 1

    def literal(self, expected: str) -> Read[bool]:
        """Read `expected`, or stay and return False."""
        if not expected:
            return True
        while expected.startswith(self.text[self.at : self.at + len(expected)]):
            if len(self.text) - self.at >= len(expected):
                self.at += len(expected)
                return True
            if self.ended:
                return False
            self.blocked()
            yield
        return False

    def run(self, pattern: re.Pattern[str], most: int) -> Read[str]:
        """The longest run of characters that `pattern` (of the form [...]+) takes; stops beyond `most`."""
        taken = ""
        while len(taken) < most and (yield from self.more()):
            found = pattern.match(self.text, self.at)
            if found is None:
                break
            taken += found.group()
            self.at = found.end()
        return taken


def json_string(cursor: Cursor) -> Read[bool]:
    """Read a JSON string from its opening quote on; False when it is none, or never ends."""
    if not (yield from cursor.literal('"')):
        return False
    while (yield from cursor.more()):
        run = _STRING_RUN.match(cursor.text, cursor.at)
        if run:
            cursor.at = run.end()
        elif cursor.text[cursor.at] == '"':
            cursor.at += 1
            return True
        else:
            while len(cursor.text) - cursor.at < 6 and not cursor.ended:  # the length of the longest escape
                if _ESCAPE.match(cursor.text, cursor.at):
                    break
                cursor.blocked()
                yield
            escape = _ESCAPE.match(cursor.text, cursor.at)
            if escape is None:
                return False
            cursor.at = escape.end()
    return False


def json_value(cursor: Cursor) -> Read[bool]:
    """Read one JSON value; False at the first character that is not JSON, or when the text ends inside it."""
    closing: list[str] = []  # of the objects and lists that are open
    key_next = first = False
    while True:
        yield from cursor.space()
        if not (yield from cursor.more()):
            return False
        char = cursor.text[cursor.at]
        if first and char == closing[-1]:
            cursor.at += 1
            closing.pop()
        elif key_next:
            if not (yield from json_string(cursor)):
                return False
            yield from cursor.space()
            if not (yield from cursor.literal(":")):
                return False
            key_next = first = False
            continue
        elif char in "{[":
            if len(closing) >= _DEEPEST:
                return False
            closing.append("}" if char == "{" else "]")
            cursor.at += 1
            key_next, first = char == "{", True
            continue
        elif char == '"':
            if not (yield from json_string(cursor)):
                return False
        elif not _ATOM.fullmatch((yield from cursor.run(_ATOM_RUN, _LONGEST_ATOM))):
            return False
        first = False
        while closing:  # after a value
            yield from cursor.space()
            if (yield from cursor.literal(",")):
                key_next = closing[-1] == "}"
                break
            if not (yield from cursor.literal(closing[-1])):
                return False
            closing.pop()
        else:
            return True
