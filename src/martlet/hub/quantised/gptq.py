"""GPTQ: integers packed along the inputs, 32 / bits a word; a scale and a zero for each group of inputs and output.

    X.qweight  int32 [in * bits / 32, out]     X.qzeros  int32 [groups, out * bits / 32]
    X.scales   [groups, out]                   X.g_idx   int32 [in], the group of each input (act-order mixes them)

value = scale * (q - zero). The first layout keeps zero - 1 (AutoGPTQ), "gptq_v2" the zero itself.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from martlet.errors import CheckpointError
from martlet.hub.checkpoint import Checkpoint, PackedTensor, has
from martlet.hub.quantised.blocks import Grouped

SUFFIXES = (".qweight", ".qzeros", ".scales", ".g_idx")
BITS = (2, 4, 8)
FORMATS = ("gptq", "gptq_v2")


def check(config: Mapping[str, Any]) -> None:
    if (bits := config.get("bits")) not in BITS:
        raise CheckpointError(
            f"quantization_config: bits {bits!r} of gptq is not supported; {', '.join(map(str, BITS))} are"
        )
    if _format(config) not in FORMATS:
        raise CheckpointError(
            f"quantization_config: checkpoint_format {_format(config)!r} of gptq is not supported; "
            f"{', '.join(FORMATS)} are"
        )
    if config.get("pack_dtype", "int32") != "int32":
        raise CheckpointError(f"quantization_config: pack_dtype {config['pack_dtype']!r} is not supported; int32 is")


def _format(config: Mapping[str, Any]) -> str:
    return config.get("checkpoint_format") or config.get("format") or "gptq"


def holds(checkpoint: Checkpoint, module: str) -> bool:
    return True


def _sizes(checkpoint: Checkpoint, module: str, config: Mapping[str, Any]) -> tuple[int, int, int]:
    """(outputs, inputs, bits). A file may mix bits (`dynamic`), which g_idx gives away."""
    words, outputs = checkpoint.shape(module + ".qweight")
    if not has(checkpoint, module + ".g_idx"):
        return outputs, words * 32 // config["bits"], config["bits"]
    (inputs,) = checkpoint.shape(module + ".g_idx")
    bits = words * 32 // inputs
    if bits not in BITS or words * 32 != bits * inputs:
        raise CheckpointError(
            f"{checkpoint.where(module + '.qweight')}: tensor {module}.qweight has {words} words for {inputs} inputs, "
            f"which is no packing of {', '.join(map(str, BITS))} bits"
        )
    return outputs, inputs, bits


def shape(checkpoint: Checkpoint, module: str, config: Mapping[str, Any]) -> tuple[int, ...]:
    return _sizes(checkpoint, module, config)[:2]


def tensor(checkpoint: Checkpoint, module: str, config: Mapping[str, Any]) -> PackedTensor:
    outputs, inputs, bits = _sizes(checkpoint, module, config)
    scales = checkpoint.tensor(module + ".scales")
    zeros = unpacked_words(checkpoint.tensor(module + ".qzeros"), bits)[:, :outputs].astype(np.int16)
    if _format(config) == "gptq":
        zeros = (zeros + 1) & ((1 << bits) - 1)
    if len(scales) != len(zeros) or scales.shape[1] != outputs:
        raise CheckpointError(
            f"{checkpoint.where(module + '.scales')}: {module}.scales {list(scales.shape)} and its zeros "
            f"{list(zeros.shape)} do not fit {outputs} outputs"
        )
    if has(checkpoint, module + ".g_idx"):
        group_of = np.asarray(checkpoint.tensor(module + ".g_idx"))
    else:
        size = inputs if config.get("group_size", -1) in (-1, None) else config["group_size"]
        group_of = np.arange(inputs) // size
    if group_of.min(initial=0) < 0 or group_of.max(initial=0) >= len(scales):
        raise CheckpointError(
            f"{checkpoint.where(module + '.scales')}: tensor {module}.scales has {len(scales)} groups, but inputs "
            f"belong to groups up to {group_of.max()}"
        )
    qweight = checkpoint.tensor(module + ".qweight")

    def quants() -> np.ndarray:
        words = np.ascontiguousarray(qweight.T)  # [out, words]: along a row, earlier inputs in lower bits
        return words.view(np.uint8) if bits == 4 else unpacked_words(words, bits)

    grouped = Grouped(
        (outputs, inputs), bits, quants, np.ascontiguousarray(scales.T), np.ascontiguousarray(zeros.T),
        group_of, pairs=bits == 4,
    )  # fmt: skip
    return grouped.packed()


def unpacked_words(words: np.ndarray, bits: int) -> np.ndarray:
    """int32 [..., n] -> uint8 [..., n * 32 / bits], lower bits first."""
    data = np.ascontiguousarray(words).view(np.uint8)
    shifts = np.arange(0, 8, bits, dtype=np.uint8)
    return ((data[..., None] >> shifts) & np.uint8((1 << bits) - 1)).reshape(*data.shape[:-1], -1)
