"""The routing policy: balanced, sticky to what a replica has computed, and never to a replica that is gone."""

from __future__ import annotations

import json

from hypothesis import given
from hypothesis import strategies as st

from martlet.server.affinity import BLOCK_BYTES, MAX_BLOCKS, Affinity, beginnings

REPLICAS = ["a", "b", "c"]
EVENTS = st.lists(
    st.one_of(
        st.tuples(st.just("ask"), st.lists(st.sampled_from([b"1", b"2", b"3", b"4"]), max_size=3, unique=True)),
        st.tuples(st.just("end"), st.integers(0, 40)),
        st.tuples(st.just("keep"), st.sets(st.sampled_from(REPLICAS), min_size=1)),
    ),
    max_size=60,
)


def chat(*texts, **more):
    roles = ["user", "assistant"]
    messages = [{"role": roles[i % 2], "content": text} for i, text in enumerate(texts)]
    return json.dumps({"model": "m", "messages": messages, **more}).encode()


@given(EVENTS, st.integers(0, 3))
def test_loads_are_counted_and_the_first_is_never_far_from_the_least(events, margin):
    policy, running = Affinity(margin=margin), {}
    for number, (what, value) in enumerate(events):
        if what == "ask":
            ranked = policy.rank(value, REPLICAS)
            assert sorted(ranked) == REPLICAS
            loads = [policy.load(name) for name in REPLICAS]
            assert policy.load(ranked[0]) <= min(loads) + margin
            policy.began(str(number), ranked[0], value)
            running[str(number)] = ranked[0]
        elif what == "end":
            policy.ended(str(value))
            running.pop(str(value), None)
        else:
            policy.keep(list(value))
            running = {request: name for request, name in running.items() if name in value}
        assert {name: policy.load(name) for name in REPLICAS} == {
            name: list(running.values()).count(name) for name in REPLICAS
        }


@given(st.lists(st.text(min_size=1, max_size=900), min_size=1, max_size=6), st.text(max_size=900))
def test_a_conversation_that_goes_on_keeps_its_beginnings(texts, answer):
    before, after = beginnings(chat(*texts)), beginnings(chat(*texts, answer))
    whole = before[:-1]  # the last block may hold the bracket that closed the list
    assert after[: len(whole)] == whole and len(after) <= MAX_BLOCKS


def test_a_conversation_returns_to_its_replica_until_that_is_overloaded():
    policy = Affinity(margin=2)
    digests = beginnings(chat("x" * 3 * BLOCK_BYTES))
    home = policy.rank(digests, REPLICAS)[0]
    policy.began("0", home, digests)
    for request in ("1", "2"):
        assert policy.rank(digests, REPLICAS)[0] == home
        policy.began(request, home, digests)
    assert policy.rank(digests, REPLICAS)[0] != home
    policy.ended("0")
    assert policy.rank(digests, REPLICAS)[0] == home


def test_the_longest_known_beginning_wins():
    policy = Affinity()
    policy.began("1", "a", [b"shared"])
    policy.began("2", "b", [b"other", b"longer"])
    assert policy.rank([b"shared", b"longer"], REPLICAS)[0] == "b"
    assert policy.rank([b"shared", b"unknown"], REPLICAS)[0] == "a"


def test_a_replica_that_is_gone_is_forgotten():
    policy = Affinity()
    policy.began("1", "a", [b"1"])
    policy.keep(["b", "c"])
    assert policy.load("a") == 0 and policy.rank([b"1"], ["b", "c"])[0] in ("b", "c")
    assert policy.rank([], []) == []


def test_equally_loaded_replicas_take_turns():
    policy = Affinity()
    assert {policy.rank([], REPLICAS)[0] for _ in range(3)} == set(REPLICAS)


def test_only_so_much_is_remembered_and_the_shortest_beginning_longest():
    policy = Affinity(memory=2, margin=9)
    policy.began("1", "a", [b"1", b"2", b"3"])
    assert policy.rank([b"1"], REPLICAS)[0] == "a" and policy.rank([b"1", b"2"], REPLICAS)[0] == "a"
    policy.began("2", "b", [b"4", b"5"])
    policy.ended("2")
    policy.ended("1")
    assert {policy.rank([b"1"], REPLICAS)[0] for _ in range(3)} == set(REPLICAS)


def test_other_models_and_tools_are_other_beginnings():
    text = "x" * 2 * BLOCK_BYTES
    first = beginnings(chat(text))
    assert first[0] != beginnings(chat(text, tools=[{"type": "function"}]))[0]
    assert first[0] != beginnings(chat(text, model="other"))[0]
    assert first == beginnings(chat(text, temperature=0.5, stream=True))


def test_bodies_that_hold_no_prompt():
    for body in (b"", b"[", b"[1]", b'"text"', b"{}", b'{"prompt": null}', chat("short")):
        assert beginnings(body) == ()
