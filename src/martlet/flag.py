"""A field of an options dataclass that is also a command-line flag (read by martlet.cli.flags)."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from dataclasses import MISSING
from typing import Any


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
