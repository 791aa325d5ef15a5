"""The one decoder, in terms of the operation table: embed -> layers x (mixer, feed-forward) -> norm -> head."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import groupby

import numpy as np
import torch

from martlet.hub.checkpoint import PackedTensor, Tensor
from martlet.kernels.ops import Ops, Plan, Weight
from martlet.model.spec import Attention, ChannelMix, DecoderSpec, Experts, FeedForward, Layer, Mixer, Recurrence
from martlet.runners.torch_runner.adapters import Groups
from martlet.runners.torch_runner.collectives import Alone, Collectives
from martlet.runners.torch_runner.recurrence import EXACT, LayerState, Mix, as_mix, channel_mix, time_mix

Linear = Callable[[str, torch.Tensor, Weight], torch.Tensor]


@dataclass(frozen=True, slots=True)
class Dense:
    """A feed-forward. up: rows of gate (if gated), up."""

    up: Weight
    down: Weight


@dataclass(frozen=True, slots=True)
class Mixture:
    """A mixture of experts; up and down: one an expert."""

    router: Weight
    up: list[Weight]
    down: list[Weight]
    shared: Dense | None
    shared_gate: Weight | None


@dataclass(frozen=True, slots=True)
class Norm:
    """An RMSNorm, or a LayerNorm where there is a bias."""

    weight: torch.Tensor
    bias: torch.Tensor | None


@dataclass(frozen=True, slots=True)
class Heads:
    """Attention. qkv: rows of q, k, v."""

    qkv: Weight
    qk_norms: torch.Tensor | None  # float32 [heads + kv_heads, head_dim]
    o: Weight


@dataclass(frozen=True, slots=True)
class Block:
    """A layer's weights as the kernels take them."""

    attn_norm: Norm
    mixer: Heads | Mix
    attn_post_norm: Norm | None
    mlp_norm: Norm
    mlp: Dense | Mixture | Mix
    mlp_post_norm: Norm | None


class Decoder:
    """A DecoderSpec with its weights on a device. weight_bytes: what they take there."""

    def __init__(
        self,
        spec: DecoderSpec,
        weights: Iterable[tuple[str, Tensor]],
        ops: Ops,
        device: str,
        dtype: torch.dtype,
        ranks: Collectives | None = None,
    ):
        """ranks: those that share the model, where `spec` is a part of one."""
        self.spec, self.ops, self.ranks = spec, ops, ranks or Alone()
        self.weight_bytes = 0
        self.blocks: list[Block] = []
        for place, group in groupby(weights, key=lambda item: _place(item[0])):
            tensors = {name: to_torch(tensor, device, _precision(name, dtype)) for name, tensor in group}
            self.weight_bytes += sum(tensor.nbytes for tensor in tensors.values())
            match place:
                case "embed":
                    self.embed = tensors["embed"]
                case "embed_norm":
                    self.embed_norm = _norm(tensors, "embed_norm")
                case "norm":
                    self.norm = _norm(tensors, "norm")
                case "head":
                    self.head = ops.pack(tensors["head"])
                case _:
                    layer = spec.layers[len(self.blocks)]
                    parts = {name.removeprefix(place + "."): tensor for name, tensor in tensors.items()}
                    self.blocks.append(_block(layer, parts, ops))
        if spec.tied:
            self.head = ops.pack(self.embed)
            if self.head.matrix is not self.embed:
                self.weight_bytes += self.embed.nbytes

    def forward(
        self,
        tokens: torch.Tensor,
        plans: Mapping[Mixer, Plan],
        memory: list[torch.Tensor] | list[LayerState],
        wanted: torch.Tensor,
        groups: Groups | None = None,
    ) -> torch.Tensor:
        """Hidden states, ready for the head, of the tokens at `wanted`: int64 [N], int64 [S] -> [S, width].

        memory: each layer's cache, or its states. groups: the tokens that run with adapters; None when there are none.
        """
        residual = self._embed(tokens)
        if self.spec.embed_norm:
            residual = self._normed(residual, self.embed_norm)
        x = None
        for n, (layer, block, kept) in enumerate(zip(self.spec.layers, self.blocks, memory, strict=True)):
            plan, linear = plans[layer.mixer], partial(self._linear, groups, n)
            if x is None:
                x = self._normed(residual, block.attn_norm)
            else:
                x, residual = self._added(x, residual, block.attn_norm)
            if isinstance(block.mixer, Mix):
                x = self.ranks.all_reduce(time_mix(x, layer.mixer, block.mixer, kept, plan, self.ops))
            else:
                x = self.ranks.all_reduce(self._attend(x, block.mixer, kept, plan, linear))
            if block.attn_post_norm is not None:
                x = self._normed(x, block.attn_post_norm)
            x, residual = self._added(x, residual, block.mlp_norm)
            if isinstance(block.mlp, Mix):
                x = channel_mix(x, layer.mlp, block.mlp, kept, plan, self.ops, self.ranks)
            else:
                x = self.ranks.all_reduce(self._feed_forward(x, layer.mlp, block.mlp, linear))
            if block.mlp_post_norm is not None:
                x = self._normed(x, block.mlp_post_norm)
        assert x is not None
        x, residual = x.index_select(0, wanted), residual.index_select(0, wanted)
        return self._added(x, residual, self.norm)[0]

    def _normed(self, x: torch.Tensor, norm: Norm) -> torch.Tensor:
        if norm.bias is None:
            return self.ops.rms_norm(x, norm.weight, self.spec.eps)
        return self.ops.layer_norm(x, norm.weight, norm.bias, self.spec.eps)

    def _added(self, x: torch.Tensor, residual: torch.Tensor, norm: Norm) -> tuple[torch.Tensor, torch.Tensor]:
        """(the norm of x + residual, x + residual)."""
        if norm.bias is None:
            return self.ops.add_rms_norm(x, residual, norm.weight, self.spec.eps)
        return self.ops.add_layer_norm(x, residual, norm.weight, norm.bias, self.spec.eps)

    def _attend(self, x: torch.Tensor, heads: Heads, cache: torch.Tensor, plan: Plan, linear: Linear) -> torch.Tensor:
        q = self.ops.rotate_and_write(linear("qkv", x, heads.qkv), heads.qk_norms, self.spec.eps, cache, plan)
        return linear("o", self.ops.paged_attention(q, cache, plan), heads.o)

    def _embed(self, tokens: torch.Tensor) -> torch.Tensor:
        table, scale = self.embed, self.spec.embedding_scale
        if self.spec.part is None:
            return self.ops.embedding(tokens, table, scale)
        there = tokens - self.spec.vocabulary.start
        mine = (there >= 0) & (there < len(table))
        x = self.ops.embedding(torch.where(mine, there, 0), table, scale)
        return self.ranks.all_reduce(x.mul_(mine[:, None]))

    def _linear(self, groups: Groups | None, n: int, name: str, x: torch.Tensor, weight: Weight) -> torch.Tensor:
        """The linear `name` of layer n, with what adapters add to it."""
        y = self.ops.linear(x, weight)
        if groups is not None:
            self.ops.lora(x, y, groups.of(n, name))
        return y

    def _feed_forward(
        self, x: torch.Tensor, mlp: FeedForward, weights: Dense | Mixture, linear: Linear | None = None
    ) -> torch.Tensor:
        """linear(name, x, weight): for the dense ones, which may carry adapters."""
        ops = self.ops
        linear = linear or (lambda name, x, weight: ops.linear(x, weight))
        if isinstance(weights, Dense):
            return linear("down", ops.activation(linear("up", x, weights.up), mlp), weights.down)
        y = ops.experts(x, ops.linear(x, weights.router), weights.up, weights.down, mlp)
        if weights.shared is not None:
            shared = self._feed_forward(x, mlp, weights.shared)
            if weights.shared_gate is not None:
                shared = shared * ops.linear(x, weights.shared_gate).sigmoid()
            y = y + shared
        return y

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """[S, width] -> float32 [S, vocab]."""
        logits = self.ops.logits(hidden, self.head, self.spec.logit_softcap)
        return self.ranks.gather(logits, self.spec)


def to_torch(tensor: Tensor, device: str, dtype: torch.dtype) -> torch.Tensor:
    """A checkpoint's tensor as torch's own: copied (the file's mapping is not kept), dequantised, converted."""
    array = np.ascontiguousarray(tensor.dequantise() if isinstance(tensor, PackedTensor) else tensor)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # a read-only mapping: only read, by the copy below
        if array.dtype.name == "bfloat16":
            source = torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
        else:
            source = torch.from_numpy(array)
    return source.to(device=device, dtype=dtype, copy=True)


def _place(name: str) -> str:
    """ "layers.7" of what lies in a layer, else the name itself (of what it is the bias, for one)."""
    return ".".join(name.split(".")[:2]) if name.startswith("layers.") else name.removesuffix(".bias")


def _precision(name: str, dtype: torch.dtype) -> torch.dtype:
    part = name.partition(".time.")[2].removeprefix("log_")
    return torch.float32 if part in EXACT else dtype


def _norm(parts: dict[str, torch.Tensor], name: str) -> Norm:
    return Norm(parts[name], parts.get(name + ".bias"))


def _block(layer: Layer, parts: dict[str, torch.Tensor], ops: Ops) -> Block:
    mixer = layer.mixer
    return Block(
        attn_norm=_norm(parts, "attn_norm"),
        mixer=_mix(parts, "time.", ops) if isinstance(mixer, Recurrence) else _heads(mixer, parts, ops),
        attn_post_norm=_norm(parts, "attn_post_norm") if layer.post_norms else None,
        mlp_norm=_norm(parts, "mlp_norm"),
        mlp=_mix(parts, "channel.", ops) if isinstance(layer.mlp, ChannelMix) else _mlp(layer.mlp, parts, ops),
        mlp_post_norm=_norm(parts, "mlp_post_norm") if layer.post_norms else None,
    )


def _mix(parts: dict[str, torch.Tensor], at: str, ops: Ops) -> Mix:
    return as_mix({name.removeprefix(at): tensor for name, tensor in parts.items() if name.startswith(at)}, ops.pack)


def _fuse(parts: dict[str, torch.Tensor], ops: Ops, *names: str) -> Weight:
    """Stack linears that share their input; their rows lie in this order (martlet.model.weights.fused_rows)."""
    matrix = torch.cat([parts.pop(name) for name in names]) if len(names) > 1 else parts.pop(names[0])
    biases = [parts.pop(name + ".bias") for name in names if name + ".bias" in parts]
    return ops.pack(matrix, torch.cat(biases) if biases else None)


def _heads(attention: Attention, parts: dict[str, torch.Tensor], ops: Ops) -> Heads:
    norms = None
    if attention.qk_norm:
        q, k = parts["q_norm"].float(), parts["k_norm"].float()
        norms = torch.cat([q.expand(attention.heads, -1), k.expand(attention.kv_heads, -1)])
    return Heads(_fuse(parts, ops, "q", "k", "v"), norms, _fuse(parts, ops, "o"))


def _mlp(mlp: FeedForward, parts: dict[str, torch.Tensor], ops: Ops) -> Dense | Mixture:
    fuse = partial(_fuse, parts, ops)

    def dense(at: str = "") -> Dense:
        return Dense(fuse(at + "gate", at + "up") if mlp.gated else fuse(at + "up"), fuse(at + "down"))

    experts: Experts | None = mlp.experts
    if experts is None:
        return dense()
    each = [dense(f"experts.{number}.") for number in range(experts.count)]
    return Mixture(
        router=fuse("router"),
        up=[one.up for one in each],
        down=[one.down for one in each],
        shared=dense("shared.") if experts.shared else None,
        shared_gate=fuse("shared_gate") if experts.shared_gated else None,
    )
