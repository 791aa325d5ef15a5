"""Ranks over gloo on the CPU: the same tokens as one rank, and what happens when a rank dies, hangs or fails."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "cuda"))
from engines import answers, card, check, options
from toy_grammar import END, constraints

from martlet.engine import AsyncEngine
from martlet.engine.engine import Engine, drain
from martlet.engine.options import EngineOptions
from martlet.engine.request import Request
from martlet.errors import MartletError, UsageError
from martlet.grammar import Grammar
from martlet.hub.card import ModelCard
from martlet.hub.peft import Lora
from martlet.model import families
from martlet.model.adapters import TARGETS, Adapter
from martlet.model.weights import parameters, read_spec
from martlet.runners import load
from martlet.runners.base import Batch, NewRow
from martlet.runners.parallel import ParallelRunner, RankFailure, processes, wire, worker
from martlet.runners.parallel.ring import Reader, Writer
from martlet.runners.torch_runner import TorchRunner
from martlet.sampling_params import SamplingParams

MIXTURE = ModelCard("m", Path("-"), "dummy", "qwen2_moe", config=families.example("qwen2_moe"))
GREEDY = SamplingParams(temperature=0, max_tokens=5, ignore_eos=True)


def ranks(runner: ParallelRunner) -> list[int]:
    return [process.pid for process in runner._ranks._processes]


def gone(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


def until(condition, seconds: float = 10.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.01)


@pytest.fixture(scope="module")
def two():
    """The llama of tests/cuda on two ranks, with two slots for adapters."""
    runner = load(card("llama"), options("cpu", tensor_parallel_size=2, max_adapters=2))
    yield runner
    pids = ranks(runner)
    runner.close()
    assert all(map(gone, pids))


def test_two_ranks_give_the_tokens_of_one(two):
    want = answers(TorchRunner(card("llama"), options("cpu")))
    check(answers(two), want)
    check(answers(two, max_num_batched_tokens=7, enable_prefix_caching=False), want)


@pytest.mark.parametrize(("family", "size"), [("llama", 4), ("gemma2", 2)])  # 4 ranks share 2 key heads
def test_other_numbers_and_families_do(family, size):
    runner = load(card(family), options("cpu", tensor_parallel_size=size))
    check(answers(runner), answers(TorchRunner(card(family), options("cpu"))))
    runner.close()


def test_a_mixture_of_experts_is_shared_too():
    prompts = [Request(str(i), [3 + i, 9, 4 + 2 * i], GREEDY) for i in range(3)]
    found = []
    for runner in (TorchRunner(MIXTURE, options("cpu")), load(MIXTURE, options("cpu", tensor_parallel_size=2))):
        found.append({o.request_id: o.token_ids for o in drain(Engine(runner), prompts)})
        runner.close()
    assert found[0] == found[1] and len(set(map(tuple, found[0].values()))) == 3


@pytest.mark.parametrize("family", ["rwkv5", "rwkv6", "rwkv7"])
def test_a_recurrence_is_shared_by_heads(family):
    whole = ModelCard(family, Path("-"), "dummy", family, config=families.example(family) | {"vocab_size": 300})
    settings = {"block_size": 16, "kv_cache_tokens": 2048}
    runner = load(whole, options("cpu", tensor_parallel_size=2, **settings))
    want = answers(TorchRunner(whole, options("cpu", **settings)))
    check(answers(runner, max_num_batched_tokens=7), want)
    runner.close()


def test_a_rank_gets_ready_when_it_is_told_to():
    class Ready:
        told = 0

        def get_ready(self) -> bool:
            self.told += 1
            return True

    runner = Ready()
    worker.do(runner, wire.unpack(b"".join(wire.ready())), receive=None)
    assert runner.told == 1


def test_ranks_without_anything_to_get_ready_are_not_asked(two, monkeypatch):
    monkeypatch.setattr(two._ranks, "send", None)
    assert not two.get_ready()


def test_adapters_and_grammars_reach_all_ranks(two):
    rng = np.random.default_rng(1)
    loras = {}
    for parameter in parameters(read_spec(card("llama"))):
        if parameter.name.rpartition(".")[2] in TARGETS:
            a, b = (rng.standard_normal(s, np.float32) for s in ((4, parameter.shape[1]), (parameter.shape[0], 4)))
            loras[parameter.name] = Lora(a, b, 0.1)
    adapter = Adapter(Path("-"), None, 4, loras)

    def answered(runner):
        engine = Engine(runner, options=EngineOptions(seed=0), constraints=constraints(None, 6, words=10))
        engine.adapters.put("tuned", adapter)
        params = SamplingParams(temperature=0, max_tokens=3, stop_token_ids=[END], grammar=Grammar("regex", "fine:2"))
        asked = [
            Request("grammar", [5, 9, 2], params),
            Request("base", [5, 9, 2], GREEDY),
            Request("tuned", [5, 9, 2], GREEDY, adapter="tuned"),
        ]
        return {output.request_id: output.token_ids for output in drain(engine, asked)}

    want = answered(TorchRunner(card("llama"), options("cpu", max_adapters=2)))
    assert answered(two) == want and want["base"] != want["tuned"] and want["grammar"][-1] == END


def test_a_step_that_fails_on_all_ranks_is_the_engines_to_deal_with(two):
    def step(row: int) -> Batch:
        one = np.array([1], np.int32)
        new = NewRow(0, np.array([4], np.int32), 1, GREEDY, 0)
        return Batch(np.array([row], np.int32), 0 * one, one, one > 0, new_rows=[new])

    with pytest.raises(IndexError):
        two.launch(step(99))
    for _ in range(2):
        assert two.launch(step(0)).result().tokens[0] >= 0
        time.sleep(3 * processes.LOOK)  # whoever watches the ranks has looked


def test_what_cannot_be_shared_says_what_would_work():
    with pytest.raises(UsageError, match=r"3: this model has 4 attention heads; 1, 2 or 4 would work"):
        load(card("llama"), options("cpu", tensor_parallel_size=3))
    with pytest.raises(UsageError, match=r"2: 0 GPUs are visible .* --device cpu"):
        load(card("llama"), options("auto", tensor_parallel_size=2))


def test_an_error_of_one_rank_while_loading_is_the_error_of_the_load(monkeypatch):
    monkeypatch.setattr(wire, "load", lambda card, options: wire.pack("load", card={"nothing": 1}, options={}))
    began = time.monotonic()
    with pytest.raises(RankFailure, match="rank 1 of 2 failed with KeyError"):
        load(card("llama"), options("cpu", tensor_parallel_size=2))
    assert time.monotonic() - began < 30


class Box(list):
    put = list.extend


@pytest.mark.parametrize("blow", [signal.SIGKILL, signal.SIGSTOP])
def test_a_rank_that_dies_or_hangs_fails_what_runs_and_leaves_nothing(blow, monkeypatch):
    monkeypatch.setattr(processes, "SILENT", 1.5)
    runner = load(card("llama"), options("cpu", tensor_parallel_size=2, max_model_len=256, kv_cache_tokens=2048))
    (pid,), engine, box = ranks(runner), AsyncEngine(Engine(runner)), Box()
    endless = SamplingParams(temperature=0, max_tokens=250, ignore_eos=True)
    engine.submit([Request("0", [1, 2], endless, stream=True)], box)
    until(lambda: len(box) > 3)
    began = time.monotonic()
    os.kill(pid, blow)
    until(lambda: box[-1].last)
    assert time.monotonic() - began < 8
    told = "ended by SIGKILL" if blow == signal.SIGKILL else "no sign of life"
    assert told in str(box[-1].error) and told in engine.stats().error and told in engine.failure
    with pytest.raises(MartletError, match=told):
        engine.submit([Request("1", [1, 2], endless)], box)
    engine.close()
    until(lambda: gone(pid))


def test_ranks_outlive_a_sleep_of_the_machine(two, monkeypatch):
    real = time.monotonic
    monkeypatch.setattr(time, "monotonic", lambda: real() + 100)
    time.sleep(4 * processes.LOOK)
    answers = drain(Engine(two), [Request("0", [1, 2], GREEDY)])
    assert not answers[-1].error and len(answers[-1].token_ids) > 0


def test_ranks_end_with_rank_0():
    script = "import sys; sys.path[:0] = sys.argv[1:]; import test_parallel as t; t.wait_for_the_end()"
    folders = [str(Path(__file__).parent), str(Path(__file__).parents[1] / "sim")]
    parent = subprocess.Popen([sys.executable, "-c", script, *folders], stdout=subprocess.PIPE, text=True)
    pid = int(parent.stdout.readline())
    assert not gone(pid)
    parent.kill()
    parent.wait()
    until(lambda: gone(pid))


def wait_for_the_end() -> None:
    print(*ranks(load(card("llama"), options("cpu", tensor_parallel_size=2))), flush=True)
    time.sleep(60)


def test_messages_longer_than_the_ring_arrive_whole():
    writer = Writer(2, capacity=1000)
    reader = Reader(writer.fd, writer.doorbells[0], 1, 2, capacity=1000)
    sent = [bytes([n % 251]) * (n * 37 % 700) for n in range(60)]

    def check() -> None:
        received.append(bytes(reader.receive())) if len(received) < writer.messages - 1 else None

    received: list[bytes] = []
    for message in sent:
        writer.send([message], check)
    while len(received) < len(sent):
        received.append(bytes(reader.receive()))
    assert received == sent
    os.close(writer.doorbells[0])
    writer.close()


def test_a_step_is_the_same_on_the_other_side():
    params = SamplingParams(logit_bias={3: 0.1, 7: -2.5}, allowed_token_ids=[1, 2], logprobs=2, temperature=1 / 3)
    new = NewRow(3, np.arange(5, dtype=np.int32), 4, params, 2**64 - 1, (7, 9), 2)
    batch = Batch(
        np.array([3, 1], np.int32), np.array([0, 6], np.int32), np.array([5, 1], np.int32), np.array([True, False]),
        new_rows=[new], copies=np.array([[1, 2]], np.int32),
    )  # fmt: skip
    got, entries = wire.step_from(wire.unpack(b"".join(wire.step(batch))))
    assert entries is None
    for name in wire.STEP_ARRAYS:
        mine, theirs = getattr(batch, name), getattr(got, name)
        assert mine.dtype == theirs.dtype and np.array_equal(mine, theirs) and mine.shape == theirs.shape
    (back,) = got.new_rows
    assert np.array_equal(back.tokens, new.tokens) and back.seed == new.seed and back.end_ids == new.end_ids
    assert all(getattr(back.params, name) == getattr(params, name) for name in (*wire.PARAMS, "logit_bias"))
