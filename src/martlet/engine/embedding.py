"""Texts of many callers into batches of an encoder, one thread beside the callers'.

Whoever comes first is served first. A batch takes waiting texts up to a budget of tokens, whoever sent them, so that
many small requests cost one pass; a request longer than a batch is served over several.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future

import numpy as np

from martlet.errors import MartletError, Overloaded

log = logging.getLogger("martlet")

BATCH_TOKENS = 4096
"""Enough for BLAS to run at full speed; a pass over a small encoder then takes a fraction of a second."""


class EmbeddingQueue:
    """Batches calls of `encode`: token ids of texts -> float32 [texts, width]."""

    def __init__(
        self,
        encode: Callable[[Sequence[np.ndarray]], np.ndarray],
        *,
        batch_tokens: int = BATCH_TOKENS,
        max_waiting: int | None = None,
    ):
        """max_waiting: texts that may wait before new ones are refused."""
        self._encode, self._budget, self._max_waiting = encode, batch_tokens, max_waiting
        self._waiting: deque[tuple[np.ndarray, Future[np.ndarray]]] = deque()
        self._wake = threading.Condition()
        self._closing = False
        self.batches = self.texts = self.tokens = 0
        self._thread = threading.Thread(target=self._run, name="martlet-embedding", daemon=True)
        self._thread.start()

    def submit(self, texts: Sequence[np.ndarray]) -> list[Future[np.ndarray]]:
        """One future a text, of its vector. Cancel those nobody waits for. Raises Overloaded."""
        entries = [(text, Future()) for text in texts]
        with self._wake:
            if self._closing:
                raise MartletError("the encoder is shut down")
            if self._max_waiting is not None and len(self._waiting) + len(entries) > self._max_waiting:
                raise Overloaded(f"at most {self._max_waiting} texts may wait, and {len(self._waiting)} do")
            self._waiting += entries
            self._wake.notify()
        return [future for _, future in entries]

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    def close(self) -> None:
        """Finish the batch under way, fail what waits, stop the thread. Idempotent."""
        with self._wake:
            self._closing = True
            self._wake.notify()
        self._thread.join()

    def _run(self) -> None:
        while batch := self._take():
            texts, futures = zip(*batch, strict=True)
            try:
                vectors = self._encode(texts)
            except Exception as error:  # told to the callers of this batch; the next may do better
                log.exception("an encoder's batch failed")
                for future in futures:
                    future.set_exception(error)
            else:
                self.batches += 1
                self.texts += len(texts)
                self.tokens += sum(map(len, texts))
                for future, vector in zip(futures, vectors, strict=True):
                    future.set_result(vector)

    def _take(self) -> list[tuple[np.ndarray, Future[np.ndarray]]]:
        """The next batch; empty when it is time to stop."""
        with self._wake:
            batch: list[tuple[np.ndarray, Future[np.ndarray]]] = []
            while not batch:
                while not (self._waiting or self._closing):
                    self._wake.wait()
                if self._closing:
                    for _, future in self._waiting:
                        future.cancel()
                    return []
                room = self._budget
                while self._waiting and (not batch or len(self._waiting[0][0]) <= room):
                    text, future = self._waiting.popleft()
                    if future.set_running_or_notify_cancel():
                        batch.append((text, future))
                        room -= len(text)
            return batch
