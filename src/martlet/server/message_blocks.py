"""How /v1/messages answers: blocks (thinking, text, tool use), at once or in Anthropic's events."""

from __future__ import annotations

import json
from typing import Any

import orjson

from martlet.chat import CallStart, Content, Reasoning, Reply
from martlet.engine.request import Output
from martlet.server.errors import Problem, anthropic_body
from martlet.server.generation import Choice, Job, Usage

_STOP = {"length": "max_tokens", "tool_calls": "tool_use"}


class MessageShape:
    """stops: the stop sequences that the client asked for."""

    def __init__(self, stops: tuple[str, ...]):
        self._stops = stops
        self._kind = ""  # of the open block
        self._index = -1

    def body(self, job: Job, choices: list[Choice], usage: Usage) -> dict[str, Any]:
        (choice,) = choices
        message = _message(job, _usage(usage)) | self._end(choice)
        reply = Reply()
        blocks: list[dict[str, Any]] = []
        for delta in choice.deltas:  # all of them: one output brings a whole answer that is not streamed
            kind = "call" if isinstance(delta, CallStart) else _kind(delta)
            if kind == "call" or (kind and (not blocks or blocks[-1]["type"] != kind)):
                blocks.append(_block(delta))
            if isinstance(delta, Content):
                blocks[-1]["text"] += delta.text
            elif isinstance(delta, Reasoning):
                blocks[-1]["thinking"] += delta.text
            reply.add([delta])
        calls = iter(reply.calls)
        for block in blocks:
            if block["type"] == "tool_use":
                block["input"] = _input(next(calls).arguments)
        return message | {"content": blocks}

    def begin(self, job: Job) -> bytes:
        usage = Usage(sum(len(request.prompt_token_ids) for request in job.requests), 0, 0)
        return _event("message_start", message=_message(job, _usage(usage))) + _event("ping")

    def news(self, job: Job, choice: Choice, output: Output) -> bytes:
        events = []
        for delta in choice.deltas:
            kind = _kind(delta)
            if isinstance(delta, CallStart) or (kind and kind != self._kind):
                events.append(self._close())
                self._kind, self._index = kind or "tool_use", self._index + 1
                events.append(_event("content_block_start", index=self._index, content_block=_block(delta)))
            if isinstance(delta, Content):
                piece = {"type": "text_delta", "text": delta.text}
            elif isinstance(delta, Reasoning):
                piece = {"type": "thinking_delta", "thinking": delta.text}
            elif isinstance(delta, CallStart):
                continue
            else:
                piece = {"type": "input_json_delta", "partial_json": delta.text}
            events.append(_event("content_block_delta", index=self._index, delta=piece))
        return b"".join(events)

    def end(self, job: Job, choices: list[Choice], usage: Usage) -> bytes:
        (choice,) = choices
        delta = _event("message_delta", delta=self._end(choice), usage=_usage(usage))
        return self._close() + delta + _event("message_stop")

    def failed(self, job: Job, problem: Problem) -> bytes:
        body = anthropic_body(problem, job.id.removeprefix("msg_"))
        return b"event: error\ndata: " + orjson.dumps(body) + b"\n\n"

    def _close(self) -> bytes:
        if not self._kind:
            return b""
        self._kind = ""
        return _event("content_block_stop", index=self._index)

    def _end(self, choice: Choice) -> dict[str, Any]:
        if choice.finish_reason == "stop" and choice.stop_reason in self._stops:
            return {"stop_reason": "stop_sequence", "stop_sequence": choice.stop_reason}
        return {"stop_reason": _STOP.get(choice.finish_reason or "", "end_turn"), "stop_sequence": None}


def _kind(delta: Any) -> str:
    """The type of block that a delta goes on with; "" for what only a call can have."""
    return "text" if isinstance(delta, Content) else "thinking" if isinstance(delta, Reasoning) else ""


def _block(delta: Any) -> dict[str, Any]:
    """The empty block that a delta begins."""
    if isinstance(delta, CallStart):
        return {"type": "tool_use", "id": delta.id, "name": delta.name, "input": {}}
    if isinstance(delta, Reasoning):
        return {"type": "thinking", "thinking": "", "signature": ""}
    return {"type": "text", "text": ""}


def _input(arguments: str) -> dict[str, Any]:
    """Anthropic's clients want an object; an answer that was cut off in its arguments has none (see stop_reason)."""
    try:
        found = json.loads(arguments)
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def _message(job: Job, usage: dict[str, int]) -> dict[str, Any]:
    return {
        "id": job.id,
        "type": "message",
        "role": "assistant",
        "model": job.model,
        "content": [],
        "stop_reason": None,
        "stop_sequence": None,
        "usage": usage,
    }


def _usage(usage: Usage) -> dict[str, int]:
    """Anthropic counts tokens from the cache beside the input, not in it."""
    return {
        "input_tokens": usage.prompt - usage.cached,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": usage.cached,
        "output_tokens": usage.output,
    }


def _event(kind: str, **fields: Any) -> bytes:
    return b"event: " + kind.encode() + b"\ndata: " + orjson.dumps({"type": kind, **fields}) + b"\n\n"
