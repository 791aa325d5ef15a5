"""The engine on the CUDA runner gives what the engine on the reference gives, in float32, token for token.

Where there is no GPU one small case runs under Triton's interpreter: all of the code but graphs and overlap.
"""

from __future__ import annotations

import pytest
from cases import DEVICE
from engines import CONFIGS, answers, card, check, options, requests

from martlet.engine.engine import Engine, drain
from martlet.engine.options import EngineOptions
from martlet.runners.cuda_runner import CudaRunner
from martlet.runners.torch_runner import TorchRunner

gpu = pytest.mark.gpu


def reference(family: str, **settings) -> dict:
    want = answers(TorchRunner(card(family), options("cpu")), **settings)
    assert any(want[key][0] != want["0", 0][0] for key in want)
    return want


def test_the_engine_answers_as_on_the_reference():
    runner = CudaRunner(card("qwen3"), options(DEVICE), step_tokens=64)
    check(answers(runner, max_tokens=2), reference("qwen3", max_tokens=2))
    runner.close()


@gpu
@pytest.mark.parametrize("graphs", [True, False])
@pytest.mark.parametrize("family", CONFIGS)
def test_whole_in_chunks_and_again(family, graphs):
    want, runner = reference(family), CudaRunner(card(family), options("cuda"), graphs=graphs, step_tokens=64)
    check(answers(runner), want)
    check(answers(runner), want)
    check(answers(runner, max_num_batched_tokens=7, enable_prefix_caching=False), want)
    runner.close()


@gpu
@pytest.mark.parametrize("family", CONFIGS)
def test_preempted(family):
    engine = Engine(CudaRunner(card(family), options("cuda", kv_cache_tokens=84)), options=EngineOptions(seed=0))
    tokens: dict = {}
    for output in drain(engine, requests()):
        tokens.setdefault((output.request_id, output.index), []).extend(output.token_ids)
    assert engine.stats().preemptions > 0
    assert tokens == {key: entry[0] for key, entry in reference(family).items()}
    engine.close()
