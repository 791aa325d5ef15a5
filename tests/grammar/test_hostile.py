"""Grammars that would keep a process busy for minutes, or eat its memory, cost a 400 and nobody else anything."""

from __future__ import annotations

import random

import pytest
from toy_vocabulary import ToyTokenizer

from martlet.engine import constraints as module
from martlet.engine.constraints import Constraints
from martlet.errors import InvalidRequest
from martlet.grammar import Grammar, choice
from martlet.grammar.process import Worker, vocabulary

# Forty rules, each of which may begin with any of the others: a mask of it takes minutes.
TANGLE = "start: a0\n" + "\n".join(
    f"a{i}: " + " | ".join(f"a{j} a{k}" for j in range(1, 40) for k in (1, 7, 13)) + ' | "c"' for i in range(40)
)
FINE = choice(["abcabc", "abab"])


@pytest.fixture
def constraints(monkeypatch):
    monkeypatch.setattr(module, "CHECK_SECONDS", 1.0)
    monkeypatch.setattr(module, "MASK_SECONDS", 1.0)
    words = vocabulary(ToyTokenizer(), 40)
    found = Constraints(lambda slots: Worker(words, slots, 2), rows=4)
    yield found
    found.shutdown()


def test_a_tangle_is_refused_and_the_next_grammar_is_not(constraints):
    with pytest.raises(InvalidRequest, match="more than 1 s"):
        constraints.check(Grammar("lark", TANGLE))
    with pytest.raises(InvalidRequest, match="more than 1 s"):  # remembered, not tried again
        constraints.check(Grammar("lark", TANGLE))
    constraints.check(FINE)


def settle(constraints, *members):
    constraints.flush()
    for _ in range(600):
        constraints.poll(0.05)
        if all(one.ready or one.error for one in members):
            return
    raise AssertionError("no mask ever came")


@pytest.mark.parametrize("together", [False, True])
def test_a_grammar_that_gets_stuck_on_the_way_fails_alone(constraints, together):
    """Unchecked, as if it had behaved well while it was checked."""
    fine, stuck = constraints.open(FINE, "fine"), constraints.open(Grammar("lark", TANGLE), "stuck")
    constraints.enter(fine, 0)
    settle(constraints, fine)
    for token in (0, 1):
        constraints.advance(fine, token)
    if not together:
        settle(constraints, fine)
    constraints.enter(stuck, 1)
    settle(constraints, fine, stuck)
    assert fine.ready and fine.error is None
    bits, late = constraints.collect([fine])
    assert not late[0] and bits[0, 0] == 0b1101  # "a", "c" and "ab" go on from "ab"
    assert [one.owner for one in constraints.failed] == ["stuck"] and isinstance(stuck.error, InvalidRequest)


def test_a_worker_that_dies_is_replaced(constraints):
    fine = constraints.open(FINE, None)
    constraints.enter(fine, random.Random(0).randrange(4))
    settle(constraints, fine)
    constraints._port._process.kill()
    constraints._port._process.wait()
    constraints.advance(fine, 5)
    settle(constraints, fine)
    assert fine.error is None and constraints.collect([fine])[0][0, 0] == 0b101001
