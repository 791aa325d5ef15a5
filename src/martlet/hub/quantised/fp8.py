"""FP8: a matrix X.weight in e4m3 and its scales, one for all, one a row, or one a block of rows and columns.

The scales are X.weight_scale, or X.weight_scale_inv as DeepSeek calls them (they are multiplied with just the same).
Scales of activations are not used: activations stay in 16 or 32 bits, or get scales of their own.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from martlet.errors import CheckpointError
from martlet.hub.checkpoint import Checkpoint, PackedTensor, has
from martlet.hub.quantised.blocks import rows_with_scale, unpacked

SUFFIXES = (".weight_scale_inv", ".weight_scale", ".input_scale", ".input_scale_ub", ".activation_scale")
_SCALES = SUFFIXES[:2]


def check(config: Mapping[str, Any]) -> None:
    if config.get("fmt", "e4m3") != "e4m3":
        raise CheckpointError(f"quantization_config: fmt {config['fmt']!r} of fp8 is not supported; e4m3 is")
    block = config.get("weight_block_size")
    if block is not None and (len(block) != 2 or any(type(size) is not int or size < 1 for size in block)):
        raise CheckpointError(f"quantization_config: weight_block_size {block!r} is not [rows, columns]")


def holds(checkpoint: Checkpoint, module: str) -> bool:
    return has(checkpoint, module + ".weight")


def shape(checkpoint: Checkpoint, module: str, config: Mapping[str, Any]) -> tuple[int, ...]:
    return checkpoint.shape(module + ".weight")


def tensor(checkpoint: Checkpoint, module: str, config: Mapping[str, Any]) -> PackedTensor:
    name = next((module + suffix for suffix in _SCALES if has(checkpoint, module + suffix)), None)
    if name is None:
        raise KeyError(module + _SCALES[1])
    weight, scales = checkpoint.tensor(module + ".weight"), checkpoint.tensor(name).astype(np.float32)
    if weight.dtype.name != "float8_e4m3fn":
        raise CheckpointError(
            f"{checkpoint.where(module + '.weight')}: tensor {module}.weight is {weight.dtype.name}, not float8_e4m3fn"
        )
    return scaled(checkpoint, name, weight, scales, config.get("weight_block_size"))


def scaled(
    checkpoint: Checkpoint, name: str, weight: np.ndarray, scales: np.ndarray, block: list[int] | None
) -> PackedTensor:
    """weight [out, in] in e4m3 with scales called `name`: [], [1], [out], [out, 1], or one a `block`."""
    rows, columns = weight.shape
    if scales.size in (1, rows) and (scales.ndim < 2 or scales.shape[1] == 1) and block is None:
        return rows_with_scale("fp8_row", weight, scales)
    tall, wide = block or (1, 1)
    wanted = (-(-rows // tall), -(-columns // wide))
    if scales.shape != wanted:
        raise CheckpointError(
            f"{checkpoint.where(name)}: tensor {name} {list(scales.shape)} does not fit a matrix {[rows, columns]} in "
            f"blocks of {[tall, wide]}"
        )

    def values() -> np.ndarray:
        each = np.repeat(np.repeat(scales, tall, 0)[:rows], wide, 1)[:, :columns]
        return weight.astype(np.float32) * each

    return unpacked("fp8", weight.shape, values)
