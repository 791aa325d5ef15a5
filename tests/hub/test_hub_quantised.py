"""Quantised safetensors read as the matrices they stand for, whatever their layout; refusals that name the key."""

from __future__ import annotations

import numpy as np
import pytest
from safetensors.numpy import save_file

from martlet.errors import CheckpointError
from martlet.hub.checkpoint import PackedTensor
from martlet.hub.quantised import QuantisedCheckpoint
from martlet.hub.safetensors_file import SafetensorsCheckpoint
from quantised_models import CASES, GPTQ, gptq

FORMATS = {  # what the CPU and the GPU multiply with
    "gptq": "int4_32", "gptq-128": "int4_128", "gptq-64-zeros": "int4_64", "gptq-columns": "int4_128",
    "gptq-act-order": "int4_32", "gptq-v2": "int4_32", "gptq-8": "q8_0", "gptq-8-zeros": "int", "gptq-2": "int4_32",
    "gptq-24": "int", "awq": "int4_32", "w4a16": "int4_32", "w4a16-zeros": "int4_32", "w4a16-act-order": "int4_32",
    "w8a16": "q8_0", "w8a8": "int8_row", "fp8-tensor": "fp8_row", "fp8-channel": "fp8_row", "fp8-block": "fp8",
    "nf4": "nf4", "nf4-double": "nf4",
}  # fmt: skip
SHAPE = (48, 384)


def saved(folder, config, modules: dict, plain: dict | None = None) -> QuantisedCheckpoint:
    """modules: name -> tensors by suffix."""
    tensors = {f"{name}.{suffix}": array for name, parts in modules.items() for suffix, array in parts.items()}
    save_file(tensors | (plain or {}), folder / "model.safetensors")
    return QuantisedCheckpoint(SafetensorsCheckpoint(folder), config)


@pytest.mark.parametrize("case", CASES)
def test_values(case, tmp_path):
    config, write, options = CASES[case]
    parts, wanted = write(np.random.default_rng(0), SHAPE, **options)
    plain = {"model.norm.weight": np.ones(4, np.float32), "lm_head.weight": np.ones((3, 4), np.float32)}
    checkpoint = saved(tmp_path, config, {"model.a": parts}, plain)
    assert sorted(checkpoint.names()) == ["lm_head.weight", "model.a.weight", "model.norm.weight"]
    assert checkpoint.shape("model.a.weight") == SHAPE and checkpoint.shape("lm_head.weight") == (3, 4)
    found = checkpoint.tensor("model.a.weight")
    assert isinstance(found, PackedTensor) and found.format == FORMATS[case]
    np.testing.assert_array_equal(found.dequantise(), wanted)
    np.testing.assert_array_equal(found.rows(np.array([5, 2, 40])).dequantise(), wanted[[5, 2, 40]])
    np.testing.assert_array_equal(found.rows(slice(8, 24)).dequantise(), wanted[8:24])
    assert isinstance(checkpoint.tensor("model.norm.weight"), np.ndarray)


def test_a_short_last_group(tmp_path):
    """576 inputs in groups of 128: the last one has 64, and blocks are as long as divides both."""
    parts, wanted = gptq(np.random.default_rng(0), (16, 576), group=128, symmetric=False)
    found = saved(tmp_path, GPTQ | {"group_size": 128}, {"a": parts}).tensor("a.weight")
    assert found.format == "int4_64"
    np.testing.assert_array_equal(found.dequantise(), wanted)


def test_scales_that_are_no_float16_lose_nothing(tmp_path):
    parts, _ = gptq(np.random.default_rng(0), (16, 64))
    parts["scales"] = parts["scales"].astype(np.float32) * np.float32(1.0001)
    found = saved(tmp_path, GPTQ, {"a": parts}).tensor("a.weight")
    assert found.format == "int" and len(np.unique(found.dequantise()[:, 0] / parts["scales"][0])) > 1


def test_without_g_idx_groups_follow_each_other(tmp_path):
    parts, wanted = gptq(np.random.default_rng(0), (16, 64))
    del parts["g_idx"]
    np.testing.assert_array_equal(saved(tmp_path, GPTQ, {"a": parts}).tensor("a.weight").dequantise(), wanted)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"quant_method": "hqq"}, "quant_method 'hqq' is not supported; gptq, awq"),
        (GPTQ | {"bits": 3}, "bits 3 of gptq.*2, 4, 8"),
        (GPTQ | {"checkpoint_format": "marlin"}, "checkpoint_format 'marlin'.*gptq, gptq_v2"),
        ({"quant_method": "awq", "bits": 4, "version": "gemv"}, "version 'gemv' of awq.*gemm"),
        ({"quant_method": "compressed-tensors", "format": "nvfp4-pack-quantized"}, "format 'nvfp4-pack-quantized'"),
        (CASES["w8a8"][0] | {"sparsity_config": {"format": "sparse-24"}}, "sparsity_config.format 'sparse-24'"),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "q"}, "bnb_4bit_quant_type 'q'"),
        ({"quant_method": "fp8", "weight_block_size": [128]}, r"weight_block_size \[128\]"),
        (GPTQ | {"modules_to_not_convert": ["a"]}, "modules_to_not_convert names 'a', but .* holds model.a quantised"),
        (GPTQ | {"ignore": ["re:.*a$"]}, "ignore names 're:"),
    ],
)
def test_what_cannot_be_read_is_named(config, message, tmp_path):
    parts, _ = gptq(np.random.default_rng(0), (16, 64))
    with pytest.raises(CheckpointError, match=message):
        saved(tmp_path, config, {"model.a": parts})


def test_missing_and_misshapen_parts_are_named(tmp_path):
    parts, _ = gptq(np.random.default_rng(0), (16, 64))
    scales = parts.pop("scales")
    with pytest.raises(CheckpointError, match=r"a\.scales"):
        saved(tmp_path, GPTQ, {"a": parts}).tensor("a.weight")
    parts["scales"] = scales[:1]
    with pytest.raises(CheckpointError, match=r"a\.scales.*do not fit"):
        saved(tmp_path, GPTQ, {"a": parts}).tensor("a.weight")
