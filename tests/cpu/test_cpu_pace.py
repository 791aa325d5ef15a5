"""How many tokens a step may have: what was learnt makes steps of the wanted length, whatever the machine does."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from martlet.runners.cpu_runner.pace import FIRST, LEAST, MOST, ROUND, STEP_SECONDS, WINDOW, Pace


def settle(fixed: float, each: float, steps: int = 60) -> Pace:
    """A machine whose steps take `fixed` seconds and `each` more a token, kept busy with as much as it may have."""
    pace = Pace()
    for _ in range(steps):
        pace.saw(pace.tokens, fixed + each * pace.tokens)
    return pace


@pytest.mark.parametrize("fixed", [0.0, 0.002, 0.01])
@pytest.mark.parametrize("each", [0.0002, 0.0005, 0.001])
def test_steps_come_to_the_wanted_length(fixed, each):
    tokens = settle(fixed, each).tokens
    assert tokens == LEAST or fixed + each * tokens <= STEP_SECONDS
    fit = (STEP_SECONDS - fixed) / each
    assert tokens >= min(fit - 2 * ROUND, MOST), "slower than it needs to be"


def test_bounds():
    assert Pace().tokens == FIRST
    assert settle(0.0, 1e-9).tokens == settle(0.0, 0.0).tokens == MOST
    assert settle(0.0, 1.0).tokens == LEAST


@given(st.lists(st.floats(0.0, 1e6), max_size=WINDOW // 2))
def test_a_few_steps_that_were_held_up_change_nothing(seconds):
    pace = settle(0.0, 0.0005)
    before = pace.tokens
    for one in seconds:
        pace.saw(pace.tokens, one)
    fastest = Pace()
    for _ in range(WINDOW):
        fastest.saw(100, 0.05)
    assert pace.tokens == before == fastest.tokens


def test_it_follows_a_machine_that_becomes_slower():
    pace = settle(0.0, 0.0002)
    for _ in range(WINDOW):
        pace.saw(pace.tokens, 0.001 * pace.tokens)
    assert pace.tokens == 64


def test_short_steps_say_nothing():
    pace = settle(0.0, 0.0005)
    before = pace.tokens
    for _ in range(WINDOW):
        pace.saw(LEAST - 1, 5.0)
    assert pace.tokens == before
