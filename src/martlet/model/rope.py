"""Rotary position embedding as numbers: the frequencies every kernel shares. Plain numpy, float64 inside."""

from __future__ import annotations

import math

import numpy as np

from martlet.model.spec import Rope, RopeScaling


def inverse_frequencies(rope: Rope) -> np.ndarray:
    """Radians per position of each rotated pair, float64 [dim / 2]: base ** (-2 i / dim), scaled."""
    plain = rope.base ** (-np.arange(0, rope.dim, 2, dtype=np.float64) / rope.dim)
    return plain if rope.scaling is None else plain / scaling_factors(rope.scaling, plain)


def scaling_factors(scaling: RopeScaling, plain: np.ndarray) -> np.ndarray:
    """What the unscaled frequencies are divided by, float64, same shape as `plain`.

    llama3: wavelengths up to original / high_freq_factor stay, those above original / low_freq_factor are divided by
    `factor`, and in between the frequency goes linearly from one to the other.
    """
    if scaling.kind == "linear":
        return np.full_like(plain, scaling.factor)
    turns = scaling.original_max_positions * plain / (2 * math.pi)
    span = scaling.high_freq_factor - scaling.low_freq_factor
    keep = np.clip((turns - scaling.low_freq_factor) / span, 0.0, 1.0)
    return 1.0 / (keep + (1.0 - keep) / scaling.factor)


def rotation_table(rope: Rope, length: int) -> tuple[np.ndarray, np.ndarray]:
    """(cos, sin), each float32 [length, dim / 2], of positions 0 ... length - 1."""
    angles = np.outer(np.arange(length, dtype=np.float64), inverse_frequencies(rope))
    return np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)
