"""The one decoder, in terms of the operation table: embed -> layers x (attention, mlp) -> norm -> head."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import groupby

import numpy as np
import torch

from martlet.hub.checkpoint import PackedTensor, Tensor
from martlet.kernels.ops import Ops, Plan, Weight
from martlet.model.spec import Attention, DecoderSpec, Layer


@dataclass(frozen=True, slots=True)
class Block:
    """A layer's weights as the kernels take them. qkv: rows of q, k, v; up: rows of gate (if gated), up."""

    attn_norm: torch.Tensor
    qkv: Weight
    qk_norms: torch.Tensor | None  # float32 [heads + kv_heads, head_dim]
    o: Weight
    mlp_norm: torch.Tensor
    up: Weight
    down: Weight


class Decoder:
    """A DecoderSpec with its weights on a device. weight_bytes: what they take there."""

    def __init__(
        self, spec: DecoderSpec, weights: Iterable[tuple[str, Tensor]], ops: Ops, device: str, dtype: torch.dtype
    ):
        self.spec, self.ops = spec, ops
        self.weight_bytes = 0
        self.blocks: list[Block] = []
        for place, group in groupby(weights, key=lambda item: _place(item[0])):
            tensors = {name: to_torch(tensor, device, dtype) for name, tensor in group}
            self.weight_bytes += sum(tensor.nbytes for tensor in tensors.values())
            match place:
                case "embed":
                    self.embed = tensors["embed"]
                case "norm":
                    self.norm = tensors["norm"]
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
        self, tokens: torch.Tensor, plans: Mapping[Attention, Plan], caches: list[torch.Tensor], wanted: torch.Tensor
    ) -> torch.Tensor:
        """Hidden states, ready for the head, of the tokens at `wanted`: int64 [N], int64 [S] -> [S, width]."""
        ops, eps = self.ops, self.spec.eps
        residual = ops.embedding(tokens, self.embed)
        x = None
        for layer, block, cache in zip(self.spec.layers, self.blocks, caches, strict=True):
            plan = plans[layer.mixer]
            if x is None:
                x = ops.rms_norm(residual, block.attn_norm, eps)
            else:
                x, residual = ops.add_rms_norm(x, residual, block.attn_norm, eps)
            q = ops.rotate_and_write(ops.linear(x, block.qkv), block.qk_norms, eps, cache, plan)
            x = ops.linear(ops.paged_attention(q, cache, plan), block.o)
            x, residual = ops.add_rms_norm(x, residual, block.mlp_norm, eps)
            x = ops.linear(ops.activation(ops.linear(x, block.up), layer.mlp), block.down)
        assert x is not None
        x, residual = x.index_select(0, wanted), residual.index_select(0, wanted)
        return ops.add_rms_norm(x, residual, self.norm, eps)[0]

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """[S, width] -> float32 [S, vocab]."""
        return self.ops.logits(hidden, self.head)


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
    """ "layers.7" of what lies in a layer, else the name itself."""
    return ".".join(name.split(".")[:2]) if name.startswith("layers.") else name


def _block(layer: Layer, parts: dict[str, torch.Tensor], ops: Ops) -> Block:
    attention = layer.mixer

    def fuse(*names: str) -> Weight:
        """Stack linears that share their input; their rows lie in this order (martlet.model.weights.fused_rows)."""
        matrix = torch.cat([parts.pop(name) for name in names]) if len(names) > 1 else parts.pop(names[0])
        biases = [parts.pop(name + ".bias") for name in names if name + ".bias" in parts]
        return ops.pack(matrix, torch.cat(biases) if biases else None)

    norms = None
    if attention.qk_norm:
        q, k = parts["q_norm"].float(), parts["k_norm"].float()
        norms = torch.cat([q.expand(attention.heads, -1), k.expand(attention.kv_heads, -1)])
    return Block(
        attn_norm=parts["attn_norm"],
        qkv=fuse("q", "k", "v"),
        qk_norms=norms,
        o=fuse("o"),
        mlp_norm=parts["mlp_norm"],
        up=fuse("gate", "up") if layer.mlp.gated else fuse("up"),
        down=fuse("down"),
    )
