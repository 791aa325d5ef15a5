"""Which parameters a decoder has, and how to fetch them from a checkpoint, one at a time and checked.

A runner walks `load` once and puts each tensor where it wants it: dequantised, packed, or fused with its neighbours.
Linears keep their own names here (q, k, v, o, gate, up, down), so that an adapter or a quantisation speaks of them
whatever a runner fuses; `fused_rows` says where each lies in a fused matrix.
"""

from __future__ import annotations

from collections.abc import Iterator
from math import prod
from typing import Literal, NamedTuple

import numpy as np

from martlet.errors import CheckpointError
from martlet.hub.card import ModelCard
from martlet.hub.checkpoint import Checkpoint, PackedTensor, Tensor
from martlet.hub.dummy import DummyCheckpoint
from martlet.model import families
from martlet.model.spec import Attention, ChannelMix, DecoderSpec, Experts, FeedForward, Layer, Recurrence

Kind = Literal["embedding", "norm", "linear", "router", "bias", "mix"]
# A router is a small linear that nobody quantises; neither are the vectors and low-rank maps of a mix.


class ParameterSpec(NamedTuple):
    name: str
    shape: tuple[int, ...]
    kind: Kind


def parameters(spec: DecoderSpec) -> Iterator[ParameterSpec]:
    """Every parameter of a decoder, in the order in which it is used. Names and shapes: martlet.model.spec."""
    tokens = spec.vocabulary.stop - spec.vocabulary.start
    yield ParameterSpec("embed", (tokens, spec.width), "embedding")
    if spec.embed_norm:
        yield from _norm("embed_norm", spec)
    for n, layer in enumerate(spec.layers):
        at = f"layers.{n}."
        yield from _norm(at + "attn_norm", spec)
        if isinstance(layer.mixer, Recurrence):
            yield from _time_mix(at + "time.", layer.mixer, spec)
        else:
            yield from _attention(at, layer.mixer, spec)
        if layer.post_norms:
            yield from _norm(at + "attn_post_norm", spec)
        yield from _norm(at + "mlp_norm", spec)
        yield from _second_half(at, layer, spec.width)
        if layer.post_norms:
            yield from _norm(at + "mlp_post_norm", spec)
    yield from _norm("norm", spec)
    if not spec.tied:
        yield ParameterSpec("head", (tokens, spec.width), "linear")


def _norm(name: str, spec: DecoderSpec) -> Iterator[ParameterSpec]:
    yield ParameterSpec(name, (spec.width,), "norm")
    if spec.norms == "layer":
        yield ParameterSpec(name + ".bias", (spec.width,), "bias")


def _attention(at: str, attention: Attention, spec: DecoderSpec) -> Iterator[ParameterSpec]:
    for part, size in (("q", attention.q_size), ("k", attention.kv_size), ("v", attention.kv_size)):
        yield from _linear(at + part, size, spec.width, attention.qkv_bias)
    if attention.qk_norm:
        yield ParameterSpec(at + "q_norm", (attention.head_dim,), "norm")
        yield ParameterSpec(at + "k_norm", (attention.head_dim,), "norm")
    yield from _linear(at + "o", spec.width, attention.q_size, attention.out_bias)


def _time_mix(at: str, mixer: Recurrence, spec: DecoderSpec) -> Iterator[ParameterSpec]:
    width, heads = spec.width, (mixer.heads, 1 if mixer.scalar else mixer.head_dim)

    def mix(name: str, *shape: int) -> ParameterSpec:
        return ParameterSpec(at + name, shape, "mix")

    def low_rank(name: str, rank: int) -> tuple[ParameterSpec, ...]:
        return mix(name + "_down", rank, width), mix(name + "_up", mixer.width, rank)

    gate = mixer.gated and mixer.generation < 7
    shares = {5: "rkv" + "g" * gate, 6: "rkvgwx", 7: "rwkvag"}[mixer.generation]
    yield from (mix(f"mix_{share}", width) for share in shares)
    if mixer.generation == 6:
        yield mix("mix_down", 5 * mixer.mix_rank, width)
        yield mix("mix_up", 5, mixer.mix_rank, width)
    for part in "rkv" + "g" * gate:
        yield ParameterSpec(at + part, (mixer.width, width), "linear")
    yield mix("decay", *((mixer.width,) if mixer.generation > 5 else heads))
    if mixer.generation > 5:
        yield from low_rank("decay", mixer.decay_rank)
    yield mix("log_bonus" if mixer.log_bonus else "bonus", *heads)
    if mixer.generation == 7:
        yield mix("removal", mixer.width)
        yield mix("renewal", mixer.width)
        yield mix("rate", mixer.width)
        yield from low_rank("rate", mixer.rate_rank)
        yield from low_rank("gate", mixer.gate_rank)
        if not mixer.first:
            yield mix("value", mixer.width)
            yield from low_rank("value", mixer.value_rank)
    yield ParameterSpec(at + "norm", (mixer.width,), "norm")
    yield ParameterSpec(at + "norm.bias", (mixer.width,), "bias")
    yield ParameterSpec(at + "o", (width, mixer.width), "linear")


def _second_half(at: str, layer: Layer, width: int) -> Iterator[ParameterSpec]:
    mlp = layer.mlp
    if isinstance(mlp, ChannelMix):
        yield ParameterSpec(at + "channel.mix_k", (width,), "mix")
        yield ParameterSpec(at + "channel.k", (mlp.hidden, width), "linear")
        if mlp.gated:
            yield ParameterSpec(at + "channel.mix_r", (width,), "mix")
            yield ParameterSpec(at + "channel.r", (width, width), "linear")
        yield ParameterSpec(at + "channel.v", (width, mlp.hidden), "linear")
    elif mlp.experts is None:
        yield from _feed_forward(at, width, mlp.hidden, mlp)
    else:
        yield from _experts(at, width, mlp, mlp.experts)


def _feed_forward(at: str, width: int, hidden: int, mlp: FeedForward) -> Iterator[ParameterSpec]:
    for part in ("gate", "up") if mlp.gated else ("up",):
        yield from _linear(at + part, hidden, width, mlp.bias)
    yield from _linear(at + "down", width, hidden, mlp.bias)


def _experts(at: str, width: int, mlp: FeedForward, experts: Experts) -> Iterator[ParameterSpec]:
    yield ParameterSpec(at + "router", (experts.count, width), "router")
    for number in range(experts.count):
        yield from _feed_forward(f"{at}experts.{number}.", width, mlp.hidden, mlp)
    if experts.shared:
        yield from _feed_forward(at + "shared.", width, experts.shared, mlp)
        if experts.shared_gated:
            yield ParameterSpec(at + "shared_gate", (1, width), "router")


def _linear(name: str, rows: int, columns: int, bias: bool) -> Iterator[ParameterSpec]:
    yield ParameterSpec(name, (rows, columns), "linear")
    if bias:
        yield ParameterSpec(name + ".bias", (rows,), "bias")


def num_parameters(spec: DecoderSpec) -> int:
    return sum(prod(parameter.shape) for parameter in parameters(spec))


def fused_rows(parts: list[tuple[str, int]]) -> dict[str, slice]:
    """Where each part lies when matrices are stacked: {"q": rows 0 ... 575, "k": ...} from (part, rows) pairs."""
    ends = np.cumsum([rows for _, rows in parts])
    return {part: slice(int(end) - rows, int(end)) for (part, rows), end in zip(parts, ends, strict=True)}


def read_spec(card: ModelCard) -> DecoderSpec:
    """The decoder of a card. Raises ModelNotFound for an unknown family, CheckpointError for a config we cannot run."""
    return families.get(card.family).read(card.config)


def load(card: ModelCard, spec: DecoderSpec, checkpoint: Checkpoint) -> Iterator[tuple[str, Tensor]]:
    """The name of every parameter of `spec` with its tensor, one at a time, in the order of `parameters`.

    Of a decoder that is a part, what this part holds, cut out before anything is converted.
    A matrix may come as a PackedTensor; what is not a matrix comes as an array. Raises CheckpointError naming our
    parameter, the checkpoint's tensor, the file, and the shapes wanted and found.
    """
    whole = spec if spec.part is None else spec.part.whole
    made_up = checkpoint.random if isinstance(checkpoint, DummyCheckpoint) else None
    page = families.get(card.family)
    layout = "" if made_up else _layout(card, checkpoint, page)
    for parameter in parameters(whole):
        if made_up is not None:
            tensor: Tensor = made_up(parameter.name, parameter.shape)
        else:
            tensor = _fetch(card, checkpoint, parameter, page.source(whole, parameter.name, layout))
        yield parameter.name, tensor if spec.part is None else spec.part.cut(parameter.name, tensor)


def fetch(card: ModelCard, spec: DecoderSpec, checkpoint: Checkpoint, parameter: ParameterSpec) -> Tensor:
    """One parameter of `load`, whole."""
    page = families.get(card.family)
    return _fetch(card, checkpoint, parameter, page.source(spec, parameter.name, _layout(card, checkpoint, page)))


def _layout(card: ModelCard, checkpoint: Checkpoint, page: families.Family) -> str:
    return "gguf" if card.format == "gguf" else page.layout(checkpoint.names())


def _fetch(card: ModelCard, checkpoint: Checkpoint, parameter: ParameterSpec, source: families.Source) -> Tensor:
    asked = f"parameter {parameter.name!r} of {card.name}, tensor {source.name!r}"
    try:
        found = checkpoint.shape(source.name)
    except KeyError:
        known = ", ".join(sorted(checkpoint.names())[:3])
        raise CheckpointError(f"{asked}: not in {card.path} (which holds {known}, ...)") from None
    wanted = source.shape(parameter.shape)
    if [size for size in found if size != 1] != [size for size in wanted if size != 1]:
        where = checkpoint.where(source.name)
        raise CheckpointError(f"{asked} in {where}: shape {list(found)}, wanted {list(wanted)}")
    return _cut(checkpoint.tensor(source.name), source, parameter.shape)


def _cut(tensor: Tensor, source: families.Source, shape: tuple[int, ...]) -> Tensor:
    """What a source says of a tensor: its part of it, with what is to be folded in."""
    if source.item is not None:
        tensor = tensor.item_at(source.item) if isinstance(tensor, PackedTensor) else tensor[source.item]
    if source.rows is not None:
        tensor = tensor.rows(source.rows) if isinstance(tensor, PackedTensor) else tensor[source.rows]
    if isinstance(tensor, PackedTensor) and (len(shape) == 1 or source.unit_rows):
        tensor = tensor.dequantise()
    if isinstance(tensor, PackedTensor):
        return tensor
    if source.transposed:
        tensor = tensor.reshape(shape[::-1]).T
    if source.complement:
        tensor = np.float32(1) - tensor.astype(np.float32)
    if source.add:
        tensor = tensor.astype(np.float32) + np.float32(source.add)
    if source.unit_rows:
        plain = tensor.astype(np.float32)
        tensor = (plain / np.maximum(np.linalg.norm(plain, axis=1, keepdims=True), 1e-12)).astype(tensor.dtype)
    return tensor.reshape(shape)
