"""Calls written as Python, f(a=1, b="x"): read with `ast` and taken apart, never run.

Only keywords with literals for values are calls. JSON's true, false and null are read too: models mix them up.
"""

from __future__ import annotations

import ast
import json
import keyword
import re
import warnings
from collections.abc import Mapping
from typing import Any

from martlet.chat.incremental import Cursor, Read

MAX_CHARACTERS = 2**17
_DEEPEST = 64
_IDENTIFIER = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_JSON_NAMES = {"true": True, "false": False, "null": None}
_PLAIN = re.compile(r"""[^()\[\]{}'"]+""")
_CLOSING = {"(": ")", "[": "]", "{": "}"}


def parse_arguments(text: str) -> str | None:
    """The keywords of the call `text`, whatever function it calls, as JSON text of an object; None if it is none."""
    if len(text) > MAX_CHARACTERS:
        return None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about odd escapes in strings
            call = ast.parse(text.strip(), mode="eval").body
            if not isinstance(call, ast.Call) or not isinstance(call.func, ast.Name) or call.args:
                return None
            arguments: dict[str, Any] = {}
            for argument in call.keywords:
                value = _literal(argument.value, text.strip())
                more = {argument.arg: value} if argument.arg is not None else value  # **{"no-identifier": 1}
                if not isinstance(more, dict) or not arguments.keys().isdisjoint(more):
                    return None
                arguments |= more
            written = json.dumps(arguments, ensure_ascii=False, allow_nan=False)
            return written.encode("utf-16", "surrogatepass").decode("utf-16")  # pairs joined, halves refused
    except (SyntaxError, ValueError, TypeError, RecursionError, MemoryError):
        return None


def _literal(node: ast.expr, source: str) -> Any:
    """The value of a literal. A whole value that is JSON is read as JSON, whose escapes differ a little."""
    segment = ast.get_source_segment(source, node)
    try:
        return json.loads(segment or "")
    except ValueError:
        pass
    for inner in ast.walk(node):
        if isinstance(inner, ast.Dict):
            inner.keys = [key and _constant(key) for key in inner.keys]
            inner.values = [_constant(value) for value in inner.values]
        elif isinstance(inner, (ast.List, ast.Tuple)):
            inner.elts = [_constant(value) for value in inner.elts]
    return ast.literal_eval(_constant(node))


def _constant(node: ast.expr) -> ast.expr:
    if isinstance(node, ast.Name) and node.id in _JSON_NAMES:
        return ast.Constant(_JSON_NAMES[node.id])
    return node


def write_keywords(arguments: Mapping[str, Any]) -> str:
    """The inverse: a=1, b="x"."""
    named = [f"{key}={literal(value)}" for key, value in arguments.items() if is_keyword(key)]
    others = {key: value for key, value in arguments.items() if not is_keyword(key)}
    return ", ".join([*named, f"**{literal(others)}"] if others else named)


def is_keyword(name: str) -> bool:
    """Whether Python takes `name` before an equals sign."""
    return bool(_IDENTIFIER.fullmatch(name)) and not keyword.iskeyword(name)


def literal(value: Any) -> str:
    """JSON data as a Python literal, with text in double quotes and unescaped as far as can be."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{literal(key)}: {literal(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(literal, value)) + "]"
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False)
    return repr(value)


def balanced(cursor: Cursor) -> Read[str | None]:
    """Read from an opening bracket to the one that closes it; None when the text ends before, or grows too long."""
    closing: list[str] = []
    taken = ""
    while (yield from cursor.more()) and len(taken) <= MAX_CHARACTERS:
        char = cursor.text[cursor.at]
        if char in "'\"":
            quoted = yield from _quoted(cursor, char)
            if quoted is None:
                return None
            taken += quoted
            continue
        plain = _PLAIN.match(cursor.text, cursor.at)
        run = plain.group() if plain else char
        cursor.at += len(run)
        taken += run
        if run in _CLOSING:
            closing.append(_CLOSING[run])
            if len(closing) > _DEEPEST:
                return None
        elif run in ")]}":
            if closing.pop() != run:
                return None
            if not closing:
                return taken
    return None


def _quoted(cursor: Cursor, quote: str) -> Read[str | None]:
    """Read a string literal; None when it does not end."""
    mark = quote
    if (yield from cursor.literal(quote * 3)):
        mark = quote * 3
    else:
        cursor.at += 1
    taken = mark
    while (yield from cursor.more()) and len(taken) <= MAX_CHARACTERS:
        if (yield from cursor.literal(mark)):
            return taken + mark
        if not (yield from cursor.more()):
            return None
        char = cursor.text[cursor.at]
        if char == "\n" and len(mark) == 1:
            return None
        cursor.at += 1
        taken += char
        if char == "\\" and (yield from cursor.more()):
            taken += cursor.text[cursor.at]
            cursor.at += 1
    return None
