"""Decoding steps as CUDA graphs: one for each batch size of a ladder and each kind of sampling.

A graph reads its step from a fixed buffer, `inbox`; rows past the batch's end are -1 and do nothing. Small sizes are
captured at the start, the others when first needed, in between steps; all share one memory pool, since they never run
at once.
"""

from __future__ import annotations

import bisect
import logging
import time

import numpy as np
import torch

from martlet.kernels.cuda import sampling
from martlet.runners.cuda_runner import sampler
from martlet.runners.cuda_runner.decoder import Decoder, State, StepTensors
from martlet.runners.cuda_runner.mailbox import Mailbox

log = logging.getLogger("martlet")

EAGER_SIZES = (8, 4, 2, 1)  # captured at the start


def ladder(most: int) -> list[int]:
    """Batch sizes that have a graph: steps stay within an eighth or so of the size, and `most` is the last."""
    sizes = [1, 2, 4, *range(8, 64, 8), *range(64, 256, 16), *range(256, most + 64, 64)]
    return [size for size in sizes if size < most] + [most]


class Graphs:
    """captured: (batch size, kind of sampling) -> the graph and the logits it leaves (kept for SPECIAL alone)."""

    def __init__(self, decoder: Decoder, state: State, max_rows: int):
        self.decoder, self.state = decoder, state
        self.sizes = ladder(max_rows)
        self.inbox = torch.full((4 * max_rows,), -1, dtype=torch.int32, device=decoder.device)
        self.out = torch.empty(max_rows, dtype=torch.int32, device=decoder.device)
        self.captured: dict[tuple[int, str], tuple[torch.cuda.CUDAGraph, torch.Tensor | None]] = {}
        self.pool = torch.cuda.graph_pool_handle()

    def capture_small(self) -> None:
        for size in EAGER_SIZES:
            if size <= self.sizes[-1]:
                self._graph(size, sampler.GREEDY)

    def run(
        self, rows: np.ndarray, positions: np.ndarray, changes: np.ndarray, kind: str, mailbox: Mailbox
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Replay a step of rows [B] at positions [B], changes int32 [2, n <= B] -> (tokens [>= B], logits [B, V]).

        Tokens are the next step's after it is launched, so the caller copies them; logits only for SPECIAL.
        """
        count = len(rows)
        size = self.sizes[bisect.bisect_left(self.sizes, count)]
        graph, logits = self._graph(size, kind)
        words = np.full((4, size), -1, np.int32)
        words[0, :count] = rows
        words[1] = 0
        words[1, :count] = positions
        words[2:, : changes.shape[1]] = changes
        mailbox.send(words.reshape(-1), self.inbox[: 4 * size])
        graph.replay()
        return self.out[:count], self.out if logits is None else logits[:count]

    def _graph(self, size: int, kind: str) -> tuple[torch.cuda.CUDAGraph, torch.Tensor | None]:
        found = self.captured.get((size, kind))
        if found is None:
            began = time.perf_counter()
            self.inbox.fill_(-1)
            self.inbox[size : 2 * size] = 0
            self._step(size, kind)  # compiles what is not compiled; all rows are padding, so it changes nothing
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=self.pool):
                logits = self._step(size, kind)
            found = self.captured[size, kind] = graph, logits
            log.debug("captured a step of %d sequences, %s, in %.2f s", size, kind, time.perf_counter() - began)
        return found

    def _step(self, size: int, kind: str) -> torch.Tensor | None:
        rows, positions = self.inbox[:size], self.inbox[size : 2 * size]
        changes = self.inbox[2 * size : 4 * size].view(2, size)
        step = StepTensors(rows, positions, size, changes=changes)
        logits = self.decoder.logits(self.decoder.forward(step, self.state))
        if kind == sampler.SPECIAL:
            return logits
        sampling.sample(
            logits, rows, positions, self.state.settings, self.state.tokens,
            greedy=kind == sampler.GREEDY, cut=kind == sampler.CUT, out=self.out[:size],
        )  # fmt: skip
        return None
