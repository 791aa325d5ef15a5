"""LoRA within the C++ step: the reference's logits for every shape of linear and instruction set, and the same bits
whatever runs beside a token."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np
import pytest
from cpu_oracle import HERE, run_linear
from test_cpu_runner import MODELS, TOKENS, VOCAB, card, load

from martlet.hub.checkpoint import PackedTensor
from martlet.hub.peft import Lora
from martlet.kernels.cpu.library import Executor
from martlet.kernels.cpu.program import Format
from martlet.model.adapters import TARGETS, Adapter
from martlet.model.weights import parameters, read_spec
from martlet.runners.base import Batch, LoadOptions, NewRow
from martlet.runners.cpu_runner.adapters import AdapterTables
from martlet.runners.cpu_runner.decoder import Linear
from martlet.runners.cpu_runner.packing import Packer
from martlet.runners.torch_runner import TorchRunner
from martlet.sampling_params import SamplingParams

PARTS = [TARGETS, ("q", "v"), ("k", "up"), ("gate", "o"), ("down",)]


def adapter(name: str, seed: int) -> Adapter:
    """Random matrices on some linears, of uneven ranks."""
    rng = np.random.default_rng(seed)
    loras = {}
    for parameter in parameters(read_spec(card(name))):
        part = parameter.name.rpartition(".")[2]
        if part in PARTS[seed % len(PARTS)] and rng.random() < 0.9:
            rows, columns = parameter.shape
            rank = int(rng.choice([1, 3, 8, 17]))
            a, b = rng.standard_normal((rank, columns)), rng.standard_normal((rows, rank))
            loras[parameter.name] = Lora(a.astype(np.float32), b.astype(np.float32), 0.4 / rank)
    return Adapter(Path("nowhere"), None, 17, loras)


def logprobs(runner, slots: list[int], count: int, decodes: int = 3) -> np.ndarray:
    """Sequences with these adapters beside each other, `count` tokens and then one at a time: [1 + decodes, B, V]."""
    rows, size = np.arange(len(slots), dtype=np.int32), runner.memory.block_size
    pages = -(-(count + decodes) // size)
    params = SamplingParams(temperature=0, logprobs=VOCAB)
    new = [NewRow(r, np.roll(TOKENS, 10 * s)[:count], count, params, 1, adapter=s)
           for r, s in enumerate(slots)]  # fmt: skip
    table = {"block_rows": np.repeat(rows, pages), "block_slots": np.tile(np.arange(pages, dtype=np.int32), len(rows)),
             "block_ids": np.arange(len(rows) * pages, dtype=np.int32)}  # fmt: skip
    start, found = np.zeros(len(rows), np.int32), []
    for step in range(1 + decodes):
        tokens = np.full(len(rows), 1 if step else count, np.int32)
        more = {} if step else {"new_rows": new, **table}
        result = runner.launch(Batch(rows, start, tokens, np.ones(len(rows), bool), **more)).result()
        start = start + tokens
        found.append(np.empty((len(rows), VOCAB), np.float32))
        for b, row in enumerate(found[-1]):
            row[result.logprobs[b].top_ids] = result.logprobs[b].top_logprobs
    return np.stack(found)


@pytest.mark.parametrize("isa", HERE)
@pytest.mark.parametrize("name", MODELS)
def test_logits_equal_the_reference(name, isa, monkeypatch):
    monkeypatch.setattr("martlet.runners.cpu_runner.runner.Executor", partial(Executor, isa=isa))
    options = {"dtype": "float32", "max_num_seqs": 8, "max_adapters": 5}
    ours = load(name, **options)
    reference = TorchRunner(card(name), LoadOptions(device="cpu", kv_cache_tokens=1024, **options))
    for slot in range(1, 6):
        for runner in (ours, reference):
            runner.load_adapter(slot, adapter(name, slot))
    slots = [3, 0, 1, 5, 2, 0, 4, 1]
    found, wanted = (logprobs(runner, slots, 9) for runner in (ours, reference))
    assert np.abs(found - wanted).max() < 2e-4
    base = logprobs(ours, [0] * 8, 9)
    assert (np.abs(found - base).max(axis=(0, 2)) > 0.05).sum() == 6, "an adapter changes hardly anything"
    for runner in (ours, reference):
        runner.close()


@pytest.mark.parametrize("isa", HERE)
@pytest.mark.parametrize(
    ("form", "most"), [(Format.F32, 1e-5), (Format.BF16, 0.01), (Format.INT8, 0.03), (Format.Q4_0, 0.03)]
)
def test_what_is_added_is_as_exact_as_the_weights_beside_it(form, most, isa):
    """The deltas of a linear whose own weights are zero, over what they should be, for tokens dealt out to adapters."""
    rng, run, inputs = np.random.default_rng(0), Executor(2, isa=isa), 160
    packer = Packer(run)
    zeros = np.zeros((144, inputs), np.float32)
    if form == Format.Q4_0:  # the linear may take its inputs in another order
        data = np.zeros((144, inputs // 32 * 18), np.uint8)
        matrix = packer.stack([PackedTensor("q4_0", zeros.shape, lambda: data, lambda _: zeros)], form)
        order = rng.permutation(inputs).astype(np.int32)
    else:
        matrix, order = packer.stack([zeros], form), None
    linear = Linear(matrix, None, 144, parts=(("q", 80), ("k", 64)), order=order)
    tables = AdapterTables([linear], 4, run)
    deltas = {}
    for slot, (q_rank, k_rank) in enumerate([(16, 16), (3, 40), (64, 0), (0, 5)], 1):
        loras = {}
        for (name, rows), rank in zip(linear.parts, (q_rank, k_rank), strict=True):
            if rank:
                size = 10.0 ** rng.uniform(-4, 2)  # of A; B makes up for it
                a, b = rng.standard_normal((rank, inputs)) * size, rng.standard_normal((rows, rank)) / size
                loras[name] = Lora(a.astype(np.float32), b.astype(np.float32), 0.5)
        tables.put(slot, Adapter(Path("nowhere"), None, 64, loras))
        deltas[slot] = [loras.get(name) for name, _ in linear.parts]
    for count in (1, 3, 23, 150):
        x = rng.standard_normal((count, inputs)).astype(np.float32)
        slots = rng.integers(0, 5, count).astype(np.int32)
        wanted = np.zeros((count, 144), np.float32)
        for row, slot in enumerate(slots):
            for lora, at, end in zip(deltas.get(slot, ()), (0, 80), (80, 144), strict=False):
                if lora:
                    wanted[row, at:end] = lora.b @ (lora.a @ x[row]) * lora.scale
        found = run_linear(run, matrix, x, 144, adapters=slots, loras=tables.address(linear), order=order)
        wrong, size = (np.linalg.norm(y, axis=1) for y in (found - wanted, wanted))
        assert not found[slots == 0].any()
        # A row whose products with A cancel out has little to say; of the others' size is what it may be wrong by.
        assert (wrong <= most * np.maximum(size, np.median(size))).all(), (wrong / size).max()
    run.close()


@pytest.mark.parametrize("quant", ["float32", "bf16", "int8", "int4"])
def test_company_changes_no_bit(quant):
    runner = load("qwen3", quant=quant, max_num_seqs=8, max_adapters=3)
    for slot in (1, 2, 3):
        runner.load_adapter(slot, adapter("qwen3", slot))
    slots = [1, 0, 2, 1, 3, 2, 1, 1]
    together = logprobs(runner, slots, 21)
    for b, slot in enumerate(slots):
        np.testing.assert_array_equal(logprobs(runner, [slot], 21)[:, 0], together[:, b])
    runner.load_adapter(1, adapter("qwen3", 9))  # in place of what the slot held
    again = logprobs(runner, slots, 21)
    same = [b for b in range(8) if (again[:, b] == together[:, b]).all()]
    assert same == [1, 2, 4, 5]
    runner.close()
