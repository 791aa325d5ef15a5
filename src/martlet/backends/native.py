"""Our own engine as a backend."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from martlet.backends.base import Backend, Sink
from martlet.engine import AsyncEngine, Engine
from martlet.engine.options import EngineOptions
from martlet.engine.request import Request, Stats
from martlet.hub.card import ModelCard
from martlet.hub.tokenizer import Tokenizer
from martlet.runners.base import LoadOptions, Runner


class NativeBackend(Backend):
    """Owns the runner: closing the backend closes it."""

    name = "native"

    def __init__(self, card: ModelCard, tokenizer: Tokenizer, runner: Runner, options: EngineOptions | None = None):
        self.card = card
        self.tokenizer = tokenizer
        self.vocab_size = runner.vocab_size
        engine = Engine(runner, tokenizer, options)
        self.max_model_len = engine.max_model_len
        self._engine = AsyncEngine(engine)

    def submit(self, requests: Iterable[Request], sink: Sink) -> None:
        self._engine.submit(requests, sink)

    def abort(self, request_ids: Iterable[str]) -> None:
        self._engine.abort(request_ids)

    def stats(self) -> Stats:
        return self._engine.stats()

    def close(self) -> None:
        self._engine.close()


def load_native(
    card: ModelCard,
    tokenizer: Tokenizer,
    load: LoadOptions,
    engine: EngineOptions,
    progress: Callable[..., None] | None = None,
) -> NativeBackend:
    from martlet import runners

    return NativeBackend(card, tokenizer, runners.load(card, load, progress=progress), engine)
