"""Which parameters a decoder has, and how to fetch them from a checkpoint, one at a time and checked.

A runner walks `load` once and puts each tensor where it wants it: dequantised, packed, or fused with its neighbours.
Linears keep their own names here (q, k, v, o, gate, up, down), so that an adapter or a quantisation speaks of them
whatever a runner fuses; `fused_rows` says where each lies in a fused matrix.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np

from martlet.errors import CheckpointError
from martlet.hub.card import ModelCard
from martlet.hub.checkpoint import Checkpoint, PackedTensor, Tensor
from martlet.hub.dummy import DummyCheckpoint
from martlet.model import families
from martlet.model.spec import DecoderSpec

Kind = Literal["embedding", "norm", "linear", "bias"]


@dataclass(frozen=True, slots=True)
class ParameterSpec:
    name: str
    shape: tuple[int, ...]
    kind: Kind


def parameters(spec: DecoderSpec) -> Iterator[ParameterSpec]:
    """Every parameter of a decoder, in the order in which it is used. Names and shapes: martlet.model.spec."""
    yield ParameterSpec("embed", (spec.vocab_size, spec.width), "embedding")
    for n, layer in enumerate(spec.layers):
        attention, mlp, at = layer.mixer, layer.mlp, f"layers.{n}."
        yield ParameterSpec(at + "attn_norm", (spec.width,), "norm")
        for part, size in (("q", attention.q_size), ("k", attention.kv_size), ("v", attention.kv_size)):
            yield from _linear(at + part, size, spec.width, attention.qkv_bias)
        if attention.qk_norm:
            yield ParameterSpec(at + "q_norm", (attention.head_dim,), "norm")
            yield ParameterSpec(at + "k_norm", (attention.head_dim,), "norm")
        yield from _linear(at + "o", spec.width, attention.q_size, attention.out_bias)
        yield ParameterSpec(at + "mlp_norm", (spec.width,), "norm")
        for part in ("gate", "up") if mlp.gated else ("up",):
            yield from _linear(at + part, mlp.hidden, spec.width, mlp.bias)
        yield from _linear(at + "down", spec.width, mlp.hidden, mlp.bias)
    yield ParameterSpec("norm", (spec.width,), "norm")
    if not spec.tied:
        yield ParameterSpec("head", (spec.vocab_size, spec.width), "linear")


def _linear(name: str, rows: int, columns: int, bias: bool) -> Iterator[ParameterSpec]:
    yield ParameterSpec(name, (rows, columns), "linear")
    if bias:
        yield ParameterSpec(name + ".bias", (rows,), "bias")


def num_parameters(spec: DecoderSpec) -> int:
    return sum(int(np.prod(parameter.shape)) for parameter in parameters(spec))


def fused_rows(parts: list[tuple[str, int]]) -> dict[str, slice]:
    """Where each part lies when matrices are stacked: {"q": rows 0 ... 575, "k": ...} from (part, rows) pairs."""
    ends = np.cumsum([rows for _, rows in parts])
    return {part: slice(int(end) - rows, int(end)) for (part, rows), end in zip(parts, ends, strict=True)}


def read_spec(card: ModelCard) -> DecoderSpec:
    """The decoder of a card. Raises ModelNotFound for an unknown family, CheckpointError for a config we cannot run."""
    return families.get(card.family).read(card.config)


def load(card: ModelCard, spec: DecoderSpec, checkpoint: Checkpoint) -> Iterator[tuple[str, Tensor]]:
    """The name of every parameter of `spec` with its tensor, one at a time, in the order of `parameters`.

    A matrix may come as a PackedTensor; what is not a matrix comes as an array. Raises CheckpointError naming our
    parameter, the checkpoint's tensor, the file, and the shapes wanted and found.
    """
    family = families.get(card.family)
    for parameter in parameters(spec):
        if isinstance(checkpoint, DummyCheckpoint):
            yield parameter.name, checkpoint.random(parameter.name, parameter.shape)
            continue
        source = family.source(spec, parameter.name, card.format)
        yield parameter.name, _fetch(card, checkpoint, parameter, source)


def _fetch(card: ModelCard, checkpoint: Checkpoint, parameter: ParameterSpec, source: families.Source) -> Tensor:
    asked = f"parameter {parameter.name!r} of {card.name}, tensor {source.name!r}"
    try:
        found = checkpoint.shape(source.name)
    except KeyError:
        known = ", ".join(sorted(checkpoint.names())[:3])
        raise CheckpointError(f"{asked}: not in {card.path} (which holds {known}, ...)") from None
    if tuple(found) != parameter.shape:
        where = checkpoint.where(source.name)
        raise CheckpointError(f"{asked} in {where}: shape {list(found)}, wanted {list(parameter.shape)}")
    tensor = checkpoint.tensor(source.name)
    if isinstance(tensor, PackedTensor):
        if source.rows is not None:
            tensor = tensor.rows(source.rows)
        return tensor if len(parameter.shape) == 2 else tensor.dequantise()
    return tensor if source.rows is None else tensor[source.rows]
