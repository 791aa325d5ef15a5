"""What an answer must look like, as data. It is compiled and followed in a process of its own (`grammar.worker`)."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from martlet.errors import InvalidRequest

Kind = Literal["json_object", "json_schema", "regex", "choice", "lark"]
KINDS = ("json_object", "json_schema", "regex", "choice", "lark")
MAX_TEXT = 256 * 1024  # characters of a grammar
MAX_CHOICES = 4096


@dataclass(frozen=True, slots=True)
class Grammar:
    """A language that an answer must be a sentence of. Hashable: what is compiled is kept by it.

    kind: json_object (any JSON object, no text), json_schema (text is a JSON Schema), regex (of Rust's regex crate,
    matched against the whole answer), choice (text is a JSON list of strings, one of which is the answer) or lark
    (llguidance's dialect of Lark; a GBNF grammar, known by its `::=`, is translated).
    trigger: with one, the answer is free text, and from the first occurrence of this string or control token on what
    follows it must obey the grammar, to the end. A lark grammar can say the same and more by itself, so it takes none.
    Raises InvalidRequest for what can be seen without compiling.
    """

    kind: Kind
    text: str = ""
    trigger: str | None = None

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise InvalidRequest(f"grammar kind {self.kind!r} is none of {', '.join(KINDS)}", param="grammar")
        if not isinstance(self.text, str) or (not self.text and self.kind != "json_object"):
            raise InvalidRequest(f"a grammar of kind {self.kind} needs a text", param="grammar")
        if len(self.text) > MAX_TEXT:
            raise InvalidRequest(f"a grammar has at most {MAX_TEXT} characters, not {len(self.text)}", param="grammar")
        if self.trigger is not None and (not self.trigger or self.kind == "lark"):
            why = "a lark grammar says by itself what is free" if self.trigger else "a trigger is a non-empty string"
            raise InvalidRequest(why, param="grammar")


def json_schema(schema: Mapping[str, Any] | bool | str, *, trigger: str | None = None) -> Grammar:
    """From a JSON Schema, as an object or as text."""
    text = schema if isinstance(schema, str) else _dumped(schema)
    return Grammar("json_schema", text, trigger)


def choice(options: Sequence[str], *, trigger: str | None = None) -> Grammar:
    """One of these strings, exactly."""
    if not options or len(options) > MAX_CHOICES or not all(isinstance(one, str) and one for one in options):
        raise InvalidRequest(f"choices are 1 to {MAX_CHOICES} non-empty strings", param="grammar")
    return Grammar("choice", _dumped(list(options)), trigger)


def _dumped(value: Any) -> str:
    try:
        return json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise InvalidRequest(f"the grammar is no JSON: {error}", param="grammar") from error
