"""LoRA on the GPU against the reference: the kernels on odd shapes, and the whole runner with mixed adapters."""

from __future__ import annotations

from dataclasses import dataclass
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
from martlet.kernels.cuda.lora import (
    FEW,
    FILL,
    NOTHING,
    Groups,
    Stack,
    finish,
    finish_activated,
    group,
    lora,
    low_ranks,
    parted,
)
from martlet.kernels.ops import LoraPart
from martlet.model.adapters import TARGETS, Adapter
from martlet.model.spec import FeedForward
from martlet.model.weights import parameters, read_spec
from martlet.runners.cuda_runner import CudaRunner
from martlet.runners.cuda_runner.mixed import Mixed
from martlet.runners.torch_runner import TorchRunner
from martlet.sampling_params import SamplingParams

gpu = pytest.mark.gpu
DTYPES = [torch.float32, pytest.param(torch.bfloat16, marks=gpu)]


@dataclass
class Adapted:
    """A product y [T, N] of x [T, K], adapters of four slots (one rank each) and what the reference makes of them.

    wide: the matrix with A of all slots behind it, [N + 4 P R, K].
    """

    x: torch.Tensor
    y: torch.Tensor
    wide: torch.Tensor
    stack: Stack
    groups: Groups
    want: torch.Tensor
    without: torch.Tensor  # bool [T], tokens without adapter


def adapted(tokens: int, inputs: int, outputs: tuple[int, ...], rank: int, dtype: torch.dtype) -> Adapted:
    torch.manual_seed(0)
    total = sum(outputs)
    used = [16, 0, rank, 16]  # the second slot is empty, the fourth has no tokens
    wide = torch.randn(total + 4 * len(outputs) * rank, inputs, device=DEVICE).to(dtype) / inputs**0.5
    stack = Stack(
        wide[total:].view(4, len(outputs), rank, inputs),
        torch.randn(total, 4, rank, device=DEVICE).to(dtype),
        torch.tensor(used, dtype=torch.int32, device=DEVICE),
        tuple(np.cumsum(outputs[:-1]).tolist()),
    )
    adapters = torch.tensor([0, 3, 1, 2, 3, 0, 1], dtype=torch.int32, device=DEVICE)  # of seven rows
    rows = torch.randint(-1, 7, (tokens,), dtype=torch.int32, device=DEVICE)
    rows[0] = 1
    x = torch.randn(tokens, inputs, device=DEVICE).to(dtype)
    y = x @ wide[:total].T
    want = (x.double() @ wide[:total].double().T).float()
    slot_of = torch.where(rows < 0, 0, adapters[rows.clamp(min=0).long()])
    begins = np.cumsum(outputs) - outputs
    for slot in range(4):
        a, b = stack.a[slot, :, : used[slot]].float(), stack.b[:, slot, : used[slot]].float()
        parts = [
            LoraPart(int(begin), a[part], b[begin : begin + size])
            for part, (begin, size) in enumerate(zip(begins, outputs, strict=True))
        ]
        OPS.lora(x.float(), want, [((slot_of == slot + 1).nonzero().flatten(), parts)])
    return Adapted(x, y, wide, stack, group(rows, adapters, stack.ranks, rank), want, slot_of == 0)


SHAPES = [  # tokens, inputs, outputs, largest rank
    (1, 40, (24,), 16),
    (3, 136, (70,), 64),
    (17, 72, (130, 24, 24), 48),
    (64, 40, (64, 32, 32), 16),
    (65, 40, (50, 50), 32),
    (FEW + 6, 200, (50, 50), 16),
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("tokens", "inputs", "outputs", "rank"), SHAPES)
def test_kernels_add_what_the_reference_adds(tokens, inputs, outputs, rank, dtype):
    case = adapted(tokens, inputs, outputs, rank, dtype)
    y = case.y.clone()
    lora(case.x, y, case.stack, case.groups)
    assert close(y, case.want) and torch.equal(y[case.without], case.y[case.without])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("tokens", "inputs", "outputs", "rank"), SHAPES[:-1])
def test_one_product_with_matrix_and_adapters_gives_the_same(tokens, inputs, outputs, rank, dtype):
    case = adapted(tokens, inputs, outputs, rank, dtype)
    y, low = parted(case.x @ case.wide.T, case.stack)
    assert close(finish(y, low, case.stack, case.groups), case.want)
    residual = torch.randn_like(case.want).to(dtype)
    out = residual.clone()
    assert finish(y, low, case.stack, case.groups, out=out, onto=True) is out
    assert close(out, case.want + residual.float())
    assert torch.equal(finish(y, low, case.stack, case.groups)[case.without], y[case.without])


@pytest.mark.parametrize("tokens", [3, FEW + 6])
def test_adapters_of_16_bits_add_to_float32(tokens):
    case = adapted(tokens, 72, (50, 50), 32, torch.float16)
    y = case.x.float() @ case.wide.float().T
    outputs = y[:, : case.want.shape[1]].clone()
    lora(case.x, outputs, case.stack, case.groups)
    assert (outputs - case.want).norm() < 1e-3 * case.want.norm()
    if case.groups.few:
        residual = torch.randn_like(case.want)
        want = residual + case.want
        finish(*parted(y, case.stack), case.stack, case.groups, out=residual, onto=True)
        assert (residual - want).norm() < 1e-3 * want.norm()
        got = finish_activated(*parted(y, case.stack), case.stack, case.groups, "silu", True)
        assert got.dtype == torch.float16 and close(got, OPS.activation(case.want, FeedForward(50)))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", [1, 17, 65])
@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("beside", [True, False])
def test_the_activation_follows_what_adapters_add(tokens, gated, beside, dtype):
    case = adapted(tokens, 72, (70, 70) if gated else (70,), 32, dtype)
    y, low = parted(case.x @ case.wide.T, case.stack)
    if not beside:
        low = low_ranks(case.x, case.stack, case.groups)
    want = OPS.activation(case.want, FeedForward(35, "silu", gated=gated))
    assert close(finish_activated(y, low, case.stack, case.groups, "silu", gated), want, dtype)


def test_units_are_the_ranks_that_tokens_need():
    ranks = torch.tensor([16, 0, 48, 16, 32], dtype=torch.int32, device=DEVICE)
    adapters = torch.tensor([0, 3, 1, 2, 5], dtype=torch.int32, device=DEVICE)
    rows = torch.tensor([4, -1, 1, 1, 3, 0], dtype=torch.int32, device=DEVICE)
    room = torch.zeros(FILL + 9, dtype=torch.int32, device=DEVICE)
    groups = group(rows, adapters, ranks, 64, room[:-1])
    assert room[:-1].eq(NOTHING.value).all() and not room[-1]
    assert groups.units[: groups.units[0] + 1].tolist() == [5, 8, 9, 10, 16, 17]
    assert groups.slots.tolist() == [4, -1, 2, 2, 1, -1]
    assert groups.counts.tolist() == [0, 1, 2, 0, 1]


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
