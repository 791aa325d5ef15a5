"""Several ranks behind the seam of one runner: tensor parallelism.

The engine stays one: it runs in this process, which is rank 0. Every call it makes of its runner is written once to
shared memory (`ring`, `wire`), the other ranks read it and do the same, and all meet in the collectives of the forward
pass. Sampling is counted by seed, token and position and sees the same logits everywhere, so every rank samples the
same tokens and nothing is ever sent back. Masks of grammars are the one thing rank 0 learns late: it waits for them
right before sampling, as any runner does, and passes them on, so that on all ranks a step is the same code.

Whatever fails on all ranks alike (a request that breaks its step) is the engine's to deal with, as ever. A rank that
fails alone, dies or hangs ends everything: `watch` tells.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from martlet.errors import MartletError
from martlet.hub.card import ModelCard
from martlet.model import adapters
from martlet.model.adapters import Adapter
from martlet.runners.base import Batch, LoadOptions, Masks, Runner, Step, StepResult
from martlet.runners.parallel import wire
from martlet.runners.parallel.processes import Processes, RankFailure
from martlet.runners.parallel.share import check, load_share

__all__ = ["ParallelRunner", "RankFailure"]

log = logging.getLogger("martlet")


class ParallelRunner:
    """Rank 0 and the processes of the others. Contract: martlet.runners.base.Runner."""

    def __init__(self, card: ModelCard, options: LoadOptions, progress: Callable[[int, int], None] | None = None):
        """Raises UsageError when ranks cannot share the model evenly, and what loading a model raises."""
        check(card, options)
        began = time.perf_counter()
        self._ranks = Processes(options.tensor_parallel_size)
        try:
            self._ranks.send(wire.load(card, options))
            self._own = self._load(card, options, progress)
            self._ranks.loaded()
        except BaseException:
            self._ranks.close()
            raise
        own = self._own
        self.memory, self.vocab_size, self.lag = own.memory, own.vocab_size, own.lag
        self.max_drafts, self.max_adapters, self.spec = own.max_drafts, own.max_adapters, own.spec
        self._ranks.on_failure(self._let_go)
        log.info("%d ranks in %.2f s", options.tensor_parallel_size, time.perf_counter() - began)

    def _load(self, card: ModelCard, options: LoadOptions, progress: Callable[[int, int], None] | None) -> Runner:
        """Rank 0's share. On a thread, since it waits for the others in calls that nothing interrupts."""
        found: list[Runner | BaseException] = []

        def load() -> None:
            try:
                found.append(load_share(card, options, 0, self._ranks.store, progress))
            except BaseException as error:
                found.append(error)

        thread = threading.Thread(target=load, name="martlet-rank-0", daemon=True)
        thread.start()
        while thread.is_alive():
            thread.join(0.05)
            self._ranks.check()
        if isinstance(found[0], BaseException):
            raise found[0]
        return found[0]

    @property
    def max_step_tokens(self) -> int:
        return self._own.max_step_tokens

    @property
    def max_prefill_tokens(self) -> int:
        return self._own.max_prefill_tokens

    def watch(self, tell: Callable[[MartletError], None]) -> None:
        """Call `tell` once, on a thread of ours, when no step can run any more; a step under way may not return."""
        self._ranks.on_failure(tell)

    def _let_go(self, error: MartletError) -> None:
        """Rank 0 may wait for the lost one on its device; nobody waits for this."""
        if (let_go := getattr(self._own, "let_go", None)) is not None:
            threading.Thread(target=let_go, name="martlet-let-go", daemon=True).start()

    def load_adapter(self, slot: int, adapter: Adapter) -> None:
        number = self._ranks.send(wire.adapter(slot, adapter))
        self._alike(number, lambda: self._own.load_adapter(slot, adapters.cut(adapter, self.spec.part)))

    def get_ready(self) -> bool:
        get_ready = getattr(self._own, "get_ready", None)
        return get_ready is not None and self._alike(self._ranks.send(wire.ready()), get_ready)

    def launch(self, batch: Batch) -> Step:
        number = self._ranks.send(wire.step(batch))
        if batch.masks is None:
            return _Step(self._alike(number, lambda: self._own.launch(batch)), self._ranks)
        masks = _PassedOn(batch.masks, self._ranks)
        passing = batch._replace(masks=masks)

        def launch() -> Step:
            try:
                return self._own.launch(passing)
            finally:
                masks.send()

        return _Step(self._alike(number, launch), self._ranks)

    def _alike(self, number: int, do):
        """Do what message `number` says here too; an error is raised only if all ranks have it."""
        try:
            result = do()
        except RankFailure:
            raise
        except Exception:
            log.debug("rank 0 failed at message %d", number, exc_info=True)
            self._ranks.failed(number)
            raise
        self._ranks.succeeded(number)
        return result

    def close(self) -> None:
        self._ranks.close()
        if self._ranks.failure is None:
            self._own.close()


@dataclass(slots=True)
class _PassedOn:
    """Masks that the other ranks are sent once they are there."""

    masks: Masks
    ranks: Processes
    bits: np.ndarray | None = None

    @property
    def entries(self) -> np.ndarray:
        return self.masks.entries

    def wait(self) -> np.ndarray:
        if self.bits is None:
            self.bits = self.masks.wait()
            self.ranks.send(wire.masks(self.bits))
        return self.bits

    def send(self) -> None:
        """For a step that failed before it asked: the others wait for a message."""
        if self.bits is None:
            self.bits = np.zeros((0, 0), np.uint32)
            self.ranks.send(wire.masks(self.bits))


@dataclass(frozen=True, slots=True)
class _Step:
    """A step under way on all ranks."""

    own: Step
    ranks: Processes

    def result(self) -> StepResult:
        result = self.own.result()
        self.ranks.check()  # what was computed without a rank is not to be read
        return result
