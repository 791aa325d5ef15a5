"""Names, versions and slots."""

from __future__ import annotations

import pytest
from fake_runner import FakeAdapter, FakeRunner, expected_tokens

from martlet.engine.adapters import AdapterNames, AdapterSlots
from martlet.engine.engine import Engine, drain
from martlet.engine.request import Request
from martlet.engine.scheduler import OVERTAKERS
from martlet.errors import ModelNotFound
from martlet.runners.base import MemoryPlan
from martlet.sampling_params import SamplingParams

PROMPT = list(range(10, 31))


def engine_with(slots: int, *names: str, rows: int = 8, lag: int = 0, **options) -> Engine:
    memory = MemoryPlan(block_size=4, num_blocks=200, max_rows=rows, max_model_len=80)
    engine = Engine(FakeRunner(memory, lag=lag, max_adapters=slots, **options))
    for tag, name in enumerate(names, 1):
        engine.adapters.put(name, FakeAdapter(tag))
    return engine


def ask(id: str, adapter: str | None, prompt=PROMPT, tokens: int = 8, priority: int = 0) -> Request:
    return Request(id, prompt, SamplingParams(seed=3, max_tokens=tokens), adapter=adapter, priority=priority)


def answers(outputs) -> dict[str, list[int]]:
    found: dict[str, list[int]] = {}
    for output in outputs:
        assert output.error is None
        found.setdefault(output.request_id, []).extend(output.token_ids)
    return found


def test_names_suggest_what_was_meant():
    names = AdapterNames()
    names.put("my_tuner", FakeAdapter(1))
    with pytest.raises(ModelNotFound, match=r"called 'my-tuner'; there is my_tuner. Did you mean my_tuner"):
        names.get("my-tuner")
    names.remove("my_tuner")
    with pytest.raises(ModelNotFound, match="none is loaded"):
        names.remove("my_tuner")


def test_the_least_recently_used_adapter_gives_way():
    loaded = []
    names, slots = AdapterNames(), AdapterSlots(2, lambda slot, adapter: loaded.append((slot, adapter.tag)))
    a, b, c = (names.put(name, FakeAdapter(tag)) for tag, name in enumerate("abc", 1))
    for version in (a, b, a):
        slots.acquire(version)
        slots.release(version)
    slots.acquire(c)  # b was used before a
    assert loaded == [(1, 1), (2, 2), (2, 3)]
    assert slots.acquire(a) == 1 and not slots.has_room(b) and slots.has_room(c)
    slots.release(c)
    assert slots.has_room(b) and slots.acquire(b) == 2


def test_a_mixed_batch_answers_as_each_alone():
    engine = engine_with(3, "a", "b", "c", max_prefill_tokens=256)
    wanted = {"0": 0, "1": 1, "2": 2, "3": 3, "4": 1, "5": 0}
    requests = [ask(id, [None, "a", "b", "c"][tag]) for id, tag in wanted.items()]
    for request in requests:
        engine.add(request)
    outputs = engine.step()
    assert engine.stats().running == 6
    while engine.has_work:
        outputs += engine.step()
    assert answers(outputs) == {id: expected_tokens(PROMPT, 3, 8, tag=tag) for id, tag in wanted.items()}
    assert engine.scheduler.adapters.loads == 3


def test_prompts_are_shared_by_requests_of_one_version_only():
    engine = engine_with(2, "a", "b")

    def cached(adapter) -> int:
        (last,) = drain(engine, [ask("x", adapter)])
        return last.cached_tokens

    assert [cached(None), cached("a"), cached("b")] == [0, 0, 0]
    assert [cached(None), cached("a"), cached("b")] == [20, 20, 20]
    engine.adapters.put("a", FakeAdapter(9))
    assert [cached("a"), cached("b"), cached("a")] == [0, 20, 20]


@pytest.mark.parametrize("lag", [0, 1])
def test_a_reload_is_for_those_that_come_after_it(lag):
    engine = engine_with(2, "a", lag=lag)
    engine.add(ask("old", "a"))
    outputs = engine.step() + engine.step()
    engine.adapters.put("a", FakeAdapter(5))
    engine.add(ask("new", "a"))
    outputs += engine.step()
    assert engine.stats().running == 2, "both versions run beside each other"
    engine.adapters.remove("a")
    with pytest.raises(ModelNotFound):
        engine.add(ask("late", "a"))
    while engine.has_work:
        outputs += engine.step()
    want = {"old": expected_tokens(PROMPT, 3, 8, tag=1), "new": expected_tokens(PROMPT, 3, 8, tag=5)}
    assert answers(outputs) == want


def test_one_removed_between_check_and_queue_fails_alone():
    engine = engine_with(1, "a")
    request = ask("x", "a")
    engine.check(request)
    engine.adapters.remove("a")
    engine.enqueue(request)
    engine.add(ask("y", None))
    outputs = []
    while engine.has_work:
        outputs += engine.step()
    errors = {output.request_id: output.error for output in outputs if output.last}
    assert isinstance(errors["x"], ModelNotFound) and errors["y"] is None


def test_more_adapters_than_slots_take_turns():
    engine = engine_with(2, *"abcdef")
    requests = [ask(f"{i}{name}", name) for i in range(2) for name in "abcdef"]
    outputs = drain(engine, requests)
    want = {r.id: expected_tokens(PROMPT, 3, 8, tag="abcdef".index(r.adapter) + 1) for r in requests}
    assert answers(outputs) == want
    assert engine.stats().running == 0 and engine.scheduler.adapters.loads <= 12


def test_who_waits_for_a_slot_is_passed_by_the_base_and_not_starved_by_others():
    engine = engine_with(1, "a", "b", rows=2, max_step_tokens=8, max_prefill_tokens=8)
    engine.add(ask("first", "a", tokens=40))
    engine.step()
    engine.add(ask("waits", "b", tokens=2))
    ended: list[str] = []
    number = 0
    while "waits" not in ended:
        number += 1
        engine.add(ask(f"base{number}", None, prompt=[1], tokens=1))
        engine.add(ask(f"a{number}", "a", prompt=[1], tokens=1))
        ended += [output.request_id for output in engine.step() if output.last]
    assert any(name.startswith("base") for name in ended)
    overtakers = [name for name in ended if name.startswith("a")]
    assert 0 < len(overtakers) <= OVERTAKERS


def test_an_adapter_that_cannot_be_put_into_its_slot_fails_its_request_alone():
    engine = engine_with(2, "a")
    engine.adapters.put("bad", FakeAdapter(7, broken=True))
    outputs = drain(engine, [ask("x", "bad"), ask("y", "a"), ask("z", None)])
    ends = {output.request_id: output.finish_reason for output in outputs if output.last}
    assert ends == {"x": "error", "y": "length", "z": "length"}
    engine.scheduler.check()
