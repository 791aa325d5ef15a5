"""What `--quant` makes of weights, for the reference: the values that the C++ kernels' formats stand for, as floats.

So a machine without a C++ compiler answers with the same weights, only more slowly and from more memory; activations,
which the C++ kernels round too, stay as they are. The formats: encode_row in csrc/cpu/pack.cpp.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import numpy as np

from martlet.errors import UsageError
from martlet.hub.checkpoint import PackedTensor, Tensor
from martlet.model import weights
from martlet.model.spec import DecoderSpec

BLOCK = 32  # weights of a block of four bits


def int8(matrix: np.ndarray) -> np.ndarray:
    """float32 [out, in]: a scale a row, 127 steps to either side."""
    largest = np.abs(matrix).max(axis=1, keepdims=True)
    inverse = np.divide(np.float32(127), largest, out=np.zeros_like(largest), where=largest > 0)
    return np.rint(matrix * inverse) * (largest / np.float32(127))


def int4(matrix: np.ndarray) -> np.ndarray:
    """float32 [out, in]: of each 32 inputs the range in 15 steps; its beginning and a step are float16."""
    rounded = np.empty_like(matrix)
    for start in range(0, matrix.shape[1], BLOCK):
        part = matrix[:, start : start + BLOCK]
        low, high = part.min(axis=1, keepdims=True), part.max(axis=1, keepdims=True)
        step = ((high - low) / np.float32(15)).astype(np.float16).astype(np.float32)
        first = low.astype(np.float16).astype(np.float32)
        quants = np.divide(part - first, step, out=np.zeros_like(part), where=step > 0)
        rounded[:, start : start + BLOCK] = np.rint(quants).clip(0, 15) * step + first
    return rounded


Rounding = tuple[str, Callable[[np.ndarray], np.ndarray]]  # format of tensors that are so already, and what rounds
INT8, INT4 = ("int8_row", int8), ("q4_1", int4)
LINEARS_AND_TABLES: dict[str, tuple[Rounding, Rounding]] = {"int8": (INT8, INT8), "int4": (INT4, INT8)}
DTYPES = {"float32": "float32", "bf16": "bfloat16", "int8": "float32", "int4": "float32"}
AS_STORED = ("auto", "stored")


def dtype_of(quant: str | None, asked: str, device: str) -> str:
    """The dtype to compute in, "auto" where `quant` asks for none. Raises UsageError for a quant that torch cannot be
    the reference of: on a GPU, kernels have formats of their own."""
    if quant is None or (device == "cpu" and quant in AS_STORED):
        return asked
    if device != "cpu" or quant not in DTYPES:
        known = ", ".join((*AS_STORED, *DTYPES)) if device == "cpu" else "none on a GPU"
        raise UsageError(
            f"quant {quant!r}: the torch runner computes in floats; of formats, it rounds weights to: {known}. A "
            "quantised checkpoint is unpacked when it is loaded",
            param="quant",
        )
    return DTYPES[quant] if asked == "auto" else asked


def rounded(stream: Iterator[tuple[str, Tensor]], spec: DecoderSpec, quant: str | None) -> Iterator[tuple[str, Tensor]]:
    """The weights with linears and head as `quant` has them. An embedding that is not the head too stays as it is."""
    if quant not in LINEARS_AND_TABLES:
        yield from stream
        return
    linear, table = LINEARS_AND_TABLES[quant]
    kinds = {parameter.name: parameter.kind for parameter in weights.parameters(spec)}
    for name, tensor in stream:
        if name == "head" or (name == "embed" and spec.tied):
            yield name, _round(tensor, *table)
        elif kinds[name] == "linear":
            yield name, _round(tensor, *linear)
        else:
            yield name, tensor


def _round(tensor: Tensor, format: str, rounding: Callable[[np.ndarray], np.ndarray]) -> Tensor:
    if not isinstance(tensor, PackedTensor):
        return rounding(np.asarray(tensor, np.float32))
    if tensor.format == format:
        return tensor
    stored = rounding(replace(tensor, order=None).dequantise())  # blocks hold columns that lie beside each other
    if tensor.order is None:
        return stored
    whole = np.empty_like(stored)
    whole[:, tensor.order] = stored
    return whole
