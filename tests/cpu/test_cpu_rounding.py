"""The reference of `--quant`: weights rounded by numpy are those that the C++ kernels pack."""

from __future__ import annotations

import logging

import numpy as np
import pytest
from cpu_oracle import BLOCK_TYPES, random_blocks
from test_cpu_runner import TOKENS, card, everything, load

from martlet import runners
from martlet.errors import UsageError
from martlet.hub.checkpoint import PackedTensor
from martlet.kernels.cpu import build
from martlet.kernels.cpu import library as native
from martlet.kernels.cpu.library import Executor
from martlet.kernels.cpu.program import PANEL, Format
from martlet.runners.base import LoadOptions
from martlet.runners.cpu_runner.packing import Packer
from martlet.runners.torch_runner import TorchRunner, rounding


def matrix(rows: int, inputs: int) -> np.ndarray:
    values = np.random.default_rng(inputs).normal(0, 0.05, (rows, inputs)).astype(np.float32)
    values[1] = 0
    return values


@pytest.mark.parametrize("inputs", [64, 100])
def test_int8_is_what_is_packed(inputs):
    w = matrix(PANEL, inputs)
    panel = bytes(Packer(Executor(1)).stack([w], Format.INT8).memory)
    padded = (len(panel) - 4 * PANEL) // PANEL
    quants = np.frombuffer(panel, np.uint8, padded * PANEL).reshape(-1, PANEL, 4).swapaxes(0, 1).reshape(PANEL, -1)
    scales = np.frombuffer(panel, np.float32, PANEL, padded * PANEL)
    np.testing.assert_array_equal(
        rounding.int8(w), (quants[:, :inputs].astype(np.float32) - 128) * scales[:, None], strict=True
    )


def test_int4_is_near_and_has_sixteen_values_a_block():
    w = matrix(7, 100)
    found = rounding.int4(w)
    for start in range(0, 100, 32):
        part, had = found[:, start : start + 32], w[:, start : start + 32]
        assert all(len(np.unique(row)) <= 16 for row in part)
        step = (had.max(1) - had.min(1)) / 15
        assert (np.abs(part - had).max(1) <= 0.51 * step + 1e-4 * np.abs(had).max()).all()


def test_what_is_in_the_format_stays_as_it_is():
    blocks = random_blocks(np.random.default_rng(0), Format.Q4_1, 8, 64)
    assert Format.Q4_1 in BLOCK_TYPES and rounding._round(blocks, *rounding.INT4) is blocks
    order = np.random.default_rng(1).permutation(64).astype(np.int32)
    sorted_columns = PackedTensor("int", (8, 64), matrix(8, 64), lambda values: values, order)
    found = rounding._round(sorted_columns, *rounding.INT4)
    np.testing.assert_array_equal(found[:, order], rounding.int4(matrix(8, 64)))


@pytest.mark.parametrize("quant", ["int8", "int4"])
@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_the_reference_is_nearer_to_the_kernels_than_weights_that_are_not_rounded(name, quant):
    """What is left between them are the kernels' rounded activations and keys."""

    def distance(**options):
        options = LoadOptions(device="cpu", kv_cache_tokens=1024, **options)
        reference = everything(TorchRunner(card(name), options), TOKENS, [150])
        return np.abs(found - reference).mean()

    runner = load(name, quant=quant)
    found = everything(runner, TOKENS, [150])
    runner.close()
    assert distance(quant=quant) < 0.7 * distance(dtype="float32")


def test_without_a_compiler_every_quant_of_the_kernels_runs_and_one_line_says_what_runs(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr("shutil.which", lambda name: None)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(build, "HERE", tmp_path)
    monkeypatch.setattr(build, "sources", lambda: build.Path(__file__).parents[2] / "csrc" / "cpu")
    native.library.cache_clear()
    caplog.set_level(logging.INFO, "martlet")
    try:
        for quant in (None, "auto", "stored", "float32", "bf16", "int8", "int4"):
            caplog.clear()
            runner = runners.load(card("llama"), LoadOptions(device="cpu", kv_cache_tokens=1024, quant=quant))
            assert isinstance(runner, TorchRunner)
            (warning,) = [one for one in caplog.records if one.levelno == logging.WARNING]
            assert "no C++ compiler found" in warning.message and "torch runs the model instead" in warning.message
            assert (f"rounded to {quant}" in caplog.text) == (quant in ("int8", "int4"))
        with pytest.raises(UsageError, match=r"int3.*int8"):
            runners.load(card("llama"), LoadOptions(device="cpu", quant="int3"))
    finally:
        native.library.cache_clear()
