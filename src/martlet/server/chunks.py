"""How OpenAI's chat completions and completions frame their answers: choices in one object, or chunk by chunk."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import orjson

from martlet.engine.request import Output
from martlet.server.errors import Problem
from martlet.server.generation import Choice, Job, Usage


class ChunkedShape(ABC):
    """A Shape whose subclasses only say what stands inside a choice."""

    object: str
    chunk_object: str
    _head = b""

    @abstractmethod
    def choice(self, choice: Choice) -> dict[str, Any]:
        """A finished choice."""

    @abstractmethod
    def chunks(self, choice: Choice, output: Output) -> list[dict[str, Any]]:
        """Pieces of a choice that `output` brings; may be none."""

    def body(self, job: Job, choices: list[Choice], usage: Usage) -> dict[str, Any]:
        return _head(job, self.object) | {
            "choices": [self.choice(choice) for choice in choices],
            "usage": openai_usage(usage),
        }

    def begin(self, job: Job) -> bytes:
        return b""

    def news(self, job: Job, choice: Choice, output: Output) -> bytes:
        pieces = self.chunks(choice, output)
        if not pieces:
            return b""
        if not self._head:  # the same in every event, so it is written once
            self._head = b"data: " + orjson.dumps(_head(job, self.chunk_object))[:-1] + b',"choices":['
        return b"".join([self._head + orjson.dumps(piece) + b"]}\n\n" for piece in pieces])

    def end(self, job: Job, choices: list[Choice], usage: Usage) -> bytes:
        told = {"choices": [], "usage": openai_usage(usage)}
        last = _event(_head(job, self.chunk_object) | told) if job.include_usage else b""
        return last + b"data: [DONE]\n\n"

    def failed(self, job: Job, problem: Problem) -> bytes:
        return _event(problem.body)


def openai_usage(usage: Usage) -> dict[str, Any]:
    told: dict[str, Any] = {
        "prompt_tokens": usage.prompt,
        "completion_tokens": usage.output,
        "total_tokens": usage.prompt + usage.output,
        "prompt_tokens_details": {"cached_tokens": usage.cached},
    }
    return told | {"completion_tokens_details": {"reasoning_tokens": usage.reasoning}} if usage.reasoning else told


def _head(job: Job, kind: str) -> dict[str, Any]:
    return {"id": job.id, "object": kind, "created": job.created, "model": job.model}


def _event(body: dict[str, Any]) -> bytes:
    return b"data: " + orjson.dumps(body) + b"\n\n"
