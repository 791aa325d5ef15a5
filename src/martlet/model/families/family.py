"""What a family page is made of: how to read a config, and what the checkpoint calls our parameters."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np

from martlet.errors import CheckpointError
from martlet.model.spec import DecoderSpec, Layer

Config = Mapping[str, Any]


class Fused(NamedTuple):
    """A tensor that stacks the rows of `parts` ("q", "k", "v" or "gate", "up"), one after another.

    grouped: the rows of each kv head lie together, its query heads first, then its key, then its value (InternLM2).
    """

    name: str
    parts: tuple[str, ...]
    grouped: bool = False


class Stored(NamedTuple):
    """A tensor of just this name, with no ".weight" behind, and maybe in another form than the parameter: transposed
    ([in, out]), or 1 minus it (complement)."""

    name: str
    transposed: bool = False
    complement: bool = False


Names = Mapping[str, str | Fused | Stored]
"""Our name without layer number and ".weight" -> the checkpoint's, {n} being the layer and {e} the expert."""


def fused(name: str, *parts: str, grouped: bool = False) -> Names:
    """The entries of a page's names for the parts of a fused tensor."""
    return {f"layers.{part}": Fused(name, parts, grouped) for part in parts}


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
    "layers.router": "model.layers.{n}.mlp.gate",
    "layers.experts.gate": "model.layers.{n}.mlp.experts.{e}.gate_proj",
    "layers.experts.up": "model.layers.{n}.mlp.experts.{e}.up_proj",
    "layers.experts.down": "model.layers.{n}.mlp.experts.{e}.down_proj",
    "layers.shared.gate": "model.layers.{n}.mlp.shared_expert.gate_proj",
    "layers.shared.up": "model.layers.{n}.mlp.shared_expert.up_proj",
    "layers.shared.down": "model.layers.{n}.mlp.shared_expert.down_proj",
    "layers.shared_gate": "model.layers.{n}.mlp.shared_expert_gate",
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
    "layers.attn_post_norm": "blk.{n}.post_attention_norm",
    "layers.mlp_norm": "blk.{n}.ffn_norm",
    "layers.mlp_post_norm": "blk.{n}.post_ffw_norm",
    "layers.router": "blk.{n}.ffn_gate_inp",
    "layers.experts.gate": "blk.{n}.ffn_gate_exps",
    "layers.experts.up": "blk.{n}.ffn_up_exps",
    "layers.experts.down": "blk.{n}.ffn_down_exps",
    "layers.shared.gate": "blk.{n}.ffn_gate_shexp",
    "layers.shared.up": "blk.{n}.ffn_up_shexp",
    "layers.shared.down": "blk.{n}.ffn_down_shexp",
    "layers.shared_gate": "blk.{n}.ffn_gate_inp_shexp",
    "layers.gate": "blk.{n}.ffn_gate",
    "layers.up": "blk.{n}.ffn_up",
    "layers.down": "blk.{n}.ffn_down",
    "norm": "output_norm",
    "head": "output",
}


class Source(NamedTuple):
    """Where a parameter lies in a checkpoint, and what is folded into it on the way.

    rows: its rows in our order, where the tensor has them in another or holds other parameters as well; tall: how many
    rows the tensor has then. item: which of `items` matrices, where the tensor stacks one an expert. add: added to
    every number (norms stored as w - 1). unit_rows: every row is divided by its Euclidean length. transposed: the
    tensor is the parameter's transpose; complement: it holds 1 minus the parameter.
    """

    name: str
    rows: np.ndarray | slice | None = None
    tall: int | None = None
    item: int | None = None
    items: int = 0
    add: float = 0.0
    unit_rows: bool = False
    transposed: bool = False
    complement: bool = False

    def shape(self, wanted: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of the whole tensor, given that of the parameter."""
        if self.transposed:
            return wanted[::-1]
        rows = (wanted[0] if self.tall is None else self.tall, *wanted[1:])
        return rows if self.item is None else (self.items, *rows)


class Family(NamedTuple):
    """One page. read: Hugging Face config -> DecoderSpec, raising CheckpointError for what we cannot run.

    about: what it covers, for `martlet models families`. example: what a config needs beyond COMMON to be one of this
    family, for tests and that listing. hf, gguf: names; gguf is None where llama.cpp has no such architecture.
    original: names in the authors' own files, where those are not Hugging Face's but are read from safetensors as well.
    gguf_interleaved: GGUF files of this family hold the rows of q and k in the order that rotates pairs (2i, 2i + 1).
    norm_offset: what Hugging Face checkpoints leave to be added to norms (GGUF has it added already). unit_head:
    whether the head's rows are to have length 1.
    """

    name: str
    read: Callable[[Config], DecoderSpec]
    about: str = ""
    example: Config = MappingProxyType({})
    hf: Names = HF
    gguf: Names | None = GGUF
    original: Names | None = None
    gguf_interleaved: bool = False
    norm_offset: float = 0.0
    unit_head: Callable[[DecoderSpec], bool] = lambda spec: False

    def layout(self, tensors: Collection[str]) -> str:
        """Whose names a safetensors checkpoint with these tensors uses: "original" or "hf"."""
        return "original" if self.original and f"{self.original['embed']}.weight" in tensors else "hf"

    def source(self, spec: DecoderSpec, parameter: str, layout: str) -> Source:
        """The tensor that holds our `parameter` in a checkpoint of `layout` ("gguf", "original", else HF names)."""
        part, n, expert, suffix = split_name(parameter)
        names = {"gguf": self.gguf, "original": self.original}.get(layout, self.hf)
        if names is None:
            raise CheckpointError(f"GGUF files of family {self.name} are not read; safetensors are")
        entry = names[part]
        if isinstance(entry, Stored):
            return Source(entry.name.format(n=n), transposed=entry.transposed, complement=entry.complement)
        name = (entry.name if isinstance(entry, Fused) else entry).format(n=n, e=expert) + suffix
        if part == "head" and self.unit_head(spec):
            return Source(name, unit_rows=True)
        if part.endswith("norm"):
            return Source(name, add=0.0 if layout == "gguf" else self.norm_offset)
        layer = spec.layers[n]
        if isinstance(entry, Fused):
            return Source(name, *_place_in(entry, part.removeprefix("layers."), layer))
        if layout == "gguf" and self.gguf_interleaved and part in ("layers.q", "layers.k"):
            heads = layer.mixer.heads if part == "layers.q" else layer.mixer.kv_heads
            return Source(name, deinterleaved_rows(heads, layer.mixer.head_dim), heads * layer.mixer.head_dim)
        if expert is not None and layer.mlp.experts is not None and "{e}" not in entry:
            return Source(name, item=expert, items=layer.mlp.experts.count)
        return Source(name)


def split_name(parameter: str) -> tuple[str, int, int | None, str]:
    """(part, layer, expert, suffix): ("layers.experts.up", 3, 7, ".weight") of "layers.3.experts.7.up".

    Layer 0 for what is in no layer, expert None for what is in no expert; the suffix is ".weight" or ".bias".
    """
    stem, suffix = (parameter[:-5], ".bias") if parameter.endswith(".bias") else (parameter, ".weight")
    match stem.split("."):
        case ["layers", layer, "experts", expert, part]:
            return f"layers.experts.{part}", int(layer), int(expert), suffix
        case ["layers", layer, *part]:
            return f"layers.{'.'.join(part)}", int(layer), None, suffix
    return stem, 0, None, suffix


def _place_in(tensor: Fused, part: str, layer: Layer) -> tuple[np.ndarray | slice, int]:
    """Where a part's rows lie in a fused tensor, and how many rows it has."""
    attention, hidden = layer.mixer, layer.mlp.hidden
    sizes = {"q": attention.q_size, "k": attention.kv_size, "v": attention.kv_size, "gate": hidden, "up": hidden}
    total, before = sum(sizes[p] for p in tensor.parts), tensor.parts[: tensor.parts.index(part)]
    if not tensor.grouped:
        first = sum(sizes[p] for p in before)
        return slice(first, first + sizes[part]), total
    groups = np.arange(total).reshape(attention.kv_heads, -1)
    first, size = (sum(sizes[p] for p in parts) // attention.kv_heads for parts in (before, [part]))
    return groups[:, first : first + size].reshape(-1), total


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


def read_head_dim(config: Config) -> int:
    return int(config.get("head_dim") or need(config, "hidden_size") // need(config, "num_attention_heads"))


def renamed(config: Config, names: Mapping[str, str]) -> dict[str, Any]:
    """The config with the keys that this page's files use (names: theirs -> ours) under the usual ones too."""
    return dict(config) | {ours: config[theirs] for theirs, ours in names.items() if config.get(theirs) is not None}


def read_activation(config: Config) -> str:
    """Our name of hidden_act."""
    names = {"silu": "silu", "swish": "silu", "gelu_pytorch_tanh": "gelu_tanh", "gelu_new": "gelu_tanh", "gelu": "gelu"}
    name = config.get("hidden_act") or config.get("hidden_activation") or "silu"
    if name not in names:
        raise CheckpointError(f"activation {name!r} is not supported; {', '.join(names)} are")
    return names[name]
