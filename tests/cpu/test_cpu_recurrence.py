"""RWKV on the C++ kernels: the torch reference's numbers, whatever chunks, neighbours and instruction set."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
from test_cpu_runner import TOKENS, VOCAB, everything

sys.path.insert(0, str(Path(__file__).parents[1] / "cuda"))
from engines import answers, check

from martlet.hub.card import ModelCard
from martlet.kernels.cpu import library as native
from martlet.kernels.cpu.library import ISAS, Executor
from martlet.model import families
from martlet.runners import load
from martlet.runners.base import LoadOptions
from martlet.runners.cpu_runner import CpuRunner, runner
from martlet.runners.torch_runner import TorchRunner

SIZES = {"hidden_size": 96, "num_hidden_layers": 3, "vocab_size": VOCAB}
MODELS = {
    "rwkv5": {"head_size": 48},
    "rwkv5-1": {"head_size": 32, "model_version": "5_1"},
    "rwkv5-0": {"head_size": 16, "model_version": "5_0"},
    "rwkv6": {"head_size": 32},
    "rwkv7": {"head_dim": 32},
}


def card(name: str, **more) -> ModelCard:
    family = name.split("-")[0]
    config = families.example(family) | SIZES | MODELS[name] | {"model_type": family} | more
    return ModelCard(name, Path(name), "dummy", family, config=config)


def options(**more) -> LoadOptions:
    settings = {"device": "cpu", "dtype": "float32", "max_num_seqs": 4, "max_model_len": 256, "kv_cache_tokens": 8192}
    return LoadOptions(**settings | more)


@pytest.mark.parametrize("name", MODELS)
def test_logits_equal_the_reference(name):
    runners = CpuRunner(card(name), options()), TorchRunner(card(name), options())
    found, wanted = (everything(one, TOKENS, [150]) for one in runners)
    assert np.abs(found - wanted).max() < 1e-4
    for one in runners:
        one.close()


@pytest.mark.parametrize("isa", ISAS)
def test_every_instruction_set_runs_it(isa, monkeypatch):
    if ISAS.index(isa) > ISAS.index(native.widest_isa()):
        return  # this processor has none of it
    monkeypatch.setattr(runner, "Executor", lambda threads, cores=None: Executor(threads, cores=cores, isa=isa))
    for name in ("rwkv6", "rwkv7"):
        reference, one = TorchRunner(card(name), options()), CpuRunner(card(name), options())
        assert one.executor.isa == isa
        assert np.abs(everything(one, TOKENS[:40], [40]) - everything(reference, TOKENS[:40], [40])).max() < 1e-4
        one.close()


@pytest.mark.parametrize("name", ["rwkv5", "rwkv6", "rwkv7"])
@pytest.mark.parametrize("quant", ["float32", "int8"])
def test_chunks_and_neighbours_change_no_bit(name, quant):
    one = CpuRunner(card(name), options(quant=quant))
    whole = everything(one, TOKENS, [150])
    for chunks, beside in (([1] * 150, False), ([37, 1, 112], False), ([64, 70, 16], True)):
        assert np.array_equal(everything(one, TOKENS, chunks, beside), whole)
    one.close()


@pytest.mark.parametrize("name", ["rwkv6", "rwkv7"])
def test_the_engine_answers_as_on_the_reference(name):
    """With sequences that are preempted, forked, and begun from snapshots."""
    settings = {"max_num_seqs": 6, "max_model_len": 64, "block_size": 16, "kv_cache_tokens": 2048}
    both = (
        load(card(name, vocab_size=300), options(**settings)),
        TorchRunner(card(name, vocab_size=300), options(**settings)),
    )
    assert isinstance(both[0], CpuRunner) and both[0].max_drafts == 0  # a state cannot forget a wrong guess
    want = answers(both[1])
    check(answers(both[0]), want)
    check(answers(both[0], max_num_batched_tokens=7), want)
    for one in both:
        one.close()
