"""What a family page is made of: how to read a config, and what the checkpoint calls our parameters."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from martlet.errors import CheckpointError
from martlet.model.spec import DecoderSpec, Rope, RopeScaling

Config = Mapping[str, Any]
Names = Mapping[str, str]  # our name without layer number and ".weight" -> the checkpoint's, {n} for the layer

HF: Names = {
    "embed": "model.embed_tokens",
    "layers.attn_norm": "model.layers.{n}.input_layernorm",
    "layers.q": "model.layers.{n}.self_attn.q_proj",
    "layers.k": "model.layers.{n}.self_attn.k_proj",
    "layers.v": "model.layers.{n}.self_attn.v_proj",
    "layers.q_norm": "model.layers.{n}.self_attn.q_norm",
    "layers.k_norm": "model.layers.{n}.self_attn.k_norm",
    "layers.o": "model.layers.{n}.self_attn.o_proj",
    "layers.mlp_norm": "model.layers.{n}.post_attention_layernorm",
    "layers.gate": "model.layers.{n}.mlp.gate_proj",
    "layers.up": "model.layers.{n}.mlp.up_proj",
    "layers.down": "model.layers.{n}.mlp.down_proj",
    "norm": "model.norm",
    "head": "lm_head",
}

GGUF: Names = {
    "embed": "token_embd",
    "layers.attn_norm": "blk.{n}.attn_norm",
    "layers.q": "blk.{n}.attn_q",
    "layers.k": "blk.{n}.attn_k",
    "layers.v": "blk.{n}.attn_v",
    "layers.q_norm": "blk.{n}.attn_q_norm",
    "layers.k_norm": "blk.{n}.attn_k_norm",
    "layers.o": "blk.{n}.attn_output",
    "layers.mlp_norm": "blk.{n}.ffn_norm",
    "layers.gate": "blk.{n}.ffn_gate",
    "layers.up": "blk.{n}.ffn_up",
    "layers.down": "blk.{n}.ffn_down",
    "norm": "output_norm",
    "head": "output",
}


@dataclass(frozen=True, slots=True)
class Source:
    """Where a parameter lies in a checkpoint. rows: its rows in our order, when the file has them in another."""

    name: str
    rows: np.ndarray | None = None


@dataclass(frozen=True, slots=True)
class Family:
    """One page. read: Hugging Face config -> DecoderSpec, raising CheckpointError for what we cannot run.

    gguf_interleaved: GGUF files of this family hold the rows of q and k in the order that rotates pairs (2i, 2i + 1).
    """

    name: str
    read: Callable[[Config], DecoderSpec]
    hf: Names = field(default_factory=lambda: HF)
    gguf: Names = field(default_factory=lambda: GGUF)
    gguf_interleaved: bool = False

    def source(self, spec: DecoderSpec, parameter: str, layout: str) -> Source:
        """The tensor that holds our `parameter` in a checkpoint of `layout` ("gguf", or any other for HF names)."""
        part, layer, suffix = split_name(parameter)
        name = (self.gguf if layout == "gguf" else self.hf)[part].format(n=layer) + suffix
        if layout != "gguf" or not self.gguf_interleaved or part not in ("layers.q", "layers.k"):
            return Source(name)
        attention = spec.layers[layer].mixer
        heads = attention.heads if part == "layers.q" else attention.kv_heads
        return Source(name, deinterleaved_rows(heads, attention.head_dim))


def split_name(parameter: str) -> tuple[str, int, str]:
    """("layers.q", 3, ".bias") of "layers.3.q.bias"; layer 0 for what is in no layer; the suffix may be ".weight"."""
    stem, suffix = (parameter[:-5], ".bias") if parameter.endswith(".bias") else (parameter, ".weight")
    if not stem.startswith("layers."):
        return stem, 0, suffix
    _, layer, part = stem.split(".")
    return f"layers.{part}", int(layer), suffix


def deinterleaved_rows(heads: int, head_dim: int) -> np.ndarray:
    """Order in which to take rows stored for interleaved rotation, so that halves rotate: int64 [heads * head_dim]."""
    return np.arange(heads * head_dim).reshape(heads, head_dim // 2, 2).swapaxes(1, 2).reshape(-1)


def need(config: Config, key: str) -> Any:
    """config[key], or a CheckpointError that names the key."""
    if config.get(key) is None:
        raise CheckpointError(
            f"config of model_type {config.get('model_type')!r} has no {key!r}, which its family needs"
        )
    return config[key]


def read_rope(config: Config, head_dim: int, *, default_base: float = 10000.0) -> Rope:
    """The rotary embedding of a config: old style (rope_theta, rope_scaling) or new (rope_parameters)."""
    table = dict(config.get("rope_scaling") or {}) | dict(config.get("rope_parameters") or {})
    base = float(table.get("rope_theta") or config.get("rope_theta") or default_base)
    dim = int(head_dim * float(table.get("partial_rotary_factor") or config.get("partial_rotary_factor") or 1.0))
    kind = table.get("rope_type") or table.get("type") or "default"
    match kind:
        case "default":
            scaling = None
        case "linear":
            scaling = RopeScaling("linear", float(need(table, "factor")))
        case "llama3":
            scaling = RopeScaling(
                "llama3",
                factor=float(need(table, "factor")),
                low_freq_factor=float(table.get("low_freq_factor", 1.0)),
                high_freq_factor=float(table.get("high_freq_factor", 4.0)),
                original_max_positions=int(table.get("original_max_position_embeddings", 8192)),
            )
        case _:
            raise CheckpointError(f"rope scaling {kind!r} is not supported; default, linear and llama3 are")
    return Rope(base=base, dim=dim, scaling=scaling)


def read_head_dim(config: Config) -> int:
    return int(config.get("head_dim") or need(config, "hidden_size") // need(config, "num_attention_heads"))


def read_activation(config: Config) -> str:
    """Our name of hidden_act."""
    names = {"silu": "silu", "swish": "silu", "gelu_pytorch_tanh": "gelu_tanh", "gelu_new": "gelu_tanh", "gelu": "gelu"}
    name = config.get("hidden_act") or config.get("hidden_activation") or "silu"
    if name not in names:
        raise CheckpointError(f"activation {name!r} is not supported; {', '.join(names)} are")
    return names[name]
