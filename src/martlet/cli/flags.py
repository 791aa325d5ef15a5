"""Command-line flags out of a dataclass: one field a flag, its annotation the type, its metadata the help.

The rules are SWIFT's: `--flag-name` and `--flag_name` are the same flag, `--flag value` and `--flag=value` the same
value, a boolean stands alone or takes true|false, a list takes every word up to the next flag (and may be repeated).
A word is a flag when it starts with two dashes and a letter; a value that looks so is written --flag=--value.
Flags that commands share are base classes: the class that declares a field gives the group its heading in --help.
"""

from __future__ import annotations

import dataclasses
import inspect
import re
import textwrap
import types
import typing
from collections.abc import Callable, Iterable, Sequence
from dataclasses import MISSING, dataclass
from typing import Any, TypeVar

from martlet.errors import UsageError, did_you_mean
from martlet.flag import flag

__all__ = ["Command", "CommandGroup", "Flag", "HelpAsked", "flag", "flags_of", "parse", "usage"]

T = TypeVar("T")

_IS_FLAG = re.compile(r"--[A-Za-z]")
_BOOLEANS = {"true": True, "false": False}
_TYPE_NAMES = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
_METAVARS = {int: "N", float: "X", str: "TEXT"}


class HelpAsked(Exception):
    """--help or -h stood among the words."""


@dataclass(frozen=True, slots=True)
class Flag:
    """One flag or positional word of a command. `kind` is int, float, bool or str, of each item when `many`."""

    name: str
    kind: type
    many: bool
    default: Any  # MISSING when it must be given
    help: str
    group: str
    choices: tuple[str, ...]
    aliases: tuple[str, ...]
    metavar: str
    commas: bool
    positional: bool

    def convert(self, word: str) -> Any:
        """The value that `word` spells. Raises UsageError naming the flag and the wanted type."""
        label = self.metavar if self.positional else f"--{self.name}"
        if self.choices:
            by_lower = {c.lower(): c for c in self.choices}
            if word.lower() not in by_lower:
                hint = did_you_mean(word, self.choices, count=1)
                raise UsageError(
                    f"{label} must be one of {', '.join(self.choices)}, got {word!r}.{hint}", param=self.name
                )
            word = by_lower[word.lower()]
        try:
            return _BOOLEANS[word.lower()] if self.kind is bool else self.kind(word)
        except (ValueError, KeyError):
            raise UsageError(f"{label} wants {_TYPE_NAMES[self.kind]}, got {word!r}", param=self.name) from None


def flags_of(options: type) -> list[Flag]:
    """The flags of an options dataclass, in the order of its fields."""
    hints = typing.get_type_hints(options)
    found = []
    for field in dataclasses.fields(options):
        owner = next(c for c in options.__mro__ if field.name in inspect.get_annotations(c))
        many, kind = _kind(hints[field.name])
        place = field.metadata["positional"]
        metavar = field.metadata["metavar"] or (field.name.upper() if place else _METAVARS.get(kind, ""))
        found.append(
            Flag(
                name=field.name,
                kind=kind,
                many=many,
                default=field.default,
                help=field.metadata["help"],
                group=(owner.__doc__ or "").strip().splitlines()[0].rstrip("."),
                choices=field.metadata["choices"],
                aliases=field.metadata["aliases"],
                metavar=metavar,
                commas=field.metadata["commas"],
                positional=field.metadata["positional"],
            )
        )
    return found


def parse(options: type[T], words: Sequence[str], *, not_yet: Iterable[str] = ()) -> T:
    """An `options` made of `words`. not_yet: flags of SWIFT's command that this one cannot honour.

    Raises UsageError: unknown flag (with the nearest), missing or wrong value, a word nobody asked for. HelpAsked.
    """
    flags = flags_of(options)
    by_name = {name: f for f in flags if not f.positional for name in (f.name, *f.aliases)}
    places = [f for f in flags if f.positional]
    values: dict[str, Any] = {}
    i = 0

    def take(f: Flag, words_of: list[str]) -> None:
        if f.commas:
            words_of = [part for w in words_of for part in w.split(",") if part]
        new = [f.convert(w) for w in words_of]
        values[f.name] = (*values.get(f.name, ()), *new) if f.many else new[0]

    while i < len(words):
        word = words[i]
        i += 1
        if word in ("-h", "--help"):
            raise HelpAsked
        if not _IS_FLAG.match(word):
            if not places:
                raise UsageError(f"unexpected word {word!r}: values follow a flag (--flag value)")
            take(places[0], [word])
            if not places[0].many:
                places.pop(0)
            continue
        spelled, equals, value = word[2:].partition("=")
        f = by_name.get(spelled.replace("-", "_"))
        if f is None:
            raise UsageError(_unknown(spelled, by_name, not_yet), param=spelled)
        if equals:
            take(f, [value])
        elif f.kind is bool:
            bare = i == len(words) or words[i].lower() not in _BOOLEANS
            take(f, ["true" if bare else words[i]])
            i += not bare
        else:
            end = i
            while end < len(words) and not _IS_FLAG.match(words[end]) and (f.many or end == i):
                end += 1
            if end == i:
                raise UsageError(f"--{f.name} needs a value ({_TYPE_NAMES[f.kind]})", param=f.name)
            take(f, list(words[i:end]))
            i = end

    for f in flags:
        if f.name not in values and f.default is MISSING:
            raise UsageError(f"{f.metavar if f.positional else '--' + f.name} is missing: {f.help}", param=f.name)
    return options(**values)


def usage(command: str, summary: str, options: type) -> str:
    """The --help text of a command: what it does, then its flags by group with their defaults."""
    import shutil

    flags = flags_of(options)
    width = min(shutil.get_terminal_size((100, 24)).columns, 110)
    places = "".join(f" {f.metavar}" if f.default is MISSING else f" [{f.metavar}]" for f in flags if f.positional)
    lines = [f"usage: {command}{places} [flags]", "", *textwrap.wrap(summary, width)]
    groups: dict[str, list[Flag]] = {}
    for f in flags:
        groups.setdefault("What" if f.positional else f.group, []).append(f)
    own = (options.__doc__ or "").strip().splitlines()[0].rstrip(".")
    for title in sorted(groups, key=lambda g: (g != "What", g != own)):  # a command's own flags first
        lines += ["", f"{title}:"]
        for f in groups[title]:
            lines += _describe(f, width)
    lines += ["", "-h, --help shows this. Flags take - and _ alike; booleans stand alone or take true|false."]
    return "\n".join(lines)


def _kind(hint: Any) -> tuple[bool, type]:
    """(is a list, item type) of a field's annotation: T, T | None or tuple[T, ...]."""
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        (hint,) = (a for a in typing.get_args(hint) if a is not type(None))
    if typing.get_origin(hint) is tuple:
        return True, typing.get_args(hint)[0]
    return False, hint


def _unknown(spelled: str, known: Iterable[str], not_yet: Iterable[str]) -> str:
    name = spelled.replace("-", "_")
    if name in not_yet:
        return f"--{name} is a SWIFT flag that is not supported yet"
    near = did_you_mean(name, known, count=1).replace("Did you mean ", "Did you mean --")
    return f"unknown flag --{spelled}.{near}"


def _describe(f: Flag, width: int, column: int = 32) -> list[str]:
    few = 0 < len(f.choices) <= 5
    value = "|".join(f.choices) if few else f.metavar
    left = f"  {f.metavar}" if f.positional else "  " + ", ".join(f"--{name}" for name in (f.name, *f.aliases))
    if value and not f.positional:
        left += f" {value}{' ...' if f.many else ''}"
    text = f.help + (f": {', '.join(f.choices)}" if f.choices and not few else "")
    if f.default not in (MISSING, None, (), ""):
        shown = " ".join(map(str, f.default)) if f.many else str(f.default).lower() if f.kind is bool else f.default
        text += f" (default: {shown})"
    right = textwrap.wrap(text, max(width - column, 40))
    if len(left) >= column:
        return [left, *(" " * column + r for r in right)]
    return [left.ljust(column) + right[0], *(" " * column + r for r in right[1:])]


@dataclass(frozen=True, slots=True)
class Command:
    """One command: its options and the one function that takes them and returns the exit code."""

    summary: str
    options: type
    run: Callable[[Any], int]
    not_yet: frozenset[str] = frozenset()
    startup_log: bool = False  # show the start-up lines of the rooms below on stderr


@dataclass(frozen=True, slots=True)
class CommandGroup:
    """A command with commands of its own, like `martlet models list`."""

    summary: str
    commands: dict[str, Command]
