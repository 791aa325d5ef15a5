"""A field of an options dataclass that is also a command-line flag (read by martlet.cli.flags)."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from dataclasses import MISSING
from typing import Any

from martlet.errors import UsageError


def flag(
    help: str,
    default: Any = MISSING,
    *,
    choices: Iterable[str] = (),
    aliases: Iterable[str] = (),
    metavar: str = "",
    commas: bool = False,
    positional: bool = False,
) -> Any:
    """A dataclass field that is a flag. Without a default it must be given. commas: a list also splits at commas."""
    metadata = {
        "help": help,
        "choices": tuple(choices),
        "aliases": tuple(aliases),
        "metavar": metavar,
        "commas": commas,
        "positional": positional,
    }
    return dataclasses.field(default=default, kw_only=True, metadata=metadata)


def refuse_strays(options: Any, rules: Iterable[tuple[Iterable[str], Any, str]]) -> None:
    """Raise UsageError for a flag that has no use in `options`. rules: (flags, whether they have one, where they do).

    A flag that is given by its default is not noticed, and changes nothing.
    """
    given = {field.name for field in dataclasses.fields(options) if getattr(options, field.name) != field.default}
    for names, useful, where in rules:
        for name in names:
            if name in given and not useful:
                raise UsageError(f"--{name} belongs to {where}", param=name)
