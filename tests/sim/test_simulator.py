"""Thousands of random workloads through the real scheduler, pool and engine, on a fake network.

After every step the invariants are checked; at the end every answer must be the one the request would get alone.
"""

from __future__ import annotations

import random
from collections import defaultdict
from functools import partial
from itertools import count

import numpy as np
import pytest
from fake_runner import VOCAB, FakeAdapter, FakeRunner, LateRunner, expected_tokens, next_token
from toy_grammar import END, allowed, constraints

from martlet.engine.adapters import AdapterSlots, Version
from martlet.engine.block_pool import BlockPool
from martlet.engine.engine import Engine
from martlet.engine.memory import PagedMemory, SnapshotMemory
from martlet.engine.options import EngineOptions
from martlet.engine.request import Request
from martlet.engine.scheduler import Scheduler
from martlet.errors import InvalidRequest
from martlet.grammar import Grammar
from martlet.runners.base import MemoryPlan
from martlet.sampling_params import SamplingParams

WORKLOADS = 1500


def sometimes_right(tokens, count):
    """Guesses like no real text gives: right for one seed in three, and wrong from some place on."""
    context = tokens.tolist()
    for _ in range(count):
        context.append(next_token(np.array(context, np.int32), seed=len(tokens) % 3))
    guess = np.array(context[len(tokens) :], np.int32)
    guess[len(tokens) % (count + 1) :] += 1
    return guess % VOCAB


def simulate(seed: int, snapshots: bool = False) -> Engine:
    """One random machine under one random load. Returns the engine, idle again. snapshots: it runs a recurrence."""
    rng = random.Random(seed)
    block_size = rng.choice([1, 2, 3, 4, 8])
    blocks = rng.randint(4, 24)
    memory = MemoryPlan(
        block_size=block_size,
        num_blocks=rng.choice([0, 1, 2, blocks]) if snapshots else blocks,
        max_rows=rng.randint(1, 6),
        max_model_len=rng.randint(2, blocks * block_size),
        snapshots=snapshots,
    )
    chunk = rng.choice([1, 2, 5, 16, 64])
    alone = max(chunk, rng.choice([1, 8, 64]))
    slots = rng.choice([0, 0, 1, 2, 3])
    kind = rng.choice([LateRunner, partial(FakeRunner, lag=0), partial(FakeRunner, lag=1)])
    runner = kind(memory, max_step_tokens=chunk, max_prefill_tokens=alone, max_adapters=slots)
    runner.poison = rng.randrange(VOCAB) if rng.random() < 0.2 else None
    options = EngineOptions(
        enable_prefix_caching=rng.random() < 0.8, seed=seed, speculative_tokens=rng.choice([0, 0, 1, 3])
    )
    engine = Engine(runner, options=options, constraints=constraints(rng, memory.max_rows))
    tags = count(1)
    names = [f"a{i}" for i in range(rng.randint(1, 5))] if slots else []
    for name in names:
        engine.adapters.put(name, FakeAdapter(next(tags)))
    running_with: dict[str, FakeAdapter | None] = {}
    shared = [rng.randrange(VOCAB) for _ in range(memory.max_model_len)]
    requests: dict[str, Request] = {}
    aborted: set[str] = set()
    failed: set[str] = set()
    to_come = rng.randint(1, 8)
    answers: dict[tuple[str, int], list[int]] = defaultdict(list)
    closed: dict[str, int] = defaultdict(int)
    idle_steps = 0

    while to_come or engine.has_work:
        if to_come and (rng.random() < 0.3 or not engine.has_work):
            length = rng.randint(1, memory.max_model_len - 1)
            same = rng.randint(0, length)
            stops = [rng.randrange(VOCAB)] if rng.random() < 0.3 else []
            grammar = None
            if rng.random() < 0.25:
                kind = rng.choice(["fine"] * 8 + ["dead", "stuck"])
                grammar, stops = Grammar("regex", f"{kind}:{rng.randint(0, 12)}"), [END]
            request = Request(
                id=f"r{to_come}",
                prompt_token_ids=shared[:same] + [rng.randrange(VOCAB) for _ in range(length - same)],
                params=SamplingParams(
                    n=rng.choice([1, 1, 1, 2, 4]),
                    seed=rng.randrange(3),
                    max_tokens=rng.randint(1, 12),
                    stop_token_ids=stops,
                    grammar=grammar,
                ),
                priority=rng.choice([0, 0, 0, -1, 1]),
                stream=rng.random() < 0.5,
                cache_salt=rng.choice([None, None, "salt"]),
                adapter=rng.choice([None, *names]),
            )
            requests[request.id] = request
            engine.add(request)
            running_with[request.id] = request.adapter and engine.adapters.get(request.adapter).adapter
            to_come -= 1
        if requests and rng.random() < 0.03:
            victim = rng.choice(list(requests))
            aborted.add(victim)
            engine.abort(victim)
        if names and rng.random() < 0.1:  # running requests keep the version they came with
            engine.adapters.put(rng.choice(names), FakeAdapter(next(tags), broken=rng.random() < 0.05))
        if rng.random() < 0.003:
            runner.fail_next = True
        if rng.random() < 0.1:  # a runner may learn what its machine can do
            runner.max_step_tokens = max(1, rng.randint(chunk // 2, chunk * 2))
        before = runner.tokens_computed
        outputs = engine.step()
        engine.scheduler.check()
        if snapshots:
            held = max((len(seq.blocks) for seq in engine.scheduler.running), default=0)
            assert held <= (runner.lag + 1) * (max(chunk * 2, alone) // block_size + 1), "memory grows with the length"
        idle_steps = 0 if outputs or runner.tokens_computed > before else idle_steps + 1
        assert idle_steps < 100, "no progress"
        for output in outputs:
            answers[output.request_id, output.index] += output.token_ids
            assert not closed[output.request_id], "an output after the last one"
            closed[output.request_id] += output.last
            if output.finish_reason == "error":
                failed.add(output.request_id)
                asked = requests[output.request_id].params.grammar
                hostile = asked is not None and not asked.text.startswith("fine")
                assert hostile or not isinstance(output.error, InvalidRequest), "an innocent grammar was blamed"

    for request in requests.values():
        assert closed[request.id] == 1, "a request was lost"
        params = request.params
        if request.prompt_token_ids[0] == runner.poison:
            assert request.id in failed | aborted, "poison was survived"
            assert not any(answers[request.id, index] for index in range(params.n))
        for index in range(params.n):
            room = engine.max_model_len - len(request.prompt_token_ids)
            limit = min(params.max_tokens, room)
            tag = running_with[request.id].tag if running_with[request.id] else 0
            mask = (
                (lambda output, text=params.grammar.text: allowed(text, output)) if params.grammar else lambda _: None
            )
            context = (request.prompt_token_ids, params.seed + index, limit, params.stop_token_ids)
            want = expected_tokens(*context, tag, mask)
            got = answers[request.id, index]
            if request.id in aborted | failed:
                want = want[: len(got)]
            assert got == want, f"workload {seed}: {request.id}[{index}] got {got}, alone it gives {want}"
    stats = engine.stats()
    assert stats.running == stats.waiting == stats.kv_blocks_used == 0, "memory leaked"
    return engine


@pytest.fixture(autouse=True)
def guesses(monkeypatch):
    monkeypatch.setattr("martlet.engine.scheduler.propose", sometimes_right)
    monkeypatch.setattr("martlet.engine.constraints.PATIENCE", 0.0)


def test_random_workloads():
    preemptions = hits = loads = 0
    for seed in range(WORKLOADS):
        engine = simulate(seed)
        preemptions += engine.stats().preemptions
        hits += engine.stats().prefix_hits
        loads += engine.scheduler.adapters.loads
    assert loads > WORKLOADS / 2, "the workloads load hardly an adapter"
    assert preemptions > WORKLOADS / 10 and hits > WORKLOADS, "the workloads do not exercise what they should"


def test_random_workloads_of_recurrences():
    """Half as many: states and snapshots are what differs, the scheduler is the one above."""
    hits = sum(simulate(seed, snapshots=True).stats().prefix_hits for seed in range(WORKLOADS // 2))
    assert hits > WORKLOADS // 2, "the workloads do not exercise what they should"


BREAKAGES = {
    "a released block is not free": (BlockPool, "release", lambda self, blocks: None),
    "a shared block gains no owner": (BlockPool, "share", lambda self, blocks: None),
    "a taken block keeps its old digest": (BlockPool, "forget", lambda self, block: None),
    "a partial block is not copied": (PagedMemory, "adopt", "without_tail"),
    "wrong guesses count as computed": (Scheduler, "complete", "no_guess_is_taken_back"),
    "adapters share a prefix cache": (Version, "cache_key", "base"),
    "a slot in use is given away": (AdapterSlots, "release", lambda self, version: self._users.clear()),
    "running sequences get no new blocks": (Scheduler, "_make_room", lambda self, rows, target: False),
}


@pytest.mark.parametrize("what", BREAKAGES)
def test_a_broken_invariant_is_noticed(what, monkeypatch):
    owner, name, broken = BREAKAGES[what]
    if broken == "no_guess_is_taken_back":
        complete = Scheduler.complete

        def broken(self, plan, tokens):
            computed = self.table.computed.copy()
            result = complete(self, plan, tokens)
            self.table.computed[:] = np.minimum(computed, self.table.known)
            return result

    if broken == "without_tail":
        real = getattr(owner, name)

        def broken(self, seq, found):
            real(self, seq, found._replace(tail=None))

    monkeypatch.setattr(owner, name, broken)
    with pytest.raises((AssertionError, KeyError, IndexError)):
        for seed in range(200):
            simulate(seed)


BREAKAGES_OF_RECURRENCES = {
    "a snapshot in use gains no owner": (BlockPool, "share", lambda self, blocks: None),
    "a taken block keeps its old digest": (BlockPool, "forget", lambda self, block: None),
    "one token is forgotten": (SnapshotMemory, "rewind", PagedMemory.rewind),
    "forks go on from their leader": (SnapshotMemory, "reusable", PagedMemory.reusable),
    "snapshots are kept for ever": (SnapshotMemory, "computed", lambda self, rows, start, after: None),
    "snapshots of failed steps are believed": (SnapshotMemory, "extend", "registered_at_once"),
}


@pytest.mark.parametrize("what", BREAKAGES_OF_RECURRENCES)
def test_a_broken_recurrence_is_noticed(what, monkeypatch):
    owner, name, broken = BREAKAGES_OF_RECURRENCES[what]
    if broken == "registered_at_once":
        extend = SnapshotMemory.extend

        def broken(self, seq, tokens):
            extend(self, seq, tokens)
            digests = seq.block_digests(self.table.tokens[seq.row], tokens // self.block_size, self.block_size)
            for slot, block in zip(seq.slots, seq.blocks, strict=True):
                self.pool.register(block, digests[slot])
            return True

    monkeypatch.setattr(owner, name, broken)
    with pytest.raises((AssertionError, KeyError, IndexError, TypeError)):
        for seed in range(300):
            simulate(seed, snapshots=True)
