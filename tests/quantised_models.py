"""Checkpoints of every quantised layout, written in a few lines each, with the matrices they stand for.

Written from the layouts' definitions, not with our readers: a writer gives (tensors of a module by suffix, the module's
matrix in float32, [out, in]).
"""

from __future__ import annotations

import json

import ml_dtypes
import numpy as np

NF4 = np.array(
    [-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
     -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
     0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0], np.float32)  # fmt: skip


def words(quants: np.ndarray, bits: int) -> np.ndarray:
    """Unsigned [..., n] -> int32 [..., ceil(n * bits / 32)], the first in the lowest bits."""
    each = 32 // bits
    quants = np.pad(quants.astype(np.int64), [(0, 0)] * (quants.ndim - 1) + [(0, -quants.shape[-1] % each)])
    parts = quants.reshape(*quants.shape[:-1], -1, each) << (bits * np.arange(each))
    return np.ascontiguousarray(parts.sum(-1), np.uint32).view(np.int32)


def drawn(rng, shape, bits, groups, *, symmetric, scale=np.float16):
    """(quants [out, in], scales [out, groups], zeros [out, groups])"""
    out, _ = shape
    quants = rng.integers(0, 1 << bits, shape)
    scales = (rng.uniform(0.5, 1.5, (out, groups)) * 0.3 / (1 << bits)).astype(scale)
    middle = 1 << (bits - 1)
    zeros = np.full((out, groups), middle) if symmetric else rng.integers(0, 1 << bits, (out, groups))
    return quants, scales, zeros


def value(quants, scales, zeros, group_of):
    return (quants - zeros[:, group_of]).astype(np.float32) * scales[:, group_of].astype(np.float32)


def gptq(rng, shape, *, bits=4, group=32, symmetric=True, act_order=False, v2=False):
    size = shape[1] if group == -1 else group
    group_of = np.arange(shape[1]) // size
    if act_order:
        group_of = rng.permutation(group_of)
    quants, scales, zeros = drawn(rng, shape, bits, group_of.max() + 1, symmetric=symmetric)
    stored = zeros if v2 else (zeros - 1) % (1 << bits)
    tensors = {
        "qweight": np.ascontiguousarray(words(quants, bits).T),
        "qzeros": words(stored.T, bits),
        "scales": np.ascontiguousarray(scales.T),
        "g_idx": group_of.astype(np.int32),
    }
    return tensors, value(quants, scales, zeros, group_of)


def awq(rng, shape, *, group=32):
    group_of = np.arange(shape[1]) // group
    quants, scales, zeros = drawn(rng, shape, 4, group_of.max() + 1, symmetric=False)

    def packed(rows):  # [n, out]: output 0, 2, 4, 6, 1, 3, 5, 7 of each eight from the lowest bits on
        return words(rows.reshape(len(rows), -1, 8)[..., [0, 2, 4, 6, 1, 3, 5, 7]].reshape(len(rows), -1), 4)

    tensors = {"qweight": packed(quants.T), "qzeros": packed(zeros.T), "scales": np.ascontiguousarray(scales.T)}
    return tensors, value(quants, scales, zeros, group_of)


def compressed(rng, shape, *, bits=4, group=32, symmetric=True, act_order=False):
    """pack-quantized"""
    group_of = np.arange(shape[1]) // group
    if act_order:
        group_of = rng.permutation(group_of)
    quants, scales, zeros = drawn(rng, shape, bits, group_of.max() + 1, symmetric=symmetric, scale=ml_dtypes.bfloat16)
    tensors = {
        "weight_packed": words(quants, bits),
        "weight_scale": scales,
        "weight_shape": np.array(shape, np.int64),
    }
    if not symmetric:
        tensors["weight_zero_point"] = np.ascontiguousarray(words(zeros.T, bits).T)
    if act_order:
        tensors["weight_g_idx"] = group_of.astype(np.int32)
    return tensors, value(quants, scales, zeros, group_of)


def int8_channels(rng, shape):
    quants = rng.integers(-128, 128, shape).astype(np.int8)
    scales = rng.uniform(0.001, 0.003, (shape[0], 1)).astype(np.float32)
    return {"weight": quants, "weight_scale": scales}, quants * scales


def fp8(rng, shape, *, scales="tensor", block=(16, 24)):
    weight = rng.normal(0, 60, shape).astype(np.float32).astype(ml_dtypes.float8_e4m3fn)
    rows, columns = shape
    if scales == "tensor":
        scale = np.array([0.002], np.float32)
        return {"weight": weight, "weight_scale": scale}, weight.astype(np.float32) * scale
    if scales == "channel":
        scale = rng.uniform(0.001, 0.003, (rows, 1)).astype(np.float32)
        return {"weight": weight, "weight_scale": scale}, weight.astype(np.float32) * scale
    tall, wide = block
    scale = rng.uniform(0.001, 0.003, (-(-rows // tall), -(-columns // wide))).astype(np.float32)
    each = scale[np.arange(rows)[:, None] // tall, np.arange(columns)[None] // wide]
    return {"weight": weight, "weight_scale_inv": scale}, weight.astype(np.float32) * each


def nf4(rng, shape, *, double=False, size=64):
    quants = rng.integers(0, 16, shape[0] * shape[1])
    blocks = -(-len(quants) // size)
    state = {"quant_type": "nf4", "blocksize": size, "dtype": "bfloat16", "shape": list(shape)}
    absmax = rng.uniform(0.1, 0.5, blocks).astype(np.float32)
    tensors = {"weight": (quants[::2] << 4 | quants[1::2]).astype(np.uint8)[:, None], "weight.quant_map": NF4}
    if double:
        table = np.linspace(-1, 1, 256, dtype=np.float32)
        inner = rng.integers(100, 256, blocks).astype(np.uint8)
        scale = rng.uniform(0.1, 0.2, -(-blocks // 256)).astype(np.float32)
        offset = 0.25
        absmax = table[inner] * scale[np.arange(blocks) // 256] + np.float32(offset)
        tensors |= {"weight.absmax": inner, "weight.nested_absmax": scale, "weight.nested_quant_map": table}
        state |= {"nested_blocksize": 256, "nested_offset": offset, "nested_dtype": "float32"}
    else:
        tensors["weight.absmax"] = absmax
    tensors["weight.quant_state.bitsandbytes__nf4"] = np.frombuffer(json.dumps(state).encode(), np.uint8)
    whole = NF4[quants] * absmax[np.arange(len(quants)) // size]
    return tensors, whole.reshape(shape).astype(np.float32)


def _compressed_config(form, **weights):
    weights = {"type": "int", "num_bits": 8, "strategy": "group", "group_size": 32} | weights
    group = {"targets": ["Linear"], "weights": weights}
    return {
        "quant_method": "compressed-tensors",
        "format": form,
        "config_groups": {"group_0": group},
        "ignore": ["lm_head"],
    }


GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": False, "sym": True}
CASES = {  # name -> (quantization_config, writer, its options)
    "gptq": (GPTQ, gptq, {}),
    "gptq-128": (GPTQ | {"group_size": 128}, gptq, {"group": 128}),
    "gptq-64-zeros": (GPTQ | {"group_size": 64, "sym": False}, gptq, {"group": 64, "symmetric": False}),
    "gptq-columns": (GPTQ | {"group_size": -1}, gptq, {"group": -1}),
    "gptq-act-order": (GPTQ | {"desc_act": True}, gptq, {"act_order": True, "symmetric": False}),
    "gptq-v2": (GPTQ | {"checkpoint_format": "gptq_v2", "sym": False}, gptq, {"v2": True, "symmetric": False}),
    "gptq-8": (GPTQ | {"bits": 8}, gptq, {"bits": 8}),
    "gptq-8-zeros": (GPTQ | {"bits": 8, "sym": False}, gptq, {"bits": 8, "symmetric": False}),
    "gptq-2": (GPTQ | {"bits": 2}, gptq, {"bits": 2}),
    "gptq-24": (GPTQ | {"group_size": 24}, gptq, {"group": 24}),
    "awq": ({"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True, "version": "gemm"}, awq, {}),
    "w4a16": (_compressed_config("pack-quantized", num_bits=4), compressed, {}),
    "w4a16-zeros": (
        _compressed_config("pack-quantized", num_bits=4, symmetric=False), compressed, {"symmetric": False}
    ),
    "w4a16-act-order": (
        _compressed_config("pack-quantized", num_bits=4, actorder="group"), compressed, {"act_order": True}
    ),
    "w8a16": (_compressed_config("pack-quantized"), compressed, {"bits": 8}),
    "w8a8": (_compressed_config("int-quantized", strategy="channel"), int8_channels, {}),
    "fp8-tensor": (_compressed_config("float-quantized", type="float", strategy="tensor"), fp8, {}),
    "fp8-channel": (
        _compressed_config("float-quantized", type="float", strategy="channel"), fp8, {"scales": "channel"}
    ),
    "fp8-block": ({"quant_method": "fp8", "weight_block_size": [16, 24]}, fp8, {"scales": "block"}),
    "nf4": ({"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}, nf4, {}),
    "nf4-double": (
        {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_use_double_quant": True}, nf4, {"double": True}
    ),
}  # fmt: skip


def quantised(folder, tensors: dict[str, np.ndarray], case: str, linears: set[str]) -> tuple[dict, dict]:
    """Writes the checkpoint with its linears in a layout; gives the case's config and the plain tensors it stands for.

    tensors: name -> array. linears: which of them are quantised.
    """
    from safetensors.numpy import save_file

    config, write, options = CASES[case]
    rng, file, plain = np.random.default_rng(0), {}, {}
    for name, tensor in tensors.items():
        if name not in linears:
            file[name] = plain[name] = tensor
            continue
        module = name.removesuffix(".weight")
        parts, plain[name] = write(rng, tensor.shape, **options)
        file |= {f"{module}.{suffix}": array for suffix, array in parts.items()}
    save_file(file, folder / "model.safetensors")
    return config, plain
