"""A tool format and tools as a grammar, in llguidance's dialect of Lark, for constrained decoding.

A call that the grammar lets through is one that `parser` reads, with arguments that are valid by the tool's schema.
Where calls are optional, the answer is free until it begins one: from the mark on, it has to be a call.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from martlet.chat.python_call import is_keyword
from martlet.chat.reasoning import ReasoningFormat
from martlet.chat.tool_formats import ToolFormat

MAX_CALLS = 32  # in one answer: a small model would go on forever
_MOST_KEYWORDS = 24
_ANY = "(?s:.*)"
_TYPESETTING = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
# What a schema may hold so that its properties can be written as keywords, one after the other.
_SIMPLE = {
    "type", "properties", "required", "additionalProperties", "title", "description", "default", "examples",
    "$schema", "$id", "$defs", "definitions", "$comment", "strict",
}  # fmt: skip


def tool_grammar(
    known: ToolFormat,
    tools: Sequence[tuple[str, Mapping[str, Any]]],
    *,
    required: bool,
    parallel: bool = True,
    reasoning: ReasoningFormat | None = None,
    inside_reasoning: bool = False,
    content: Mapping[str, Any] | None = None,
    ends: Sequence[int] = (),
    control_id: Callable[[str], int | None] = lambda mark: None,
) -> str:
    """Lark text of the answers that are allowed.

    tools: (name, JSON Schema of the parameters, an object). required: there must be a call; otherwise there may be.
    Schemas are strict where a call is required; elsewhere keywords that cannot be enforced are passed over.
    parallel: whether there may be several. content: a JSON Schema that an answer without calls must be valid by, None
    for any text. reasoning, inside_reasoning: thoughts go before everything. ends: ids
    of control tokens with which a turn may end. control_id: id of a mark that is a control token, None for plain text.
    """
    return _Writer(known, reasoning, inside_reasoning, control_id, required, parallel).write(tools, content, ends)


class _Writer:
    def __init__(
        self,
        known: ToolFormat,
        reasoning: ReasoningFormat | None,
        inside: bool,
        control_id: Callable[[str], int | None],
        required: bool,
        parallel: bool,
    ):
        self.known, self.reasoning, self.inside = known, reasoning, inside
        self.required, self.parallel = required, parallel
        self.control_id = control_id
        self.blank = required or known.at != "start"  # white space after thoughts is not the beginning of the rest
        self.rules: list[str] = []

    def write(
        self, tools: Sequence[tuple[str, Mapping[str, Any]]], content: Mapping[str, Any] | None, ends: Sequence[int]
    ) -> str:
        calls = [self._call(number, name, schema) for number, (name, schema) in enumerate(tools)]
        self.rules.append(f"call: {' | '.join(head + ' ' + rest for head, rest in calls)}")
        if self.required:
            body = self._calls()
        elif content is not None:
            self.rules.append(f"content: %json {self._json(content)}")
            body = f"{self._calls()} | content"
        else:
            body = self._free_or_calls([name for name, _ in tools], calls)
        self.rules.append(f"body: {body}")
        end = f" ({' | '.join(f'<[{token}]>' for token in ends)})?" if ends else ""
        start = f"start: {self._thoughts()}body{end}"
        return "\n".join([start, *self.rules]) + "\n"

    def _mark(self, mark: str) -> str:
        token = self.control_id(mark)
        return _text(mark) if token is None else f"<[{token}]>"

    def _thoughts(self) -> str:
        if self.reasoning is None:
            return ""
        begin, end = (self.control_id(mark) for mark in self.reasoning.marks)
        if end is None:
            self.rules.append(f"thoughts[lazy]: /{_ANY}{_regex(self.reasoning.end)}/")
        else:
            self.rules.append(f"thoughts: /{_ANY}/ <[{end}]>")
        blank = "blank " if self.blank else ""
        self.rules += [r"blank: /[ \n]{0,3}/"] if blank else []
        if self.inside:
            return f"thoughts {blank}"
        if begin is None and end is None:  # one lexeme, so that the free text below cannot take its place
            self.rules.remove(f"thoughts[lazy]: /{_ANY}{_regex(self.reasoning.end)}/")
            self.rules.append(
                f"thoughts[lazy]: /[ \\n]*{_regex(self.reasoning.begin)}{_ANY}{_regex(self.reasoning.end)}/"
            )
            return f"(thoughts {blank})? "
        return f"({self._mark(self.reasoning.begin)} thoughts {blank})? "

    # Calls alone.

    def _calls(self) -> str:
        """One call or more, with everything around them."""
        known = self.known
        if known.call == "chatglm3":
            return self._repeated("call", f"{self._mark(known.begin)} call")
        first = "" if known.begin_optional else self._mark(known.begin) + " " if known.begin else ""
        return first + self._after_begin(again=first)

    def _after_begin(self, again: str = "") -> str:
        """What follows the first begin mark. again: the mark for calls that have one each."""
        known = self.known
        pad = _text(known.pad) + " " if known.pad else ""
        close = (pad if known.end else "") + (self._mark(known.end) if known.end else "")
        if known.separator:
            opening = _text(known.opening) + " " if known.opening else ""
            closing = " " + _text(known.closing) if known.closing else ""
            return f"{pad}{opening}{self._list('call')}{closing} {close}"
        one = f"{pad}call {close}"
        return self._repeated(one, f'"\\n" {again}{one}')

    def _list(self, first: str) -> str:
        return self._repeated(first, _text(self.known.separator + " ") + " call")

    def _repeated(self, first: str, more: str) -> str:
        return f"{first} ({more}){{0,{MAX_CALLS - 1}}}" if self.parallel else first

    # Calls among free text.

    def _free_or_calls(self, names: Sequence[str], calls: Sequence[tuple[str, str]]) -> str:
        known = self.known
        if known.call == "chatglm3":
            self.rules.append(f"TEXT: /[ ]?\\n{_ANY}/")
            turn = f"{self._mark(known.begin)} call"
            limit = f"{{0,{MAX_CALLS}}}" if self.parallel else "?"
            return f"(TEXT ({turn}){limit}) | {self._calls()}"
        if known.at == "start":
            self.rules.append(f"TEXT: /{_ANY}/{self._without(self._starts(names))}")
            # The head is one lexeme, which begins where free text would: until it is decided both are possible.
            heads = [f"/\\s{{0,3}}{_regex(known.opening + json.loads(head))}/ {rest}" for head, rest in calls]
            self.rules.append(f"first: {' | '.join(heads)}")
            marked = f" | {self._mark(known.begin)} {self._calls()}" if known.begin else ""
            closing = _text(known.closing) if known.closing else ""
            return f"TEXT | {self._list('first')} {closing}{marked}"
        one = self._single()
        limit = f"{{1,{MAX_CALLS}}}" if self.parallel else ""
        if self.control_id(known.begin) is not None:
            self.rules.append(f"TEXT: /{_ANY}/{self._without([])}")
            return f"TEXT | (TEXT {self._mark(known.begin)} {one}){limit} TEXT"
        before = f"({_ANY}\\n)?" if known.at == "line" else _ANY
        mark = before + _regex(known.begin)
        self.rules.append(f"TEXT: /{_ANY}/{self._without([mark + _ANY])}")
        self.rules.append(f"BEFORE: /{mark}/{self._without([])}")
        self.rules.append("before[lazy]: BEFORE")
        return f"TEXT | (before {one}){limit} TEXT"

    def _single(self) -> str:
        """What follows a mark in free text: one call, or the whole list that the mark opens."""
        if self.known.separator:
            return self._after_begin()
        parallel, self.parallel = self.parallel, False
        one = self._after_begin()
        self.parallel = parallel
        return one

    def _starts(self, names: Sequence[str]) -> list[str]:
        """Beginnings of an answer that would be calls."""
        if self.known.call == "python":
            heads = [rf"\[\s*({'|'.join(map(_regex, names))})\("]
        else:
            heads = [r'\{\s*"(name|arguments|parameters)"']
        if self.known.begin and self.control_id(self.known.begin) is None:
            heads.append(_regex(self.known.begin))
        return [rf"\s*{head}{_ANY}" for head in heads]

    def _without(self, patterns: Sequence[str]) -> str:
        if self.reasoning is not None and not self.inside and self.control_id(self.reasoning.begin) is None:
            patterns = [*patterns, rf"\s*{_regex(self.reasoning.begin)}{_ANY}"]
        return "".join(f" & ~/{pattern}/" for pattern in patterns)

    # One call.

    def _call(self, number: int, name: str, schema: Mapping[str, Any]) -> tuple[str, str]:
        """The Lark string that tells which tool is called, and the rest of the rule."""
        known = self.known
        if known.call == "object":
            head = json.dumps({"name": name})[:-1] + f', "{known.arguments}": '
            return _text(head), f'{self._schema(number, schema)} "}}"'
        if known.call == "react":
            return _text(f"{name}\nAction Input: "), self._schema(number, schema)
        keywords = self._keywords(number, schema)
        if known.call == "python":
            return _text(f"{name}("), f'{keywords} ")"'
        return _text(f"{name}\n```python\ntool_call("), f'{keywords} ")\\n```"'

    def _schema(self, number: int, schema: Mapping[str, Any]) -> str:
        self.rules.append(f"arguments_{number}: %json {self._json(schema)}")
        return f"arguments_{number}"

    def _json(self, schema: Mapping[str, Any]) -> str:
        typesetting = _TYPESETTING if self.required else {**_TYPESETTING, "lenient": True}
        text = json.dumps({**schema, "x-guidance": typesetting}, ensure_ascii=False)
        return text.replace("::=", "\\u003a:=")  # by which GBNF grammars are known

    def _keywords(self, number: int, schema: Mapping[str, Any]) -> str:
        """a=1, b="x": properties in their order, or ** and an object where they do not go as keywords."""
        properties = schema.get("properties", {})
        needed = schema.get("required", [])
        if not (
            schema.keys() <= _SIMPLE
            and len(properties) <= _MOST_KEYWORDS
            and all(map(is_keyword, properties))
            and isinstance(needed, list)
            and all(name in properties for name in needed)
        ):
            return f'"**" {self._schema(number, schema)}'
        shared = {key: schema[key] for key in ("$defs", "definitions") if key in schema}
        pairs = []
        for at, (name, value) in enumerate(properties.items()):
            rule = f"argument_{number}_{at}"
            value = value if isinstance(value, dict) else {"not": {}} if value is False else {}
            self.rules.append(f"{rule}: %json {self._json({**shared, **value})}")
            pairs.append((name in needed, f"{_text(name + '=')} {rule}"))
        choices = []
        for at, (must, pair) in enumerate(pairs):  # which comes first
            rest = [f'", " {p}' if m else f'(", " {p})?' for m, p in pairs[at + 1 :]]
            choices.append(" ".join([pair, *rest]))
            if must:
                break
        if not any(must for must, _ in pairs):
            choices.append('""')
        self.rules.append(f"keywords_{number}: {' | '.join(choices)}")
        return f"keywords_{number}"


def _text(text: str) -> str:
    """A Lark string."""
    return json.dumps(text, ensure_ascii=False)


def _regex(text: str) -> str:
    """`text` as a pattern of itself."""
    return "".join(c if c.isalnum() else f"\\x{{{ord(c):x}}}" for c in text)
