"""Random weights, so that a config.json alone can be run and measured."""

from __future__ import annotations

import hashlib
from functools import lru_cache
from math import prod
from typing import NoReturn

import numpy as np

from martlet.errors import CheckpointError

SCALE = 0.02  # standard deviation
_POOL = 1_048_583  # a prime, so that rows cut from a repeated pool differ


class DummyCheckpoint:
    """A checkpoint without a file. It cannot know names or shapes: ask it with `random(name, shape)`."""

    def __init__(self, seed: int = 0):
        self.seed = seed

    def random(self, name: str, shape: tuple[int, ...], dtype: np.dtype | type | None = None) -> np.ndarray:
        """An array that depends on seed and name alone: ones for norm weights, else N(0, 0.02).

        Made by repeating a pool of a million numbers from a place that the name decides: 16 GB in seconds. dtype:
        bfloat16 when not given.
        """
        import ml_dtypes

        dtype = ml_dtypes.bfloat16 if dtype is None else dtype
        if "norm" in name and not name.endswith("bias"):
            return np.ones(shape, dtype)
        pool = _pool(self.seed, np.dtype(dtype))
        start = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little") % _POOL
        return np.resize(np.roll(pool, -start), prod(shape)).reshape(shape)

    def names(self) -> list[str]:
        return []

    def shape(self, name: str) -> tuple[int, ...]:
        raise KeyError(name)

    def tensor(self, name: str) -> NoReturn:
        raise CheckpointError(f"dummy weights have no tensor {name}; they are made by random(name, shape)")

    def where(self, name: str) -> str:
        return "dummy weights"

    def close(self) -> None: ...


@lru_cache(maxsize=2)
def _pool(seed: int, dtype: np.dtype) -> np.ndarray:
    return (np.random.default_rng(seed).standard_normal(_POOL, np.float32) * SCALE).astype(dtype)
