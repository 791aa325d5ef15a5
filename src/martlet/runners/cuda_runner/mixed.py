"""A step with prompts as words for the device: packed as it comes, or spread over the fixed places of a graph."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from martlet.runners.cuda_runner.decoder import StepTensors

MIXED_SEQUENCES = 16  # most sequences of several tokens in a graph
NO_TILE = 1 << 30  # a first query past any sequence's end


@dataclass(frozen=True, slots=True)
class HostStep:
    """A step in host memory, as `StepTensors` has it on the device: T tokens, the `decoding` sequences of one first.

    rows, positions [T]; tiles [2, tiles]; sequences [4, B]; picks [S].
    """

    rows: np.ndarray
    positions: np.ndarray
    decoding: int
    tiles: np.ndarray
    sequences: np.ndarray
    picks: np.ndarray


@dataclass(frozen=True, slots=True)
class Mixed:
    """The shape of a graph: up to `decodes` sequences of one token, then up to MIXED_SEQUENCES others, `tokens` in all.

    queries: tokens of an attention tile. adapted: rows may have adapters.
    What a step leaves over is padding: rows -1, tiles that begin past the end. Where sequences of one token are fewer
    than `decodes`, others stand behind them at once: they are attended as such too, and again in their tiles, last.
    """

    decodes: int
    tokens: int
    queries: int
    adapted: bool = False

    @property
    def sizes(self) -> list[int]:
        """Words of rows, positions, tiles, sequences and picks."""
        tiles = self.tokens // self.queries + MIXED_SEQUENCES
        return [self.tokens, self.tokens, 2 * tiles, 4 * MIXED_SEQUENCES, self.decodes + MIXED_SEQUENCES]

    @property
    def words(self) -> int:
        return sum(self.sizes)

    def padding(self) -> np.ndarray:
        """A step of nothing, int32 [words]."""
        words = np.zeros(self.words, np.int32)
        rows, _, tiles, *_ = self._parts(words)
        rows[:] = -1
        tiles[len(tiles) // 2 :] = NO_TILE
        return words

    def words_of(self, step: HostStep) -> np.ndarray:
        """A step spread out, int32 [words]. Its picks come first in the graph's."""
        words = self.padding()
        rows, positions, tiles, sequences, picks = self._parts(words)
        rows[: len(step.rows)] = step.rows
        positions[: len(step.rows)] = step.positions
        tiles.reshape(2, -1)[:, : step.tiles.shape[1]] = step.tiles
        sequences.reshape(4, -1)[:, : step.sequences.shape[1]] = step.sequences
        picks[: len(step.picks)] = step.picks
        return words

    def tensors(self, inbox: torch.Tensor) -> StepTensors:
        """The step as the decoder reads it from the first `words` of an inbox."""
        rows, positions, tiles, sequences, picks = inbox[: self.words].split(self.sizes)
        return StepTensors(
            rows, positions, self.decodes, tiles=tiles.view(2, -1), sequences=sequences.view(4, -1), picks=picks,
            adapted=self.adapted,
        )  # fmt: skip

    def _parts(self, words: np.ndarray) -> list[np.ndarray]:
        return np.split(words, np.cumsum(self.sizes)[:-1])
