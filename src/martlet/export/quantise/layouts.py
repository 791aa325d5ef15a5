"""Rounded matrices as files keep them: GPTQ's and AWQ's tensors, and compressed-tensors'.

What each tensor holds is told on the pages that read them, martlet.hub.quantised.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from martlet.export.quantise.rounding import Grid, Rounded
from martlet.hub.quantised.awq import ORDER

Tensors = Mapping[str, np.ndarray]


@dataclass(frozen=True, slots=True)
class Layout:
    """tensors: of a matrix, by suffix. config: config.json's quantization_config, without what is not to be quantised.
    left_alone: the key for that."""

    tensors: Callable[[Rounded, Grid], Tensors]
    config: Callable[[Grid], dict[str, Any]]
    left_alone: str


def words(quants: np.ndarray, bits: int) -> np.ndarray:
    """uint8 [..., n] -> int32 [..., n * bits / 32], the first in the lowest bits."""
    each = 8 // bits
    parts = np.ascontiguousarray(quants).reshape(*quants.shape[:-1], -1, each)
    data = parts[..., 0].copy()
    for i in range(1, each):
        data |= parts[..., i] << (bits * i)
    return data.view(np.int32)


def gptq(rounded: Rounded, grid: Grid) -> Tensors:
    quants, scales, zeros = _arrays(rounded)
    return {
        "qweight": np.ascontiguousarray(words(quants, grid.bits).T),
        "qzeros": words(np.ascontiguousarray(((zeros - 1) & grid.most).astype(np.uint8).T), grid.bits),
        "scales": np.ascontiguousarray(scales.T),
        "g_idx": rounded.group_of.numpy(force=True).astype(np.int32),
    }


def gptq_config(grid: Grid) -> dict[str, Any]:
    """desc_act asks a reader to sort inputs by their group. Ours lie so, whatever order they were rounded in."""
    return {
        "quant_method": "gptq", "bits": grid.bits, "group_size": grid.group, "sym": grid.symmetric, "desc_act": False,
        "true_sequential": False, "checkpoint_format": "gptq", "lm_head": False,
    }  # fmt: skip


def awq(rounded: Rounded, grid: Grid) -> Tensors:
    quants, scales, zeros = _arrays(rounded)

    def packed(rows: np.ndarray) -> np.ndarray:
        eights = rows.reshape(len(rows), -1, 8)[..., ORDER]
        return words(eights.reshape(len(rows), -1), 4)

    return {
        "qweight": packed(quants.T),
        "qzeros": packed(zeros.astype(np.uint8).T),
        "scales": np.ascontiguousarray(scales.T),
    }


def awq_config(grid: Grid) -> dict[str, Any]:
    return {
        "quant_method": "awq", "bits": 4, "group_size": grid.group, "zero_point": not grid.symmetric, "version": "gemm"
    }  # fmt: skip


def packed_integers(rounded: Rounded, grid: Grid) -> Tensors:
    quants, scales, _ = _arrays(rounded)
    shape = np.array(quants.shape, np.int64)
    return {"weight_packed": words(quants, grid.bits), "weight_scale": scales, "weight_shape": shape}


def int8(rounded: Rounded, grid: Grid) -> Tensors:
    quants, scales, _ = _arrays(rounded)
    return {"weight": (quants ^ np.uint8(0x80)).view(np.int8), "weight_scale": scales.astype(np.float32)}


def compressed_config(form: str, **more: Any) -> Callable[[Grid], dict[str, Any]]:
    def config(grid: Grid) -> dict[str, Any]:
        weights = {"num_bits": grid.bits, "type": "int", "symmetric": True, "dynamic": False, "observer": "minmax"}
        per = {"strategy": "channel"} if form == "int-quantized" else {"strategy": "group", "group_size": grid.group}
        group = {"targets": ["Linear"], "weights": weights | per, "input_activations": None} | more
        return {
            "quant_method": "compressed-tensors", "format": form, "quantization_status": "compressed",
            "config_groups": {"group_0": group},
        }  # fmt: skip

    return config


_TOKENS = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True}
GPTQ = Layout(gptq, gptq_config, "modules_to_not_convert")
AWQ = Layout(awq, awq_config, "modules_to_not_convert")
PACKED = Layout(packed_integers, compressed_config("pack-quantized"), "ignore")
INT8 = Layout(int8, compressed_config("int-quantized", input_activations=_TOKENS), "ignore")


def _arrays(rounded: Rounded) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(quants uint8 [out, in], scales float16 [out, groups], zeros int16 [out, groups])"""
    return (
        rounded.quants.numpy(force=True),
        rounded.scales.numpy(force=True).astype(np.float16),
        rounded.zeros.numpy(force=True).astype(np.int16),
    )
