"""`martlet infer --val_dataset`: a file of prompts through the engine, each answer on disk as soon as it is there.

A result row carries the number and a fingerprint of its input row, so a run that was killed goes on where it stopped.
"""

from __future__ import annotations

import json
import queue
import sys
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from martlet.errors import InvalidRequest, MartletError, UsageError

if TYPE_CHECKING:
    from martlet.backends.base import Backend
    from martlet.engine.request import Output, Request

T = TypeVar("T")

IN_FLIGHT = 256  # rows that are tokenised and queued ahead; enough to fill any batch

Message = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Row:
    """One prompt of the file. number: its line, from 1. messages or prompt: what to send. rest: its other columns."""

    number: int
    fingerprint: str
    messages: list[Message] | None
    prompt: str | None
    rest: dict[str, Any]


class BadRow(MartletError):
    """A line of the file that cannot be sent."""


@dataclass(slots=True)
class Answer:
    """The text so far, and its tokens; output: the last one, when all of it is there."""

    text: str = ""
    tokens: int = 0
    output: Output | None = None


@dataclass(slots=True)
class Tally:
    """How many rows were answered, were in the result file when the run began, and were skipped."""

    answered: int = 0
    already: int = 0
    bad: int = 0

    def __str__(self) -> str:
        parts = [f"{self.answered} rows answered"]
        parts += [f"{self.already} were there already"] if self.already else []
        parts += [f"{self.bad} skipped"] if self.bad else []
        return ", ".join(parts)


def already_done(source: Path, result: Path) -> set[int]:
    """Numbers of the rows of `source` that `result` answers; a last line that a kill cut short is cut off.

    Raises UsageError when `result` was made from other rows.
    """
    done = repair(result)
    for number, line in lines(source):
        if done.get(number, mark := fingerprint(line)) != mark:
            raise UsageError(
                f"{result} was made from other rows than {source} (row {number} differs); "
                "remove it or name another --result_path",
                param="result_path",
            )
    return set(done)


def run_file(
    backend: Backend,
    source: Path,
    result: Path,
    done: set[int],
    make_request: Callable[[Row], Request],
    progress: Callable[[int, int], AbstractContextManager[Callable[[int], None]]],
) -> Tally:
    """Answer every row of `source` that is not in `done` and append the answers to `result`.

    make_request: a row to a Request whose id is the row's number. progress(total, done) is the bar; what it gives is
    called with the tokens of each finished row. A bad row is named on stderr with file, line and reason, and skipped.
    """
    tally = Tally(already=len(done))
    pending = ((number, line) for number, line in lines(source) if number not in done)
    total = sum(1 for _ in lines(source))
    rows: dict[int, Row] = {}

    def request_of(numbered: tuple[int, bytes]) -> Request:
        row = parse_row(*numbered)
        request = make_request(row)
        rows[row.number] = row
        return request

    with result.open("a", encoding="utf-8") as out, progress(total, len(done)) as advance:
        for (number, _), answer in answers(backend, pending, request_of):
            row = rows.pop(number, None)
            if row is None or not isinstance(answer, Answer):
                tally.bad += 1
                print(f"{source}:{number}: {answer}", file=sys.stderr)
                advance(0)
                continue
            out.write(result_line(row, answer))
            out.flush()
            tally.answered += 1
            advance(answer.tokens)
    return tally


def answers(
    backend: Backend, items: Iterable[T], make_request: Callable[[T], Request]
) -> Iterator[tuple[T, Answer | BaseException]]:
    """Each of `items` with its answer, in the order in which they end, or with why it has none.

    make_request: an item to a Request with an id of its own; BadRow and InvalidRequest mean that it cannot be sent.
    Items are taken only as far ahead as fills a batch. Leaving the iterator stops what runs.
    """
    outbox: queue.SimpleQueue[list[Output]] = queue.SimpleQueue()
    running: dict[str, tuple[T, Answer]] = {}
    items = iter(items)
    more = True
    try:
        while more or running:
            while more and len(running) < IN_FLIGHT:
                try:
                    item = next(items)
                except StopIteration:
                    more = False
                    break
                try:
                    request = make_request(item)
                    backend.submit([request], outbox)
                except (BadRow, InvalidRequest) as error:
                    yield item, error
                else:
                    running[request.id] = item, Answer()
            for output in outbox.get() if running else ():
                item, answer = running[output.request_id]
                answer.text += output.text
                answer.tokens += len(output.token_ids)
                if output.last:
                    del running[output.request_id]
                    answer.output = output
                    failed = output.finish_reason == "error"
                    yield item, (output.error or MartletError("the model failed")) if failed else answer
    finally:
        backend.abort(list(running))


def lines(source: Path) -> Iterator[tuple[int, bytes]]:
    """(line number from 1, line) of every line that is not blank."""
    with source.open("rb") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                yield number, line.strip()


def fingerprint(line: bytes) -> str:
    return f"{zlib.crc32(line):08x}"


def parse_row(number: int, line: bytes) -> Row:
    """A row of one of the forms {"messages": [...]}, {"query", "history", "system"} or {"prompt"}. Raises BadRow.

    An answer that the row brings along (a last assistant message, "response") is the label to compare with.
    """
    try:
        data = json.loads(line)
    except ValueError as error:
        raise BadRow(f"not JSON: {error}") from None
    if not isinstance(data, dict):
        raise BadRow(f"must be an object with messages, query or prompt, got {type(data).__name__}")
    rest = {k: v for k, v in data.items() if k not in ("messages", "query", "history", "system", "prompt", "response")}
    if "response" in data:
        rest["label"] = data["response"]
    messages: list[Message] | None = None
    prompt: str | None = None
    if "messages" in data:
        messages = data["messages"]
        if not isinstance(messages, list) or not all(isinstance(m, dict) and "role" in m for m in messages):
            raise BadRow("messages must be a list of objects with role and content")
        if messages and messages[-1]["role"] == "assistant":
            messages, rest["label"] = messages[:-1], messages[-1].get("content")
        if not messages:
            raise BadRow("messages holds no message to answer")
    elif "query" in data:
        messages = messages_of(data)
    elif "prompt" in data:
        prompt = data["prompt"]
        if not isinstance(prompt, str) or not prompt:
            raise BadRow("prompt must be a non-empty string")
    else:
        raise BadRow(f"has none of messages, query, prompt; its fields are {', '.join(data) or 'none'}")
    return Row(number, fingerprint(line), messages, prompt, rest)


def messages_of(data: dict[str, Any]) -> list[Message]:
    """Messages of a SWIFT row: system, history as [[query, response], ...], query."""
    query, history, system = data["query"], data.get("history") or [], data.get("system")
    if not isinstance(query, str):
        raise BadRow("query must be a string")
    if not isinstance(history, list) or not all(isinstance(t, list) and len(t) == 2 for t in history):
        raise BadRow("history must be a list of [query, response] pairs")
    if not (system is None or isinstance(system, str)):
        raise BadRow("system must be a string")
    messages = [] if system is None else [{"role": "system", "content": system}]
    for asked, said in history:
        messages += [{"role": "user", "content": asked}, {"role": "assistant", "content": said}]
    return [*messages, {"role": "user", "content": query}]


def result_line(row: Row, done: Answer) -> str:
    asked = {"prompt": row.prompt} if row.messages is None else {"messages": row.messages}
    assert done.output is not None
    answer = {
        "row": row.number,
        "fingerprint": row.fingerprint,
        "response": done.text,
        "finish_reason": done.output.finish_reason,
        "prompt_tokens": done.output.prompt_tokens,
        "completion_tokens": done.tokens,
    }
    return json.dumps({**row.rest, **asked, **answer}, ensure_ascii=False) + "\n"


def repair(result: Path) -> dict[int, str]:
    """Row number -> fingerprint of the rows that `result` holds. A last line cut short by a kill is cut off.

    Raises UsageError when the file holds something else.
    """
    done: dict[int, str] = {}
    if not result.exists():
        return done
    whole = 0
    with result.open("rb") as file:
        for line in file:
            if not line.endswith(b"\n"):
                break
            try:
                row = json.loads(line)
                done[row["row"]] = row["fingerprint"]
            except (ValueError, KeyError, TypeError):
                raise UsageError(
                    f"{result} holds lines that are not results of martlet infer; name another --result_path",
                    param="result_path",
                ) from None
            whole += len(line)
    if whole < result.stat().st_size:
        with result.open("rb+") as file:
            file.truncate(whole)
    return done
