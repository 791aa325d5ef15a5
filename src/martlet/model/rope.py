"""Rotary position embedding as numbers: the frequencies every kernel shares. Plain numpy, float64 inside."""

from __future__ import annotations

import math

import numpy as np

from martlet.model.spec import Rope, RopeScaling


def inverse_frequencies(rope: Rope, length: int = 0) -> np.ndarray:
    """Radians per position of each rotated pair, float64 [dim / 2]: base ** (-2 i / dim), scaled.

    length: of the longest sequence that will be run, which decides between short and long factors.
    """
    plain = rope.base ** (-np.arange(0, rope.dim, 2, dtype=np.float64) / max(rope.dim, 1))
    return plain if rope.scaling is None else plain / scaling_factors(rope.scaling, plain, rope.base, length)


def scaling_factors(scaling: RopeScaling, plain: np.ndarray, base: float = 10000.0, length: int = 0) -> np.ndarray:
    """What the unscaled frequencies are divided by, float64, same shape as `plain`.

    llama3: wavelengths up to original / high_freq_factor stay, those above original / low_freq_factor are divided by
    `factor`, and in between the frequency goes linearly from one to the other. Source: the Llama 3.1 reference code.
    yarn: pairs that turn beta_fast times within the original length stay, those that turn beta_slow times or less are
    divided, in between the frequency goes linearly in the pair's number. Source: arXiv 2309.00071, section 3.2.
    """
    turns = scaling.original_max_positions * plain / (2 * math.pi)
    match scaling.kind:
        case "linear":
            return np.full_like(plain, scaling.factor)
        case "factors":
            factors = np.asarray(scaling.long if length > scaling.original_max_positions else scaling.short)
            if factors.shape != plain.shape:
                raise ValueError(f"{len(factors)} rope factors for {len(plain)} pairs")
            return factors
        case "llama3":
            span = scaling.high_freq_factor - scaling.low_freq_factor
            keep = np.clip((turns - scaling.low_freq_factor) / span, 0.0, 1.0)
        case "yarn":
            pairs = len(plain)

            def pair_that_turns(times: float) -> float:
                return pairs * math.log(scaling.original_max_positions / (times * 2 * math.pi)) / math.log(base)

            first, last = pair_that_turns(scaling.beta_fast), pair_that_turns(scaling.beta_slow)
            if scaling.truncate:
                first, last = math.floor(first), math.ceil(last)
            first, last = max(first, 0), min(last, 2 * pairs - 1)
            keep = 1.0 - np.clip((np.arange(pairs) - first) / max(last - first, 0.001), 0.0, 1.0)
    return 1.0 / (keep + (1.0 - keep) / scaling.factor)


def magnitude(rope: Rope) -> float:
    """What cos and sin are multiplied by."""
    return 1.0 if rope.scaling is None else rope.scaling.magnitude


def rotation_table(rope: Rope, length: int) -> tuple[np.ndarray, np.ndarray]:
    """(cos, sin), each float32 [length, dim / 2], of positions 0 ... length - 1, times the magnitude."""
    angles = np.outer(np.arange(length, dtype=np.float64), inverse_frequencies(rope, length))
    scale = magnitude(rope)
    return (np.cos(angles) * scale).astype(np.float32), (np.sin(angles) * scale).astype(np.float32)
