"""The rule by which the soak on a GPU tells a wrong token from one that rounding changed."""

from __future__ import annotations

import runpy
from pathlib import Path

import numpy as np
import pytest

from martlet.kernels.philox import gumbel
from martlet.runners.base import TokenLogprobs

FILE = Path(__file__).parents[2] / "bench/gpu/soak.py"
VOCABULARY, POSITIONS, NOISE, SEED = 4000, 400, 0.05, 7


@pytest.fixture(scope="module")
def soak():
    return runpy.run_path(str(FILE))


def logprobs_of(logits: np.ndarray) -> np.ndarray:
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


def sampled(soak, logprobs: np.ndarray, position: int, k: int | None = None) -> int:
    """The token that the sampler draws: Gumbel-max among the first k."""
    ids = np.argsort(-logprobs)[: k or soak["TOP_K"]]
    return int(ids[np.argmax(logprobs[ids] / soak["TEMPERATURE"] + gumbel(SEED, position, ids))])


def entry(soak, logprobs: np.ndarray, token: int) -> TokenLogprobs:
    top = np.argsort(-logprobs)[: soak["TOP_K"] + 1]
    return TokenLogprobs(token, float(logprobs[token]), 0, top.astype(np.int32), logprobs[top].astype(np.float32))


def shares(soak, draw) -> float:
    """The share of positions at which a token that draw(noisy log-probabilities, position) gives is called wrong.

    Logits of random weights: nearly a normal distribution, whose first entries lie closer together than the noise.
    """
    rng = np.random.default_rng(0)
    wrong = 0
    for position in range(POSITIONS):
        logits = rng.normal(0, 1, VOCABULARY)
        as_drawn = logprobs_of(logits + rng.uniform(-NOISE / 2, NOISE / 2, VOCABULARY))
        token = draw(as_drawn, position)
        wrong += soak["shortfall"](entry(soak, logprobs_of(logits), token), SEED, position, 1.05 * NOISE) > 1.05 * NOISE
    return wrong / POSITIONS


def test_what_rounding_changes_is_not_wrong(soak):
    assert shares(soak, lambda logprobs, position: sampled(soak, logprobs, position)) == 0


@pytest.mark.parametrize(
    ("name", "draw"),
    [
        ("another position's noise", lambda s, logprobs, position: sampled(s, logprobs, position + 1)),
        ("no noise", lambda s, logprobs, position: int(np.argmax(logprobs))),
        ("a later k", lambda s, logprobs, position: sampled(s, logprobs, position, 3 * s["TOP_K"])),
    ],
)
def test_another_rule_is_wrong(soak, name, draw):
    assert shares(soak, lambda logprobs, position: draw(soak, logprobs, position)) > 0.2, name


def test_greedy_tokens_are_the_largest_ties_aside(soak):
    logprobs = logprobs_of(np.array([1.0, 0.99, *np.zeros(20)]))
    assert soak["shortfall"](entry(soak, logprobs, 0), None, 5, NOISE) == pytest.approx(0, abs=1e-6)
    assert soak["shortfall"](entry(soak, logprobs, 1), None, 5, NOISE) == pytest.approx(0.01, abs=1e-6)
    assert soak["shortfall"](entry(soak, logprobs, 3), None, 5, NOISE) == pytest.approx(1.0, abs=1e-6)
