"""How /v1/responses answers: items (reasoning, message, function call), at once or in numbered events.

One builder makes the items from the deltas of the parser; what it reports on the way are the events of a stream.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from typing import Any

import orjson

from martlet.chat import CallStart, Content, Delta, Reasoning
from martlet.engine.request import Output
from martlet.hub.tokenizer import Tokenizer
from martlet.server.errors import Problem
from martlet.server.generation import Choice, Job, Usage
from martlet.server.logprobs import chat_entries


class ResponseShape:
    """told: fields of the request that the response repeats."""

    def __init__(self, tokenizer: Tokenizer, told: Mapping[str, Any], *, wants_logprobs: bool):
        self._tokenizer = tokenizer
        self._told = told
        self._wants_logprobs = wants_logprobs
        self._items: Items | None = None
        self._number = 0

    def body(self, job: Job, choices: list[Choice], usage: Usage) -> dict[str, Any]:
        (choice,) = choices
        items = self._builder(job)
        for _ in items.add(choice.deltas, self._logprobs(choice.logprobs)):
            pass
        for _ in items.finish(_status(choice)):
            pass
        return self._response(job, choice, usage)

    def begin(self, job: Job) -> bytes:
        self._builder(job)
        head = self._response(job, None, None)
        return self._event("response.created", response=head) + self._event("response.in_progress", response=head)

    def news(self, job: Job, choice: Choice, output: Output) -> bytes:
        events = self._builder(job).add(choice.deltas, self._logprobs(output.logprobs))
        return b"".join([self._event(kind, **fields) for kind, fields in events])

    def end(self, job: Job, choices: list[Choice], usage: Usage) -> bytes:
        (choice,) = choices
        last = self._builder(job).finish(_status(choice))
        events = [self._event(kind, **fields) for kind, fields in last]
        whole = self._response(job, choice, usage)
        return b"".join([*events, self._event(f"response.{whole['status']}", response=whole)])

    def failed(self, job: Job, problem: Problem) -> bytes:
        said = problem.body["error"]
        whole = self._response(job, None, None) | {
            "status": "failed",
            "error": {"code": "server_error", "message": said["message"]},
        }
        error = self._event("error", code=said["code"], message=said["message"], param=said["param"])
        return error + self._event("response.failed", response=whole)

    def _builder(self, job: Job) -> Items:
        if self._items is None:
            self._items = Items(job.id.removeprefix("resp_"))
        return self._items

    def _event(self, kind: str, **fields: Any) -> bytes:
        body = {"type": kind, "sequence_number": self._number, **fields}
        self._number += 1
        return b"event: " + kind.encode() + b"\ndata: " + orjson.dumps(body) + b"\n\n"

    def _response(self, job: Job, choice: Choice | None, usage: Usage | None) -> dict[str, Any]:
        status = "in_progress" if choice is None else _status(choice)
        return {
            "id": job.id,
            "object": "response",
            "created_at": job.created,
            "completed_at": int(time.time()) if status == "completed" else None,
            "status": status,
            "error": None,
            "incomplete_details": {"reason": "max_output_tokens"} if status == "incomplete" else None,
            "model": job.model,
            "output": self._items.items if self._items and choice is not None else [],
            "usage": usage and _usage(usage),
            **self._told,
        }

    def _logprobs(self, entries: Any) -> list[dict[str, Any]]:
        return chat_entries(self._tokenizer, entries or ()) if self._wants_logprobs else []


class Items:
    """The items so far. One is open at a time; a delta of another kind closes it."""

    def __init__(self, id: str):
        self.items: list[dict[str, Any]] = []
        self._id = id
        self._kind = ""  # of the open item
        self._logprobs: list[dict[str, Any]] = []  # that wait for the text they belong to

    def add(self, deltas: Iterable[Delta], logprobs: list[dict[str, Any]]) -> Iterable[tuple[str, dict[str, Any]]]:
        self._logprobs += logprobs
        events: list[tuple[str, dict[str, Any]]] = []
        for delta in deltas:
            if isinstance(delta, CallStart):
                call = {"call_id": delta.id, "name": delta.name, "arguments": ""}
                events += self.finish("completed")
                events += self._open("function_call", "fc", call)
            elif isinstance(delta, (Content, Reasoning)):
                events += self._text("message" if isinstance(delta, Content) else "reasoning", delta.text)
            else:
                self.items[-1]["arguments"] += delta.text
                events.append(("response.function_call_arguments.delta", self._at() | {"delta": delta.text}))
        return events

    def finish(self, status: str) -> list[tuple[str, dict[str, Any]]]:
        """Close the open item, if there is one."""
        if not self._kind:
            return []
        item, kind, self._kind = self.items[-1], self._kind, ""
        item["status"] = status
        if kind == "function_call":
            name = "response.function_call_arguments.done"
            events = [(name, self._at() | {"arguments": item["arguments"], "name": item["name"]})]
        else:
            part = item["content"][0]
            if kind == "message":
                part["logprobs"] += self._logprobs
                self._logprobs = []
            done = self._at(part=True) | {"text": part["text"]}
            if kind == "message":
                done["logprobs"] = part["logprobs"]
            events = [
                (f"response.{part['type']}.done", done),
                ("response.content_part.done", self._at(part=True) | {"part": part}),
            ]
        return [*events, ("response.output_item.done", {"output_index": len(self.items) - 1, "item": item})]

    def _text(self, kind: str, text: str) -> Iterable[tuple[str, dict[str, Any]]]:
        events: list[tuple[str, dict[str, Any]]] = []
        if self._kind != kind:
            events += self.finish("completed")
            if kind == "message":
                part: dict[str, Any] = {"type": "output_text", "text": "", "annotations": [], "logprobs": []}
                events += self._open("message", "msg", {"role": "assistant", "content": []})
            else:
                part = {"type": "reasoning_text", "text": ""}
                events += self._open("reasoning", "rs", {"summary": [], "content": []})
            shown = {name: list(value) if isinstance(value, list) else value for name, value in part.items()}
            events.append(("response.content_part.added", self._at(part=True) | {"part": shown}))
            self.items[-1]["content"].append(part)
        part = self.items[-1]["content"][0]
        part["text"] += text
        delta = self._at(part=True) | {"delta": text}
        if kind == "message":
            part["logprobs"] += self._logprobs
            delta["logprobs"], self._logprobs = self._logprobs, []
        return [*events, (f"response.{part['type']}.delta", delta)]

    def _open(self, kind: str, prefix: str, more: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
        self._kind = kind
        item = {"id": f"{prefix}_{self._id}_{len(self.items)}", "type": kind, "status": "in_progress", **more}
        self.items.append(item)
        shown = {name: list(value) if isinstance(value, list) else value for name, value in item.items()}
        return [("response.output_item.added", {"output_index": len(self.items) - 1, "item": shown})]

    def _at(self, *, part: bool = False) -> dict[str, Any]:
        place = {"item_id": self.items[-1]["id"], "output_index": len(self.items) - 1}
        return place | {"content_index": 0} if part else place


def _status(choice: Choice) -> str:
    return "incomplete" if choice.finish_reason == "length" else "completed"


def _usage(usage: Usage) -> dict[str, Any]:
    return {
        "input_tokens": usage.prompt,
        "input_tokens_details": {"cached_tokens": usage.cached, "cache_write_tokens": 0},
        "output_tokens": usage.output,
        "output_tokens_details": {"reasoning_tokens": usage.reasoning},
        "total_tokens": usage.prompt + usage.output,
    }
