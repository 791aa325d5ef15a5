"""Our own engine as a backend."""

from __future__ import annotations

import functools
import logging
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TypeVar

from martlet.backends.base import NO_SLOTS, Backend, Sink, check_adapter_name
from martlet.engine import AsyncEngine, Engine
from martlet.engine.options import EngineOptions
from martlet.engine.request import Request, Stats
from martlet.errors import InvalidRequest
from martlet.grammar import Grammar
from martlet.hub.card import ModelCard
from martlet.hub.tokenizer import Tokenizer
from martlet.model.weights import read_spec
from martlet.runners.base import LoadOptions, Runner
from martlet.runners.sizing import size

T = TypeVar("T")
log = logging.getLogger("martlet")


class NativeBackend(Backend):
    """Owns the runner: closing the backend closes it."""

    name = "native"

    def __init__(
        self,
        card: ModelCard,
        tokenizer: Tokenizer,
        runner: Runner,
        options: EngineOptions | None = None,
        *,
        max_lora_rank: int = LoadOptions().max_lora_rank,
    ):
        self.card = card
        self.tokenizer = tokenizer
        self.vocab_size = runner.vocab_size
        self._max_adapters, self._max_lora_rank = runner.max_adapters, max_lora_rank
        engine = Engine(runner, tokenizer, options)
        self.max_model_len = engine.max_model_len
        self._engine = AsyncEngine(engine)

    def submit(self, requests: Iterable[Request], sink: Sink) -> None:
        self._engine.submit(requests, sink)

    def check_grammar(self, grammar: Grammar) -> None:
        self._engine.engine.check_grammar(grammar)

    def abort(self, request_ids: Iterable[str]) -> None:
        self._engine.abort(request_ids)

    def load_adapter(self, name: str, path: str | Path) -> None:
        if not self._max_adapters:
            raise InvalidRequest(NO_SLOTS, param="adapters")
        from martlet.model.adapters import read as read_adapter

        check_adapter_name(name)
        began = time.perf_counter()
        adapter = read_adapter(path, self.card, read_spec(self.card), self._max_lora_rank)
        if adapter.is_idle:
            log.warning("adapter %s changes nothing: all of its B are zero", name)
        self._engine.adapters.put(name, adapter)
        log.info(
            "adapter %s: rank %d, %s, in %.2f s", name, adapter.rank, size(adapter.nbytes), time.perf_counter() - began
        )

    def unload_adapter(self, name: str) -> None:
        self._engine.adapters.remove(name)

    def adapters(self) -> Sequence[str]:
        return self._engine.adapters.names()

    def stats(self) -> Stats:
        return self._engine.stats()

    def failure(self) -> str | None:
        return self._engine.failure

    def close(self) -> None:
        self._engine.close()


def load_native(
    card: ModelCard,
    load: LoadOptions,
    engine: EngineOptions,
    progress: Callable[..., None] | None = None,
) -> NativeBackend:
    """Reads the tokenizer while the runner reads the weights: one keeps Python busy, the other the memory.

    Not before: Python that two threads want at once is handed over every 5 ms, and the weights would wait for it.
    """
    from martlet import hub, runners

    tokenizer = functools.cache(lambda: _aside(lambda: hub.load_tokenizer(card)))
    runner = runners.load(card, load, progress=progress, reading=tokenizer)
    try:
        return NativeBackend(card, tokenizer()(), runner, engine, max_lora_rank=load.max_lora_rank)
    except BaseException:
        runner.close()
        raise


def _aside(work: Callable[[], T]) -> Callable[[], T]:
    """Begin `work` on a thread of its own. What is returned waits for it, and gives or raises what it did."""
    value, failure = [], []

    def run() -> None:
        try:
            value.append(work())
        except BaseException as error:
            failure.append(error)

    def result() -> T:
        thread.join()
        if failure:
            raise failure[0]
        return value[0]

    thread = threading.Thread(target=run)  # concurrent.futures would take 2 ms of every start
    thread.start()
    return result
