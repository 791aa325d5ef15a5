"""A calling thread that joins its steps late, and an engine that goes on meanwhile: the tokens are the same as ever."""

from __future__ import annotations

import gc
import os
import random
import time
import weakref
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from test_cpu_adapters import adapter
from test_cpu_recurrence import card as recurrent
from test_cpu_runner import TOKENS, VOCAB, Driver, card
from toy_grammar import END, constraints

from martlet.engine.engine import Engine
from martlet.engine.options import EngineOptions
from martlet.engine.request import Request
from martlet.grammar import Grammar
from martlet.hub.card import ModelCard
from martlet.model import families
from martlet.runners import machine
from martlet.runners.base import LoadOptions
from martlet.runners.cpu_runner import CpuRunner
from martlet.sampling_params import SamplingParams

GREEDY = SamplingParams(temperature=0)


def mixture() -> ModelCard:
    config = families.example("mixtral") | {
        "model_type": "mixtral",
        "vocab_size": VOCAB,
        "max_position_embeddings": 256,
    }
    return ModelCard("mixtral", Path("mixtral"), "dummy", "mixtral", config=config)


def load(one: ModelCard, **options) -> CpuRunner:
    settings = {"max_num_seqs": 4, "kv_cache_tokens": 1024, "max_model_len": 256, "quant": "int8"}
    return CpuRunner(one, LoadOptions(**settings | options))


def hesitate(runner: CpuRunner, rng: random.Random) -> None:
    """From now on the caller comes to a step at any time, or only to its end."""
    executor = runner.executor
    help, finish = executor.help, executor.finish

    def sleep():
        if (microseconds := rng.choice([0, 0, 20, 100, 400, 2000])) > 0:
            time.sleep(microseconds / 1e6)

    def late_help():
        sleep()
        if rng.random() < 0.6:
            help()
        sleep()

    def late_finish():
        sleep()
        finish()

    executor.help, executor.finish = late_help, late_finish


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("which", ["llama", "qwen2", "mixture", "rwkv6"])
def test_a_late_caller_changes_no_bit(which, threads, monkeypatch):
    monkeypatch.setattr(machine, "usable_cores", lambda: threads)
    found = []
    for late in (False, True):
        runner = load({"mixture": mixture, "rwkv6": lambda: recurrent("rwkv6")}.get(which, lambda: card(which))())
        assert runner.lag == (threads > 1)
        if late:
            hesitate(runner, random.Random(threads))
        driver, tokens, params = Driver(runner), [], replace(GREEDY, logprobs=5)
        work = [(row, length, True) for row, length in ((0, 70), (1, 3), (2, 130))]
        for i in range(40):
            enter = [(row, TOKENS[:length], params) for row, length, _ in work] if i == 0 else ()
            step = driver.launch(work, enter)
            runner.help(i % 5 == 0)
            result = step.result()
            tokens.append([(result.tokens.tolist(), [e.logprob for e in result.logprobs.values()])])
            work = [(row, 1, True) for row in ((0, 1, 2) if i % 3 else (1,))]
        found.append(tokens)
        runner.close()
    assert found[0] == found[1]


def events(seed: int, *, grammars: bool, names: list[str]) -> list[tuple]:
    """What befalls an engine: requests, aborts and new versions of adapters, with steps in between."""
    rng = random.Random(seed)
    shared = [rng.randrange(VOCAB) for _ in range(100)]
    found: list[tuple] = []
    for number in range(14):
        length = rng.choice([1, 3, 15, 16, 17, 33, 60])
        params = SamplingParams(
            n=rng.choice([1, 1, 1, 3]),
            temperature=rng.choice([0, 0, 1.0]),
            seed=rng.randrange(9),
            max_tokens=rng.randint(4, 30),
            stop_token_ids=[rng.randrange(VOCAB) for _ in range(rng.choice([0, 5]))],
            presence_penalty=rng.choice([0, 0, 0.5]),
            logit_bias={7: 2.0} if rng.random() < 0.2 else {},
            logprobs=rng.choice([None, None, 2]),
            prompt_logprobs=rng.choice([None, None, None, 2]),
            min_tokens=rng.choice([0, 0, 4]),
        )
        if grammars and rng.random() < 0.3:
            params = replace(params, grammar=Grammar("regex", "fine:9"), stop_token_ids=[END], min_tokens=0)
        prompt = shared[:length] if rng.random() < 0.5 else [rng.randrange(VOCAB) for _ in range(length)]
        adapted = rng.choice([None, *names])
        found.append(("add", Request(f"r{number}", prompt, params, stream=rng.random() < 0.7, adapter=adapted)))
        if names and rng.random() < 0.3:
            found.append(("put", rng.choice(names), rng.randrange(1, 6)))
        found.append(("step", rng.choice([0, 0, 1, 3, 9])))
        if rng.random() < 0.15:
            found.append(("abort", f"r{rng.randrange(number + 1)}"))
    return found


def answers(runner: CpuRunner, happens: list[tuple], names: list[str], **options) -> tuple[dict, Engine]:
    engine = Engine(
        runner,
        options=EngineOptions(seed=1, max_num_batched_tokens=40, **options),
        constraints=constraints(None, runner.memory.max_rows, -(-VOCAB // 32)),
    )
    found: dict = {}

    def step():
        for output in engine.step():
            tokens, logprobs, prompt = found.setdefault((output.request_id, output.index), ([], [], []))
            tokens += output.token_ids
            logprobs += [(e.token, e.logprob, e.rank) for e in output.logprobs or ()]
            prompt += [(e.token, e.logprob, e.rank) for e in output.prompt_logprobs or () if e is not None]
            assert output.finish_reason != "error", output.error
        engine.scheduler.check()

    for name in names:
        engine.adapters.put(name, adapter("llama", 1))
    for what, *rest in happens:
        if what == "add":
            engine.add(rest[0])
        elif what == "put":
            engine.adapters.put(rest[0], adapter("llama", rest[1]))
        elif what == "abort":
            engine.abort(rest[0])
        else:
            for _ in range(rest[0]):
                step()
    while engine.has_work:
        step()
    assert engine.stats().kv_blocks_used == 0
    return found, engine


@pytest.mark.parametrize("guesses", [0, 2])
@pytest.mark.parametrize("which", ["llama", "rwkv7", "grammars"])
def test_engines_that_run_ahead_give_the_same_answers(which, guesses):
    """Forks, preemption, prefix cache, adapters loaded and replaced, aborts, masks: all while steps are under way."""
    names = ["a", "b"] if which != "rwkv7" else []
    preemptions = loads = hits = 0
    for seed in range(6):
        happens, found = events(seed, grammars=which == "grammars", names=names), []
        gone = {rest[0] for what, *rest in happens if what == "abort"}
        for ahead in (False, True):
            if which == "rwkv7":
                runner = load(recurrent("rwkv7"), block_size=1, kv_cache_tokens=400)  # a snapshot every 16 tokens
            else:
                runner = load(card("llama"), kv_cache_tokens=112, max_adapters=1)
            if ahead:
                hesitate(runner, random.Random(seed))
            else:
                runner.lag = 0
            given, engine = answers(runner, happens, names, speculative_tokens=guesses)
            found.append(given)
            preemptions += engine.stats().preemptions
            hits += engine.stats().prefix_hits
            loads += engine.scheduler.adapters.loads
            engine.close()
        assert found[0].keys() == found[1].keys()
        for key, (before, now) in ((key, [f[key] for f in found]) for key in found[0]):
            for a, b in zip(before, now, strict=True):
                common = min(len(a), len(b)) if key[0] in gone else None
                assert a[:common] == b[:common], f"events {seed}: {key}"
    assert hits and (which == "rwkv7" or (preemptions > 5 and loads > 20)), "the events exercise too little"


def test_a_runner_may_go_while_a_step_is_under_way():
    for end in ("close", "forget", "close unread"):
        runner = load(card("llama"))
        driver = Driver(runner)
        step = driver.launch([(0, 100, True)], [(0, TOKENS[:100], GREEDY)])
        if end == "close":
            runner.close()
            assert 0 <= step.result().tokens[0] < VOCAB
        elif end == "close unread":
            driver.launch([(0, 1, True)])
            runner.close()
        else:
            gone = weakref.ref(runner)
            del runner, driver, step
            gc.collect()
            assert gone() is None


def test_a_forked_process_lets_the_threads_be():
    runner = load(card("llama"))
    Driver(runner).launch([(0, 100, True)], [(0, TOKENS[:100], GREEDY)])
    if (child := os.fork()) == 0:
        runner.executor.close()
        os._exit(7)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
    runner.close()


def test_an_adapter_waits_for_the_step_that_may_use_its_slot():
    runner = load(card("llama"), max_adapters=1)
    runner.load_adapter(1, adapter("llama", 1))
    tokens = []
    for late in (False, True):
        driver = Driver(runner)
        step = driver.launch([(0, 100, True)], [(0, TOKENS[:100], GREEDY)], adapter=1)
        if late:
            runner.load_adapter(1, adapter("llama", 2))
        tokens.append(step.result().tokens.tolist())
    driver = Driver(runner)
    other = driver.launch([(0, 100, True)], [(0, TOKENS[:100], GREEDY)], adapter=1).result().tokens.tolist()
    assert tokens[0] == tokens[1] != other
    runner.close()


def test_steps_follow_each_other_without_being_read():
    """The next step reads the token that this one samples; results may be asked for later."""
    runner = load(card("qwen3"))
    found, params = [], SamplingParams(temperature=1.5)
    for ahead in (False, True):
        driver, steps = Driver(runner), []
        for i in range(30):
            enter = [(0, TOKENS[:20], params), (1, TOKENS[:50], params)] if i == 0 else ()
            work = [(0, 1 if i else 20, True), (1, 1 if i else 50, True)]
            steps.append(driver.launch(work, enter))
            if not ahead:
                steps[-1] = steps[-1].result()
        found.append([(step.result() if ahead else step).tokens.tolist() for step in steps])
    assert found[0] == found[1]
    assert len(np.unique(found[0])) > 30
    runner.close()
