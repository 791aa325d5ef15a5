"""LoRA on the GPU against the reference: the kernels on odd shapes, and the whole runner with mixed adapters."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from cases import DEVICE, OPS, close
from engines import card, options

from martlet.engine.engine import Engine, drain
from martlet.engine.options import EngineOptions
from martlet.engine.request import Request
from martlet.errors import UsageError
from martlet.hub.peft import Lora
from martlet.kernels.cuda.lora import Stack, group, lora
from martlet.kernels.ops import LoraPart
from martlet.model.adapters import TARGETS, Adapter
from martlet.model.weights import parameters, read_spec
from martlet.runners.cuda_runner import CudaRunner
from martlet.runners.cuda_runner.mixed import Mixed
from martlet.runners.torch_runner import TorchRunner
from martlet.sampling_params import SamplingParams

gpu = pytest.mark.gpu
DTYPES = [torch.float32, pytest.param(torch.bfloat16, marks=gpu)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("tokens", "inputs", "outputs", "rank"), [(1, 40, (24,), 16), (19, 72, (130, 24, 24), 32), (70, 200, (50, 50), 16)]
)
def test_kernels_add_what_the_reference_adds(tokens, inputs, outputs, rank, dtype):
    torch.manual_seed(0)
    slots, total = 3, sum(outputs)
    used = [16, 0, rank]  # the second slot is empty
    stack = Stack(
        torch.randn(slots, len(outputs), rank, inputs, device=DEVICE).to(dtype) / inputs**0.5,
        torch.randn(slots, total, rank, device=DEVICE).to(dtype),
        torch.tensor(used, dtype=torch.int32, device=DEVICE),
        tuple(np.cumsum(outputs[:-1]).tolist()),
    )
    adapters = torch.tensor([0, 3, 1, 2, 3, 0, 1], dtype=torch.int32, device=DEVICE)  # of seven rows
    rows = torch.randint(-1, 7, (tokens,), dtype=torch.int32, device=DEVICE)
    rows[0] = 1
    x, y = torch.randn(tokens, inputs, device=DEVICE).to(dtype), torch.randn(tokens, total, device=DEVICE).to(dtype)
    want = y.float()
    slot_of = torch.where(rows < 0, 0, adapters[rows.clamp(min=0).long()])
    begins = np.cumsum(outputs) - outputs
    for slot in range(slots):
        a, b = stack.a[slot, :, : used[slot]].float(), stack.b[slot, :, : used[slot]].float()
        parts = [
            LoraPart(int(begin), a[part], b[begin : begin + size])
            for part, (begin, size) in enumerate(zip(begins, outputs, strict=True))
        ]
        OPS.lora(x.float(), want, [((slot_of == slot + 1).nonzero().flatten(), parts)])
    untouched = y[slot_of == 0].clone()
    lora(x, y, stack, group(rows, adapters, slots))
    assert close(y, want) and torch.equal(y[slot_of == 0], untouched)


def adapter(family: str, seed: int) -> Adapter:
    rng = np.random.default_rng(seed)
    loras = {}
    for parameter in parameters(read_spec(card(family))):
        part = parameter.name.rpartition(".")[2]
        if part in TARGETS and rng.random() < 0.8:
            (rows, columns), rank = parameter.shape, int(rng.choice([1, 4, 16]))
            a, b = rng.standard_normal((rank, columns)), rng.standard_normal((rows, rank))
            loras[parameter.name] = Lora(a.astype(np.float32), b.astype(np.float32), 0.5 / rank)
    return Adapter(Path("nowhere"), None, 16, loras)


def mixed_answers(runner, tokens: int, count: int, longest: int = 30) -> dict[str, list[int]]:
    """Sequences with three adapters (two slots) and without, by request; prompts of up to `longest` tokens."""
    engine = Engine(runner, options=EngineOptions(seed=0))
    for seed in range(3):
        engine.adapters.put(f"a{seed}", adapter("qwen3", seed))
    rng = np.random.default_rng(1)
    requests = [
        Request(
            f"{i}",
            rng.integers(0, 300, int(rng.integers(1, longest))).tolist(),
            SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, detokenize=False),
            adapter=[None, "a0", "a1", "a2"][i % 4],
        )
        for i in range(count)
    ]
    found: dict[str, list[int]] = {}
    for output in drain(engine, requests):
        assert output.error is None, output.error
        found.setdefault(output.request_id, []).extend(output.token_ids)
    engine.close()
    return found


def test_the_engine_answers_as_on_the_reference():
    settings = {"max_adapters": 2, "max_lora_rank": 16}
    want = mixed_answers(TorchRunner(card("qwen3"), options("cpu", **settings)), 2, 3, 6)
    assert mixed_answers(CudaRunner(card("qwen3"), options(DEVICE, **settings), step_tokens=64), 2, 3, 6) == want


@gpu
@pytest.mark.parametrize("graphs", [True, False])
def test_graphs_give_what_single_launches_give(graphs):
    settings = {"max_adapters": 2, "max_lora_rank": 64}
    want = mixed_answers(TorchRunner(card("qwen3"), options("cpu", **settings)), 20, 24)
    runner = CudaRunner(card("qwen3"), options("cuda", **settings), graphs=graphs)
    assert mixed_answers(runner, 20, 24) == want


@gpu
def test_steps_without_adapters_run_the_graph_that_knows_none():
    runner = CudaRunner(card("qwen3"), options("cuda", max_adapters=2))
    engine = Engine(runner, options=EngineOptions(seed=0))
    engine.adapters.put("a", adapter("qwen3", 0))
    before = set(runner.graphs.captured)
    params = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True, detokenize=False)

    def new(name: str | None) -> set:
        drain(engine, [Request(f"{name}{i}", [1 + i, 2], params, adapter=name) for i in range(3)])
        return {key.adapted if isinstance(key, Mixed) else key[2] for key in set(runner.graphs.captured) - before}

    assert True not in new(None)
    assert (8, "greedy", True) in runner.graphs.captured or True in new("a")
    engine.close()


def test_adapters_beside_fp8_weights_are_refused():
    with pytest.raises(UsageError, match="no adapters beside fp8"):
        CudaRunner(card("qwen3"), options(DEVICE, quant="fp8", max_adapters=1))
