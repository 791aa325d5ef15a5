"""A model that makes embeddings and no text, behind the protocol of those that do."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from martlet.backends.base import Backend, Sink, warn_of_unused
from martlet.engine.embedding import EmbeddingQueue
from martlet.engine.options import EngineOptions
from martlet.engine.request import Request, Stats
from martlet.errors import InvalidRequest, UsageError
from martlet.hub.card import ModelCard
from martlet.hub.tokenizer import Tokenizer
from martlet.runners.base import LoadOptions
from martlet.runners.encoder_runner import EncoderRunner


class EncoderBackend(Backend):
    """Owns the runner and the thread that batches for it."""

    name = "native"

    def __init__(self, card: ModelCard, tokenizer: Tokenizer, runner: EncoderRunner, options: EngineOptions):
        self.card, self.tokenizer = card, tokenizer
        self.vocab_size, self.max_model_len = runner.spec.vocab_size, runner.spec.max_tokens
        self._queue = EmbeddingQueue(runner.encode, max_waiting=options.max_num_queued)
        self._failures = 0

    def embed(self, prompts: Sequence[Sequence[int]]) -> np.ndarray:
        texts = [self._checked(prompt, place) for place, prompt in enumerate(prompts)]
        futures = self._queue.submit(texts)
        try:
            return np.stack([future.result() for future in futures])
        finally:
            for future in futures:
                future.cancel()

    def _checked(self, prompt: Sequence[int], place: int) -> np.ndarray:
        if not 0 < len(prompt) <= self.max_model_len:
            raise InvalidRequest(
                f"input {place} has {len(prompt)} tokens; {self.card.name} takes 1 to {self.max_model_len}",
                param="input",
            )
        text = np.asarray(prompt, np.int64)
        if text.min() < 0 or text.max() >= self.vocab_size:
            raise InvalidRequest(f"token ids go from 0 to {self.vocab_size - 1}", param="input")
        return text

    def submit(self, requests: Iterable[Request], sink: Sink) -> None:
        raise InvalidRequest(
            f"{self.card.name} makes embeddings and writes no text; ask /v1/embeddings, or LLM.embed", param="model"
        )

    def abort(self, request_ids: Iterable[str]) -> None:
        """Nothing ever runs under an id."""

    def stats(self) -> Stats:
        return Stats(waiting=self._queue.waiting, prompt_tokens=self._queue.tokens, steps=self._queue.batches)

    def close(self) -> None:
        self._queue.close()


def load_encoder(card: ModelCard, tokenizer: Tokenizer, load: LoadOptions, engine: EngineOptions) -> EncoderBackend:
    """Raises CheckpointError, or UsageError for settings that encoders do not have."""
    if load.quant not in (None, "auto") or load.dtype not in ("auto", "float32"):
        raise UsageError(
            f"{card.name} is an encoder and runs in float32", param="dtype" if load.quant is None else "quant"
        )
    if load.device not in ("auto", "cpu"):
        raise UsageError(f"{card.name} is an encoder and runs on the CPU", param="device")
    if load.tensor_parallel_size != 1:
        raise UsageError(f"{card.name} is an encoder and runs in one process", param="tensor_parallel_size")
    warn_of_unused("encoder", ("device", "dtype", "quant", "seed", "max_num_queued"), load, engine)
    return EncoderBackend(card, tokenizer, EncoderRunner(card, load), engine)
