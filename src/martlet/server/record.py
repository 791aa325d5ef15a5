"""What is remembered of one HTTP request until its line is logged and its numbers are counted. Never its text."""

from __future__ import annotations

import time
import uuid
from dataclasses import dataclass, field
from typing import Any


@dataclass(slots=True)
class Record:
    """Times are time.perf_counter() seconds. model is set once the request is known to be a generation.

    client: its address. key: number of the API key it brought, counted from 1. trace: id of the W3C trace it belongs
    to. queued: longest time that one of its prompts waited for a place in the batch. first_token: only of streams,
    whose first token is seen when it comes. finish: finish reasons of the choices, "abort" when the client left,
    "error" when it failed.
    """

    id: str = field(default_factory=lambda: uuid.uuid4().hex)
    started: float = field(default_factory=time.perf_counter)
    client: str = ""
    key: int | None = None
    trace: str = ""
    model: str = ""
    prompts: int = 0
    n: int = 1
    max_tokens: int | None = None
    stream: bool = False
    prompt_tokens: int = 0
    cached_tokens: int = 0
    output_tokens: int = 0
    queued: float | None = None
    first_token: float | None = None
    finish: str = ""

    def fields(self) -> dict[str, Any]:
        """What the log tells beyond method, path, status and time; nothing of what was not there."""
        found = {"client": self.client, "key": self.key, "trace": self.trace}
        if self.model:
            found |= {
                "model": self.model,
                "prompt": self.prompt_tokens,
                "cached": self.cached_tokens,
                "output": self.output_tokens,
                "finish": self.finish or "error",
                "queued": None if self.queued is None else round(self.queued, 3),
                "first_token": None if self.first_token is None else round(self.first_token - self.started, 3),
            }
        return {name: value for name, value in found.items() if value not in (None, "")}
