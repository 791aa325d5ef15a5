import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from martlet.engine.ngram import propose


def guess(tokens, count=3):
    return propose(np.array(tokens, np.int32), count).tolist()


def test_what_followed_before_is_guessed():
    assert guess([1, 2, 3, 4, 5, 9, 1, 2, 3, 4]) == [5, 9, 1]


def test_the_longer_match_wins_then_the_later_one():
    assert guess([1, 2, 3, 8, 2, 3, 9, 1, 2, 3], 1) == [8]
    assert guess([2, 3, 8, 2, 3, 9, 2, 3], 1) == [9]


def test_a_loop_goes_round():
    assert guess([7, 7, 7, 7, 7]) == [7, 7, 7]


def test_no_match_no_guess():
    assert guess([1, 2, 3]) == [] and guess([1]) == [] and guess([]) == []


@given(st.lists(st.integers(0, 3), max_size=40), st.integers(1, 6))
def test_a_guess_continues_some_earlier_place(tokens, count):
    found = guess(tokens, count)
    assert len(found) in (0, count)
    if found:
        places = [i for i in range(len(tokens) - 2) if tokens[i : i + 2] == tokens[-2:]]
        assert any(found == np.resize(tokens[i + 2 :], count).tolist() for i in places)
