"""A step in smaller steps, for when its activations do not fit: the same tokens come out, later.

Computing tokens again changes nothing, keys and values and sampled tokens included, so a step that ran out of memory
half way is simply begun again in pieces.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from martlet.runners.base import Batch, Masks, Step, StepResult, TokenLogprobs

LEAST = 64  # tokens of a piece below which nothing is cut any more


def pieces(batch: Batch, most: int) -> Iterator[tuple[np.ndarray, Batch]]:
    """(which of the batch's sequences, their share of the step), of at most `most` tokens, in order.

    A sequence may be in several pieces; the last of them samples. Rows, tables and copies are not repeated.
    """
    chunks: list[tuple[int, int, int, bool]] = []  # sequence, first token, tokens, samples
    sequences = zip(batch.start.tolist(), batch.count.tolist(), batch.sample.tolist(), strict=True)
    for b, (start, count, sample) in enumerate(sequences):
        while count:
            room = most - sum(chunk[2] for chunk in chunks)
            now = min(count, room)
            chunks.append((b, start, now, sample and now == count))
            start, count = start + now, count - now
            if now == room:
                yield _piece(batch, chunks)
                chunks = []
    if chunks:
        yield _piece(batch, chunks)


def _piece(batch: Batch, chunks: list[tuple[int, int, int, bool]]) -> tuple[np.ndarray, Batch]:
    which, start, count, sample = (np.array(column) for column in zip(*chunks, strict=True))
    return which, Batch(
        batch.rows[which],
        start.astype(np.int32),
        count.astype(np.int32),
        sample.astype(bool),
        masks=None if batch.masks is None else _masks(batch.masks, which, sample.astype(bool)),
    )


@dataclass(frozen=True, slots=True)
class PieceMasks:
    """Those masks of a step that a piece needs. of_step: their numbers among the step's masks."""

    step: Masks
    entries: np.ndarray
    of_step: np.ndarray

    def wait(self) -> np.ndarray:
        return self.step.wait()[self.of_step]


def _masks(masks: Masks, which: np.ndarray, sample: np.ndarray) -> PieceMasks | None:
    entries = np.flatnonzero(sample & np.isin(which, masks.entries))
    return PieceMasks(masks, entries, np.searchsorted(masks.entries, which[entries])) if len(entries) else None


@dataclass(frozen=True, slots=True)
class Joined:
    """The pieces of a step under way, each with the sequences it holds."""

    size: int
    parts: list[tuple[np.ndarray, Step]]

    def result(self) -> StepResult:
        tokens = np.full(self.size, -1, np.int32)
        logprobs: dict[int, TokenLogprobs] = {}
        prompt: dict[int, list[TokenLogprobs]] = {}
        for which, step in self.parts:
            result = step.result()
            there = result.tokens >= 0
            tokens[which[there]] = result.tokens[there]
            logprobs |= {int(which[b]): entry for b, entry in result.logprobs.items()}
            for b, entries in result.prompt_logprobs.items():
                prompt.setdefault(int(which[b]), []).extend(entries)
        return StepResult(tokens, logprobs, prompt)
