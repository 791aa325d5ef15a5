"""A row as the model sees it: token ids, and which of them it learns.

The prompt is rendered by the template that inference uses, so that training and serving agree to the token. Learned are
the words of the assistant and the token that ends its turn; never the question, the heads of turns, or what follows.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from martlet.chat.template import Template
from martlet.errors import InvalidRequest, UsageError
from martlet.hub.tokenizer import Tokenizer
from martlet.train.rows import Row, RowError

Truncation = Literal["delete", "truncation_left", "truncation_right"]


@dataclass(frozen=True, slots=True)
class Encoded:
    """ids: token ids. learned: 1 for each of them that is learned, else 0; as long as ids."""

    ids: list[int]
    learned: list[int]

    def __len__(self) -> int:
        return len(self.ids)


def encode(
    row: Row,
    template: Template | None,
    tokenizer: Tokenizer,
    *,
    system: str | None = None,
    max_length: int | None = None,
    truncation: Truncation = "delete",
) -> Encoded:
    """A supervised row. system: for conversations that bring none. template None: only rows of plain text.

    max_length cuts as `truncation` says: "delete" refuses a longer row, "truncation_left" drops its beginning,
    "truncation_right" its end. Raises RowError.
    """
    try:
        if row.text is not None:
            ids = [*tokenizer.encode(row.text), *_end(tokenizer)]
            encoded = Encoded(ids, [1] * len(ids))
        elif template is None:
            raise RowError("the model has no chat template; give one with --template_type")
        else:
            encoded = _conversation(row, template, tokenizer, system)
    except InvalidRequest as error:
        raise RowError(error.message) from error
    if max_length is None or len(encoded) <= max_length:
        return encoded
    if truncation == "delete":
        raise RowError(f"{len(encoded)} tokens, more than --max_length {max_length}")
    first = truncation == "truncation_right"
    kept = slice(max_length) if first else slice(-max_length, None)
    cut = Encoded(encoded.ids[kept], encoded.learned[kept])
    if not any(cut.learned):
        raise RowError(f"nothing that is learned is among the {'first' if first else 'last'} {max_length} tokens")
    return cut


def shorten(
    prompt: list[int],
    endings: Sequence[list[int] | None],
    *,
    max_prompt_length: int | None,
    max_length: int,
    truncation: Truncation,
) -> tuple[list[int], list[list[int] | None]]:
    """A prompt and its endings as long as they may be: of a prompt its end is kept, since the question stands there.

    An ending whose end is cut away has no end of turn either, so it does not teach to stop there. Raises RowError.
    """
    if max_prompt_length is not None:
        prompt = prompt[-max_prompt_length:]
    most = max(len(ending) for ending in endings if ending is not None)
    if len(prompt) + most <= max_length:
        return prompt, list(endings)
    if truncation == "delete":
        raise RowError(f"{len(prompt) + most} tokens, more than --max_length {max_length}")
    if truncation == "truncation_left":
        if most >= max_length:
            raise RowError(f"an answer of {most} tokens leaves no room for its prompt in --max_length {max_length}")
        return prompt[len(prompt) + most - max_length :], list(endings)
    room = max_length - len(prompt)
    if room < 1:
        raise RowError(
            f"a prompt of {len(prompt)} tokens leaves no room for an answer in --max_length {max_length}; "
            "--max_prompt_length cuts it"
        )
    return prompt, [ending and ending[:room] for ending in endings]


def prompt_and_endings(
    row: Row, template: Template, tokenizer: Tokenizer, *, system: str | None = None
) -> tuple[list[int], list[int], list[int] | None]:
    """(prompt, ending, worse ending or None) of a preference or labelled row, as token ids. Raises RowError."""
    prompt, chosen = _last_turn(row, template, tokenizer, system)
    if row.rejected is None:
        return prompt, chosen, None
    worse = Row((*row.prompt, {"role": "assistant", "content": row.rejected}), row.learn, row.tools)
    _, rejected = _last_turn(worse, template, tokenizer, system)
    return prompt, chosen, rejected


def _last_turn(row: Row, template: Template, tokenizer: Tokenizer, system: str | None) -> tuple[list[int], list[int]]:
    only_last = Row(row.messages, (*[False] * (len(row.messages) - 1), True), row.tools)
    try:
        encoded = _conversation(only_last, template, tokenizer, system)
    except InvalidRequest as error:
        raise RowError(error.message) from error
    begin, end = encoded.learned.index(1), len(encoded) - encoded.learned[::-1].index(1)
    return encoded.ids[:begin], encoded.ids[begin:end]


def _conversation(row: Row, template: Template, tokenizer: Tokenizer, system: str | None) -> Encoded:
    messages, learn = list(row.messages), list(row.learn)
    if system and messages[0]["role"] != "system":
        messages, learn = [{"role": "system", "content": system}, *messages], [False, *learn]
    tools: Any = list(row.tools) or None
    ids = template.render(messages, tools=tools, add_generation_prompt=False)
    stops = {*template.stop_ids, *tokenizer.eos_ids}
    learned = [0] * len(ids)
    for i in [i for i, flag in enumerate(learn) if flag]:
        begin = _shared(ids, template.render(messages[:i], tools=tools, add_generation_prompt=True))
        end = len(ids)
        if i + 1 < len(messages):
            end = _shared(ids, template.render(messages[: i + 1], tools=tools, add_generation_prompt=False))
        last = next((at for at in range(end - 1, begin - 1, -1) if ids[at] in stops), None)
        if last is not None:
            end = last + 1  # a line break that follows the end of a turn is the template's, not the assistant's
        elif i + 1 == len(messages):
            ids, learned = [*ids, *_end(tokenizer)], [*learned, *[0] * len(_end(tokenizer))]
            end = len(ids)
        learned[begin:end] = [1] * (end - begin)
    if not any(learned):
        raise RowError(f"template {template.name!r} leaves nothing of the answer to learn")
    return Encoded(ids, learned)


def _shared(ids: Sequence[int], prefix: Sequence[int]) -> int:
    """How far `prefix` goes along with `ids`. A template may write a turn otherwise once it is past."""
    return next((at for at, (a, b) in enumerate(zip(ids, prefix, strict=False)) if a != b), min(len(ids), len(prefix)))


def _end(tokenizer: Tokenizer) -> list[int]:
    return list(tokenizer.eos_ids[:1])


def show(encoded: Encoded, tokenizer: Tokenizer) -> str:
    """The row as text, what is learned in brackets: how `--check` shows a sample."""
    parts: list[str] = []
    begin = 0
    for at in range(1, len(encoded) + 1):
        if at == len(encoded) or encoded.learned[at] != encoded.learned[begin]:
            text = tokenizer.decode(encoded.ids[begin:at], skip_special=False)
            parts.append(f"[[{text}]]" if encoded.learned[begin] else text)
            begin = at
    return "".join(parts)


@dataclass(frozen=True, slots=True)
class Lengths:
    """Of token counts: how many rows, and the least, the median, the 95th percentile, the most and their sum."""

    rows: int
    least: int
    median: int
    p95: int
    most: int
    total: int

    @classmethod
    def of(cls, rows: Iterable[Encoded]) -> Lengths:
        sizes = sorted(len(row) for row in rows)
        if not sizes:
            raise UsageError("no row is left to train on", param="dataset")
        return cls(len(sizes), sizes[0], sizes[len(sizes) // 2], sizes[len(sizes) * 95 // 100], sizes[-1], sum(sizes))
