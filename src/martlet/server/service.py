"""What all endpoints share: the backend and its names, limits, and whether the server still takes requests."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping, Sequence
from typing import Any

from martlet.backends.base import Backend
from martlet.chat import Template
from martlet.errors import InvalidRequest, ModelNotFound, did_you_mean
from martlet.server.dispatch import Dispatcher
from martlet.server.errors import ApiError
from martlet.server.metrics import Metrics
from martlet.server.options import Limits

LONGEST_TOKEN = 128  # characters; vocabularies have runs of so many spaces, and no text is made of longer tokens


class Traffic:
    """The HTTP requests being answered, and whether more are taken."""

    def __init__(self, limits: Limits):
        self.limits = limits
        self.draining = False
        self.active: set[str] = set()  # ids of the HTTP requests being answered, except /health and /metrics
        self._idle = asyncio.Event()
        self._idle.set()

    def enter(self, request_id: str) -> None:
        self.active.add(request_id)
        self._idle.clear()

    def leave(self, request_id: str) -> None:
        self.active.discard(request_id)
        if not self.active:
            self._idle.set()

    async def idle(self) -> None:
        """Wait until no request is being answered."""
        await self._idle.wait()


class Service(Traffic):
    """template: None for a model that cannot chat. names: what clients may ask for; the
    first is the default. defaults: sampling settings of requests that leave them open. adapter_dir: clients may load
    adapters from below it.
    """

    def __init__(
        self,
        backend: Backend,
        template: Template | None,
        names: Sequence[str],
        defaults: Mapping[str, Any],
        limits: Limits,
        *,
        owned_by: str = "martlet",
        adapter_dir: str | None = None,
        max_num_queued: int | None = None,
    ):
        super().__init__(limits)
        self.backend = backend
        self.template = template
        self.names = tuple(names)
        self.defaults = dict(defaults)
        self.owned_by = owned_by
        self.adapter_dir = adapter_dir
        self.max_num_queued = max_num_queued  # the backend's own limit, for /ready
        self.created = int(time.time())
        self.metrics = Metrics(backend, self.names[0])
        self._dispatcher: Dispatcher | None = None

    @property
    def dispatcher(self) -> Dispatcher:
        if self._dispatcher is None:
            self._dispatcher = Dispatcher(asyncio.get_running_loop())
        return self._dispatcher

    def model_name(self, asked: str | None) -> str:
        """The name to answer with: the one that was asked for, or the default."""
        if asked is None:
            return self.names[0]
        names = (*self.names, *self.backend.adapters())
        if asked not in names:
            near = did_you_mean(asked, names)
            raise ModelNotFound(f"no model {asked[:200]!r} here; there is {', '.join(names)}.{near}", param="model")
        return asked

    def adapter(self, model: str) -> str | None:
        """The adapter that a model's name stands for; None for the base model."""
        return None if model in self.names else model

    def check_length(self, prompt_tokens: int, max_tokens: int | None, param: str) -> None:
        """Refuse what the model's length cannot hold; the engine would cut it short without a word."""
        most = self.backend.max_model_len
        if prompt_tokens + (max_tokens or 1) <= most:
            return
        wanted = f"{prompt_tokens} in {param}" + (f" and {max_tokens} to generate" if max_tokens else "")
        raise ApiError(
            400,
            f"this model holds {most} tokens, prompt and answer together; the request needs {wanted}",
            param=param,
            code="context_length_exceeded",
        )

    def check_characters(self, count: int, param: str) -> None:
        """Refuse a text that can never fit before its tokens are counted, which takes seconds for megabytes."""
        most = self.backend.max_model_len
        if count > LONGEST_TOKEN * most:
            said = f"{param}: {count} characters are more than the {most} tokens that this model holds"
            raise ApiError(400, said, param=param, code="context_length_exceeded")

    def check_sequences(self, prompts: int, n: int) -> None:
        if prompts * n > self.limits.max_sequences:
            raise InvalidRequest(
                f"{prompts} prompts times n = {n} is more than the {self.limits.max_sequences} sequences of a request",
                param="n",
            )

    def abort_all(self) -> None:
        if self._dispatcher is not None:
            self.backend.abort(self._dispatcher.open_ids)
