"""AWQ ("gemm"): four bits packed along the outputs, eight a word in the order 0 2 4 6 1 3 5 7.

    X.qweight  int32 [in, out / 8]     X.qzeros  int32 [groups, out / 8]     X.scales  [groups, out]

value = scale * (q - zero).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from martlet.errors import CheckpointError
from martlet.hub.checkpoint import Checkpoint, PackedTensor
from martlet.hub.quantised.blocks import Grouped
from martlet.hub.quantised.gptq import unpacked_words

SUFFIXES = (".qweight", ".qzeros", ".scales")
ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # nibble n of a word holds output ORDER[n]
_PLACES = np.argsort(ORDER)  # where output i of a word lies


def check(config: Mapping[str, Any]) -> None:
    bits = config.get("bits", config.get("w_bit"))
    if bits != 4:
        raise CheckpointError(f"quantization_config: bits {bits!r} of awq is not supported; 4 is")
    version = str(config.get("version", "gemm")).lower()
    if version != "gemm":
        raise CheckpointError(f"quantization_config: version {version!r} of awq is not supported; gemm is")


def holds(checkpoint: Checkpoint, module: str) -> bool:
    return True


def shape(checkpoint: Checkpoint, module: str, config: Mapping[str, Any]) -> tuple[int, ...]:
    inputs, words = checkpoint.shape(module + ".qweight")
    return words * 8, inputs


def tensor(checkpoint: Checkpoint, module: str, config: Mapping[str, Any]) -> PackedTensor:
    outputs, inputs = shape(checkpoint, module, config)
    scales, qweight = checkpoint.tensor(module + ".scales"), checkpoint.tensor(module + ".qweight")
    if scales.shape[1] != outputs or inputs % len(scales):
        raise CheckpointError(
            f"{checkpoint.where(module + '.scales')}: tensor {module}.scales {list(scales.shape)} does not fit a "
            f"matrix {[outputs, inputs]}"
        )
    if config.get("zero_point", True):
        zeros = in_order(checkpoint.tensor(module + ".qzeros"))
    else:
        zeros = np.full(scales.shape, 8, np.uint8)
    grouped = Grouped(
        (outputs, inputs), 4, lambda: np.ascontiguousarray(in_order(qweight).T), np.ascontiguousarray(scales.T),
        np.ascontiguousarray(zeros.T), np.arange(inputs) // (inputs // len(scales)),
    )  # fmt: skip
    return grouped.packed()


def in_order(words: np.ndarray) -> np.ndarray:
    """int32 [n, words] -> uint8 [n, 8 * words], the outputs as they follow each other."""
    quants = unpacked_words(words, 4).reshape(len(words), -1, 8)
    return quants[..., _PLACES].reshape(len(words), -1)
