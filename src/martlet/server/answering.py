"""How an answer in a conversation is read, and what it is held to, once its prompt is known."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from martlet.chat import Parser, Template, marks
from martlet.hub.tokenizer import Tokenizer
from martlet.server.tools import Tools

_TAIL = 32  # tokens at a prompt's end in which the mark of thoughts would stand


@dataclass(frozen=True, slots=True)
class Answering:
    """parser: makes one for each answer. stop: strings that end a turn, beside the template's. shown: control tokens
    that the parser has to see in the text.
    """

    parser: Callable[[], Parser]
    stop: tuple[str, ...]
    shown: tuple[int, ...]


def answering(template: Template, tokenizer: Tokenizer, prompt: Sequence[int], tools: Tools) -> Answering:
    known, thoughts = template.tool_format, template.reasoning
    inside = thoughts is not None and _ends_with(tokenizer, prompt, thoughts.begin)
    parser = functools.partial(
        Parser, known, tools.names, reasoning=thoughts, inside_reasoning=inside, max_calls=tools.max_calls
    )
    ids = [tokenizer.token_id(mark) for mark in marks((known if tools.callable else None, thoughts))]
    shown = tuple(token for token in ids if token in tokenizer.special_ids)
    return Answering(parser, known.stop if tools.callable else (), shown)


def _ends_with(tokenizer: Tokenizer, prompt: Sequence[int], mark: str) -> bool:
    return tokenizer.decode(prompt[-_TAIL:], skip_special=False).rstrip().endswith(mark)
