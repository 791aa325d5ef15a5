"""One protocol for whatever generates: our engine, transformers, vLLM. Everything above this line is backend-blind.

A backend takes requests from any thread and gives outputs to a sink. `generate` waits for them on the caller's thread;
the server brings a sink for its event loop (martlet.server.dispatch).
"""

from __future__ import annotations

import logging
import queue
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from martlet.engine.request import Output, Request, Stats
from martlet.errors import InvalidRequest
from martlet.grammar import Grammar
from martlet.hub.card import ModelCard
from martlet.hub.tokenizer import Tokenizer

log = logging.getLogger("martlet")


NO_SLOTS = "this model was loaded without slots for adapters; --enable_lora or --max_loras makes some"


class Sink(Protocol):
    """Where outputs go. `put` is called on the backend's thread, once a step, and must not block."""

    def put(self, outputs: list[Output]) -> None: ...


class Backend(ABC):
    """A loaded model that answers requests.

    max_model_len: prompt and output tokens together. max_logprobs: largest k of logprobs.
    """

    name: str
    card: ModelCard
    tokenizer: Tokenizer
    vocab_size: int
    max_model_len: int
    max_logprobs: int = 20

    @abstractmethod
    def submit(self, requests: Iterable[Request], sink: Sink) -> None:
        """Queue requests; their outputs go to `sink` until the one marked `last`.

        Raises InvalidRequest for a request that can never run; then none of the requests is queued.
        """

    def check_grammar(self, grammar: Grammar) -> None:
        """Raise InvalidRequest when answers cannot be held to `grammar`. Takes seconds at worst; any thread may ask."""
        raise InvalidRequest(f"the {self.name} backend does not follow grammars; the native one does", param="grammar")

    @abstractmethod
    def abort(self, request_ids: Iterable[str]) -> None:
        """Stop requests and free what they hold within a step. Unknown and finished ids are ignored.

        The sink still gets a last Output with finish_reason "abort".
        """

    def embed(self, prompts: Sequence[Sequence[int]]) -> np.ndarray:
        """Float32 [number of prompts, width]: one vector a prompt, of any length. Blocks; any thread may call it.

        Raises InvalidRequest when the model makes no embeddings, or a prompt is empty or too long.
        """
        raise InvalidRequest(f"{self.card.name} makes no embeddings", param="model")

    @abstractmethod
    def stats(self) -> Stats: ...

    def failure(self) -> str | None:
        """Why nothing will ever be answered again, so that whoever serves it should end; None while all is well."""
        return None

    @abstractmethod
    def close(self) -> None:
        """Abort what runs, free memory, join threads. Idempotent."""

    def adapters(self) -> Sequence[str]:
        """Names of the LoRA adapters that requests may name, in the order in which they came."""
        return ()

    def load_adapter(self, name: str, path: str | Path) -> None:
        """Read the PEFT folder at `path`, check it against the model, then let requests name it.

        Under a name that is taken it replaces that adapter at once: requests that run finish with the old one, those
        that come get the new one. Blocks while it reads; any thread may call it. Raises InvalidRequest, naming tensor
        and shapes where they do not fit, and then nothing has changed.
        """
        raise InvalidRequest(f"the {self.name} backend loads no adapters while it runs", param="lora_name")

    def unload_adapter(self, name: str) -> None:
        """Let no further request name it; those that run finish with it. Raises ModelNotFound."""
        raise InvalidRequest(f"the {self.name} backend loads no adapters while it runs", param="lora_name")

    def generate(self, requests: Iterable[Request]) -> Iterator[Output]:
        """Run requests and yield outputs as they come. Leaving the iterator early aborts the rest."""
        requests = list(requests)
        open_ids = {r.id for r in requests}
        outbox: queue.SimpleQueue[list[Output]] = queue.SimpleQueue()
        self.submit(requests, outbox)
        try:
            while open_ids:
                for output in outbox.get():
                    if output.last:
                        open_ids.discard(output.request_id)
                    yield output
        finally:
            if open_ids:
                self.abort(open_ids)


def check_adapter_name(name: str) -> None:
    """Raise InvalidRequest for what clients could not ask for."""
    if not 0 < len(name) <= 256 or not name.isprintable() or name != name.strip():
        raise InvalidRequest(f"an adapter's name is 1 to 256 printable characters, not {name!r}", param="adapters")


def check_request(request: Request, vocab_size: int, max_model_len: int, adapters: Collection[str] = ()) -> None:
    """What every backend without an engine of ours asks of a request. Raises InvalidRequest."""
    length = len(request.prompt_token_ids)
    if length == 0:
        raise InvalidRequest("the prompt is empty; give at least one token", param="prompt")
    if length >= max_model_len:
        raise InvalidRequest(
            f"the prompt has {length} tokens; this model takes at most {max_model_len} for prompt and output together",
            param="prompt",
        )
    if not 0 <= min(request.prompt_token_ids) <= max(request.prompt_token_ids) < vocab_size:
        raise InvalidRequest(f"prompt token ids go from 0 to {vocab_size - 1}", param="prompt")
    request.params.check_vocabulary(vocab_size)
    if request.adapter is not None and request.adapter not in adapters:
        there = ", ".join(adapters) or "none is loaded"
        raise InvalidRequest(f"no adapter is called {request.adapter!r}; there is {there}", param="model")


def warn_of_unused(backend: str, honoured: Collection[str], *options: Any) -> None:
    """Name the load and engine options that were set and that `backend` has no use for."""
    names = [
        field.name
        for group in options
        for field in fields(group)
        if field.name not in honoured and getattr(group, field.name) != field.default
    ]
    if names:
        log.warning("the %s backend has no use for %s", backend, ", ".join(names))
