"""What is remembered of one HTTP request until its line is logged and its numbers are counted. Never its text."""

from __future__ import annotations

import time
import uuid
from dataclasses import dataclass, field


@dataclass(slots=True)
class Record:
    """Times are time.perf_counter() seconds. model is set once the request is known to be a generation.

    first_token: only of streams, whose first token is seen when it comes. finish: finish reasons of the choices,
    "abort" when the client left, "error" when it failed.
    """

    id: str = field(default_factory=lambda: uuid.uuid4().hex)
    started: float = field(default_factory=time.perf_counter)
    model: str = ""
    prompts: int = 0
    n: int = 1
    max_tokens: int | None = None
    stream: bool = False
    prompt_tokens: int = 0
    cached_tokens: int = 0
    output_tokens: int = 0
    first_token: float | None = None
    finish: str = ""

    def line(self, method: str, path: str, status: int) -> str:
        took = time.perf_counter() - self.started
        line = f"{self.id} {method} {path} {status} {took:.3f}s"
        if not self.model:
            return line
        line += f" model={self.model} prompt={self.prompt_tokens} cached={self.cached_tokens}"
        line += f" output={self.output_tokens} finish={self.finish or 'error'}"
        if self.first_token is not None:
            line += f" first_token={self.first_token - self.started:.3f}s"
        return line
