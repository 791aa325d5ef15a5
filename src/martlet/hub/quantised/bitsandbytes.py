"""bitsandbytes: four bits as indices into a table of 16 numbers (nf4, fp4), or LLM.int8's bytes.

X.weight  uint8, two indices a byte, the earlier one in the HIGH half; rows follow each other without a seam
X.weight.quant_map  float32 [16]     X.weight.absmax  float32, one scale for each `blocksize` weights
X.weight.quant_state.bitsandbytes__nf4  JSON in bytes: shape, blocksize, and of double quantisation the offset;
then absmax is uint8 into X.weight.nested_quant_map [256], scaled by X.weight.nested_absmax, plus that offset
X.SCB  float32 [out], of int8: value = q * SCB / 127
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import numpy as np

from martlet.errors import CheckpointError
from martlet.hub.checkpoint import Checkpoint, PackedTensor, has
from martlet.hub.quantised.blocks import rows_with_scale, unpacked

KINDS = ("nf4", "fp4")
_STATES = tuple(f".weight.quant_state.bitsandbytes__{kind}" for kind in KINDS)
SUFFIXES = (
    *_STATES, ".SCB", ".weight_format", ".weight.absmax", ".weight.quant_map", ".weight.nested_absmax",
    ".weight.nested_quant_map",
)  # fmt: skip


def check(config: Mapping[str, Any]) -> None:
    kind = config.get("bnb_4bit_quant_type", "nf4")
    if config.get("load_in_4bit") and kind not in KINDS:
        raise CheckpointError(
            f"quantization_config: bnb_4bit_quant_type {kind!r} is not supported; {', '.join(KINDS)} are"
        )


def holds(checkpoint: Checkpoint, module: str) -> bool:
    return has(checkpoint, module + ".weight")


def _state(checkpoint: Checkpoint, module: str) -> dict[str, Any] | None:
    for state in _STATES:
        if has(checkpoint, module + state):
            try:
                return json.loads(checkpoint.tensor(module + state).tobytes())
            except ValueError as error:
                where = checkpoint.where(module + state)
                raise CheckpointError(f"{where}: tensor {module}{state} is not JSON: {error}") from error
    return None


def shape(checkpoint: Checkpoint, module: str, config: Mapping[str, Any]) -> tuple[int, ...]:
    state = _state(checkpoint, module)
    return checkpoint.shape(module + ".weight") if state is None else tuple(state["shape"])


def tensor(checkpoint: Checkpoint, module: str, config: Mapping[str, Any]) -> PackedTensor:
    state, at = _state(checkpoint, module), module + ".weight"
    weight = checkpoint.tensor(at)
    if state is None:
        return rows_with_scale(
            "int8_row", weight, checkpoint.tensor(module + ".SCB").astype(np.float32) / np.float32(127)
        )
    size, matrix = int(state["blocksize"]), tuple(state["shape"])
    table = checkpoint.tensor(at + ".quant_map").astype(np.float32)
    absmax = checkpoint.tensor(at + ".absmax")
    if has(checkpoint, at + ".nested_absmax"):
        nested = checkpoint.tensor(at + ".nested_quant_map").astype(np.float32)[absmax]
        scale = checkpoint.tensor(at + ".nested_absmax").astype(np.float32)
        block = np.arange(len(nested)) // int(state["nested_blocksize"])
        absmax = nested * scale[block] + np.float32(state["nested_offset"])
    pairs = weight.reshape(-1).view(np.uint8)
    count = int(np.prod(matrix))
    if len(pairs) * 2 < count or len(absmax) * size < count:
        raise CheckpointError(
            f"{checkpoint.where(at)}: tensor {at} has {2 * len(pairs)} weights and {len(absmax)} scales of {size} for "
            f"a matrix {list(matrix)}"
        )

    def values() -> np.ndarray:
        quants = np.stack([pairs >> 4, pairs & 15], -1).reshape(-1)[:count]
        scales = np.repeat(absmax.astype(np.float32), size)[:count]
        return (table[quants] * scales).reshape(matrix)

    return unpacked("nf4", matrix, values)
