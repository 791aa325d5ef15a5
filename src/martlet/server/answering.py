"""How an answer in a conversation is read, and what it is held to, once its prompt is known."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from martlet.chat import Parser, Template, marks
from martlet.chat.tool_grammar import tool_grammar
from martlet.grammar import Grammar
from martlet.hub.tokenizer import Tokenizer
from martlet.server.tools import Tools

Tool: TypeAlias = tuple[str, dict[str, Any]]  # a name, and the schema of the parameters

_TAIL = 32  # tokens at a prompt's end in which the mark of thoughts would stand


@dataclass(frozen=True, slots=True)
class Answering:
    """parser: makes one for each answer. stop: strings that end a turn, beside the template's. shown: control tokens
    that the parser has to see in the text. grammar: holds calls among these tools to their schemas, and an answer
    without calls to another schema if there is one.
    """

    parser: Callable[[], Parser]
    stop: tuple[str, ...]
    shown: tuple[int, ...]
    grammar: Callable[[Sequence[Tool], Mapping[str, Any] | None], Grammar]


def answering(template: Template, tokenizer: Tokenizer, prompt: Sequence[int], tools: Tools) -> Answering:
    known, thoughts = template.tool_format, template.reasoning
    inside = thoughts is not None and _ends_with(tokenizer, prompt, thoughts.begin)
    parser = functools.partial(
        Parser, known, tools.names, reasoning=thoughts, inside_reasoning=inside, max_calls=tools.max_calls
    )

    def control_id(mark: str) -> int | None:
        token = tokenizer.token_id(mark)
        return token if token in tokenizer.special_ids else None

    def grammar(callable_tools: Sequence[Tool], content: Mapping[str, Any] | None) -> Grammar:
        text = tool_grammar(
            known,
            callable_tools,
            required=tools.choice == "required",
            parallel=tools.parallel,
            reasoning=thoughts,
            inside_reasoning=inside,
            content=content,
            ends=[token for token in template.stop_ids if token not in tokenizer.eos_ids],
            control_id=control_id,
        )
        return Grammar("lark", text)

    ids = [control_id(mark) for mark in marks((known if tools.callable else None, thoughts))]
    shown = tuple(token for token in ids if token is not None)
    return Answering(parser, known.stop if tools.callable else (), shown, grammar)


def _ends_with(tokenizer: Tokenizer, prompt: Sequence[int], mark: str) -> bool:
    return tokenizer.decode(prompt[-_TAIL:], skip_special=False).rstrip().endswith(mark)
