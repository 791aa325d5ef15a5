"""compressed-tensors, as llm-compressor writes: its format tells how a linear lies.

    pack-quantized    X.weight_packed  int32 [out, ceil(in * bits / 32)], lower bits first, q + 2^(bits - 1)
                      X.weight_shape   [out, in]
                      X.weight_zero_point  int32 [ceil(out * bits / 32), groups], packed alike along the outputs
                      X.weight_g_idx   int32 [in], the group of each input
    int-quantized     X.weight  int8 [out, in]
    float-quantized   X.weight  e4m3 [out, in]
    naive-quantized   one of the last two

with X.weight_scale [1], [out, 1], [out, groups] or, of floats, one a block. value = scale * (q - zero point).
Activations that a file wants quantised are kept as precisely as the runner has them, which loses less.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from martlet.errors import CheckpointError
from martlet.hub.checkpoint import Checkpoint, PackedTensor, has
from martlet.hub.quantised import fp8
from martlet.hub.quantised.blocks import Grouped, rows_with_scale
from martlet.hub.quantised.gptq import unpacked_words

SUFFIXES = (
    ".weight_scale", ".weight_packed", ".weight_shape", ".weight_zero_point", ".weight_g_idx", ".input_scale",
    ".input_zero_point",
)  # fmt: skip
FORMATS = ("pack-quantized", "int-quantized", "float-quantized", "naive-quantized", "mixed-precision", "dense")
BITS = {"int": (2, 4, 8), "float": (8,)}
STRATEGIES = ("tensor", "channel", "group", "block")


def check(config: Mapping[str, Any]) -> None:
    def bad(key: str, value: object, supported: Any) -> CheckpointError:
        return CheckpointError(
            f"quantization_config: {key} {value!r} of compressed-tensors is not supported; "
            f"{', '.join(map(str, supported))} are"
        )

    if (form := config.get("format", "dense")) not in FORMATS:
        raise bad("format", form, FORMATS)
    if (sparse := (config.get("sparsity_config") or {}).get("format", "dense")) != "dense":
        raise bad("sparsity_config.format", sparse, ["dense ones"])
    if config.get("transform_config"):
        raise CheckpointError("quantization_config: transform_config of compressed-tensors is not supported")
    for name, group in (config.get("config_groups") or {}).items():
        weights, at = group.get("weights") or {}, f"config_groups.{name}.weights."
        kind = weights.get("type", "int")
        if kind not in BITS:
            raise bad(at + "type", kind, BITS)
        if weights and weights.get("num_bits") not in BITS[kind]:
            raise bad(at + "num_bits", weights.get("num_bits"), BITS[kind])
        if weights and weights.get("strategy", "tensor") not in STRATEGIES:
            raise bad(at + "strategy", weights["strategy"], STRATEGIES)
        if group.get("format") not in (None, *FORMATS):
            raise bad(f"config_groups.{name}.format", group["format"], FORMATS)


def holds(checkpoint: Checkpoint, module: str) -> bool:
    return has(checkpoint, module + ".weight_scale")


def shape(checkpoint: Checkpoint, module: str, config: Mapping[str, Any]) -> tuple[int, ...]:
    if not has(checkpoint, module + ".weight_packed"):
        return checkpoint.shape(module + ".weight")
    return tuple(int(size) for size in checkpoint.tensor(module + ".weight_shape"))


def tensor(checkpoint: Checkpoint, module: str, config: Mapping[str, Any]) -> PackedTensor:
    outputs, inputs = shape(checkpoint, module, config)
    scales = checkpoint.tensor(module + ".weight_scale")
    zeros = None
    if has(checkpoint, module + ".weight_zero_point"):
        zeros = checkpoint.tensor(module + ".weight_zero_point")
    bits, packed = 8, None
    if has(checkpoint, module + ".weight_packed"):
        packed = checkpoint.tensor(module + ".weight_packed")
        bits = 32 // -(-inputs // packed.shape[1])
        if bits not in BITS["int"]:
            raise CheckpointError(
                f"{checkpoint.where(module + '.weight_packed')}: tensor {module}.weight_packed {list(packed.shape)} is "
                f"no packing of {inputs} inputs"
            )
    else:
        weight = checkpoint.tensor(module + ".weight")
        if weight.dtype.name == "float8_e4m3fn":
            return fp8.scaled(
                checkpoint, module + ".weight_scale", weight, scales.astype(np.float32), _block(config, scales, outputs)
            )
        if weight.dtype != np.int8:
            raise CheckpointError(
                f"{checkpoint.where(module + '.weight')}: tensor {module}.weight is {weight.dtype.name} and has scales"
            )
        if scales.size in (1, outputs) and (zeros is None or not zeros.any()):
            return rows_with_scale("int8_row", weight, scales)
    middle = 1 << (bits - 1)
    scales = scales.reshape(-1, scales.shape[-1] if scales.ndim == 2 else 1)
    scales = np.broadcast_to(scales, (outputs, scales.shape[1]))
    groups = scales.shape[1]
    if zeros is None:
        plain = np.full(scales.shape, middle, np.int16)
    elif packed is not None:
        plain = np.ascontiguousarray(unpacked_words(zeros.T, bits).T[:outputs]).astype(np.int16)
    else:
        plain = np.broadcast_to(zeros.reshape(-1, groups).astype(np.int16) + middle, scales.shape)
    group_of = np.arange(inputs) // -(-inputs // groups)
    if has(checkpoint, module + ".weight_g_idx"):
        named = np.asarray(checkpoint.tensor(module + ".weight_g_idx"))
        group_of = named if named.min() >= 0 else group_of  # -1: not set
    if plain.shape != scales.shape or group_of.max() >= groups:
        raise CheckpointError(
            f"{checkpoint.where(module + '.weight_scale')}: the scales {list(scales.shape)} and zero points "
            f"{list(plain.shape)} of {module} do not fit a matrix {[outputs, inputs]}"
        )

    def quants() -> np.ndarray:
        if packed is None:
            return weight.view(np.uint8) ^ np.uint8(0x80)
        return packed.view(np.uint8) if pairs else unpacked_words(packed, bits)[:, :inputs]

    pairs = bits == 4 and inputs % 8 == 0
    return Grouped((outputs, inputs), bits, quants, scales, plain, group_of, pairs=pairs).packed()


def _block(config: Mapping[str, Any], scales: np.ndarray, outputs: int) -> list[int] | None:
    """The block that the scales of a float matrix are of; None for one a row or one for all."""
    if scales.size in (1, outputs) and (scales.ndim < 2 or scales.shape[1] == 1):
        return None
    return next(_blocks(config), [128, 128])


def _blocks(config: Mapping[str, Any]) -> Iterator[list[int]]:
    for group in (config.get("config_groups") or {}).values():
        structure = (group.get("weights") or {}).get("block_structure")
        if structure:
            yield [int(size) for size in (structure.split("x") if isinstance(structure, str) else structure)]
