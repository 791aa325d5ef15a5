"""Whole models in every quantised layout, on CPU and torch, against the same models with plain matrices."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file
from test_cpu_families import SMALL, TOKENS
from tiny_models import Driver, dense, random_checkpoint

from martlet.errors import UsageError
from martlet.hub.checkpoint import open_checkpoint
from martlet.kernels.cpu.program import CacheKind
from martlet.model import families, weights
from martlet.runners import LoadOptions
from martlet.runners.cpu_runner import CpuRunner
from martlet.runners.cpu_runner.packing import PRECISIONS, Precision
from martlet.runners.cuda_runner import CudaRunner
from martlet.runners.cuda_runner import weights as gpu_weights
from martlet.runners.torch_runner import TorchRunner
from quantised_models import CASES, quantised

WIDE = {"hidden_size": 128, "intermediate_size": 384, "num_attention_heads": 8}


def models(folder, family: str, case: str, more: dict):
    """(card of the quantised model, card of its plain twin)"""
    (folder / "plain").mkdir()
    (folder / "quantised").mkdir()
    card = random_checkpoint(family, folder / "plain", more)
    spec = weights.read_spec(card)
    linears = {
        families.get(family).source(spec, parameter.name, "safetensors").name
        for parameter in weights.parameters(spec)
        if parameter.kind == "linear" and parameter.name != "head"
    }
    file = folder / "plain" / "model.safetensors"
    config, plain = quantised(folder / "quantised", load_file(file), case, linears)
    save_file({name: np.ascontiguousarray(array) for name, array in plain.items()}, file)
    return replace(card, path=folder / "quantised", config=card.config | {"quantization_config": config}), card


def logprobs(runner, card, **options) -> np.ndarray:
    driver, found = Driver(card, runner=runner, **SMALL | options), []
    for i, count in enumerate((40, 1, 19)):
        new = [driver.enter(0, TOKENS, logprobs=128, prompt_logprobs=128)] if i == 0 else []
        result = driver.step([(0, count, i == 2)], new)
        found += result.prompt_logprobs.get(0, [])
    driver.runner.close()
    return np.stack([dense(entry) for entry in [*found, result.logprobs[0]]])


@pytest.fixture
def float_cache(monkeypatch):
    """Matrices run as they are stored, beside keys and values in float32: what is left is the matrices' own error."""
    monkeypatch.setitem(PRECISIONS, "stored", Precision("stored", kv=CacheKind.F32))


@pytest.mark.parametrize("case", CASES)
def test_every_layout_gives_the_logits_of_its_plain_twin(case, tmp_path, float_cache):
    card, plain = models(tmp_path, "qwen2", case, WIDE)
    want = logprobs(TorchRunner, plain)
    assert np.abs(want - want.mean(-1, keepdims=True)).max() > 0.3
    np.testing.assert_allclose(logprobs(TorchRunner, card), want, atol=2e-4)
    np.testing.assert_allclose(logprobs(CpuRunner, card), want, atol=2e-4)
    atol = 0.01  # activations of 15 bits
    if case.startswith(("fp8", "nf4", "w8a8")):  # weights in bf16; activations in int8
        atol = 0.6 if case == "w8a8" else 0.2
    np.testing.assert_allclose(logprobs(CpuRunner, card, dtype="auto"), want, atol=atol)


@pytest.mark.parametrize("family", ["qwen", "phi3", "chatglm", "internlm2", "mixtral", "gemma2"])
@pytest.mark.parametrize("case", ["gptq", "gptq-act-order"])
def test_fused_matrices_and_experts(family, case, tmp_path, float_cache):
    more = {"num_hidden_layers": 2}
    card, plain = models(tmp_path, family, case, more)
    want = logprobs(TorchRunner, plain)
    np.testing.assert_allclose(logprobs(CpuRunner, card), want, atol=2e-4)
    np.testing.assert_allclose(logprobs(CpuRunner, card, dtype="auto"), want, atol=0.01)


def test_the_cpu_keeps_four_bits_and_says_what_it_widens(tmp_path, caplog):
    caplog.set_level("INFO", "martlet")
    for case, told in (("gptq-128", "int4_128"), ("gptq-act-order", "int4_32"), ("gptq-8", "q8_0"), ("w8a8", "int8")):
        folder = tmp_path / case
        folder.mkdir()
        caplog.clear()
        card, _ = models(folder, "qwen2", case, WIDE)
        logprobs(CpuRunner, card, dtype="auto")
        assert f"{told} weights" in caplog.text and "no kernel" not in caplog.text
    (tmp_path / "nf4").mkdir()
    card, _ = models(tmp_path / "nf4", "qwen2", "nf4", WIDE)
    logprobs(CpuRunner, card, dtype="auto")
    assert "nf4 weights have no kernel on the CPU: they run as bf16" in caplog.text


def test_nothing_is_made_of_matrices_that_nobody_asks_for(tmp_path):
    """A start from packed weights reads no quants: a matrix is made when its data is wanted."""
    card, _ = models(tmp_path, "qwen2", "gptq", WIDE)
    checkpoint = open_checkpoint(card)
    tensor = checkpoint.tensor("model.layers.0.mlp.up_proj.weight")
    made = []
    lazy = replace(tensor, stored=lambda: made.append(1) or tensor.data)
    assert lazy.rows(slice(0, 4)).shape == (4, 128) and not made
    assert lazy.rows(slice(0, 4)).data.shape[0] == 4 and made
    checkpoint.close()


@pytest.mark.parametrize("family", ["qwen2", "phi3"])
def test_a_model_keeps_its_four_bits(family, tmp_path):
    card, plain = models(tmp_path, family, "gptq-64-zeros", WIDE | {"num_hidden_layers": 1})
    want = logprobs(CudaRunner, plain)
    np.testing.assert_allclose(logprobs(CudaRunner, card, quant="int4"), want, atol=2e-3)
    runner = CudaRunner(card, LoadOptions(device="cpu", dtype="float32", quant="int4", **SMALL))
    assert all(block.up.int4 is not None and block.qkv.int4 is not None for block in runner.decoder.weights.blocks)
    with pytest.raises(UsageError, match=r"has none.*--quant_bits 4"):
        CudaRunner(plain, LoadOptions(device="cpu", dtype="float32", quant="int4", **SMALL))


def test_fp8_with_a_scale_a_row_is_taken_as_it_is(tmp_path):
    card, plain = models(tmp_path, "qwen2", "fp8-channel", WIDE)
    spec = weights.read_spec(card)
    kept = gpu_weights.load(card, spec, torch.device("cpu"), torch.float32, fp8=True)
    exact = gpu_weights.load(plain, spec, torch.device("cpu"), torch.float32)
    for block, other in zip(kept.blocks, exact.blocks, strict=True):
        assert torch.equal(block.down.matrix.float() * block.down.scales[:, None], other.down.matrix)
        assert torch.equal(block.qkv.matrix.float() * block.qkv.scales[:, None], other.qkv.matrix)
