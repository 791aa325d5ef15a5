"""RWKV 7 (Goose): a delta rule in place of decay, a channel mix without a gate; names of fla and of the authors."""

from __future__ import annotations

from martlet.errors import CheckpointError
from martlet.model.families.family import Config, Family, Names, Stored, need
from martlet.model.families.rwkv5 import ORIGINAL_FRAME, decoder, heads_of
from martlet.model.spec import ChannelMix, DecoderSpec, Recurrence

RANKS = {"decay": "decay", "a": "rate", "v": "value", "gate": "gate"}  # a config's name of a map -> ours


def read(config: Config) -> DecoderSpec:
    if config.get("attn") is not None:
        raise CheckpointError("an RWKV 7 with attention in some of its layers (attn) is not supported")
    width, depth = need(config, "hidden_size"), need(config, "num_hidden_layers")
    heads = heads_of(config)
    ranks = {f"{ours}_rank": need(config, f"{theirs}_low_rank_dim") for theirs, ours in RANKS.items()}
    eps = float(config.get("group_norm_epsilon") or heads["head_dim"] * float(config.get("norm_eps") or 1e-5))
    mixer = Recurrence(7, **heads, gated=True, eps=eps, **ranks)
    mixers = [mixer._replace(first=True), *[mixer] * (depth - 1)]
    hidden = config.get("intermediate_size") or int(width * (config.get("hidden_ratio") or 4))
    return decoder("rwkv7", config, mixers, ChannelMix(hidden, gated=False))


def _vectors(time: str) -> Names:
    """Tensors of the time mix that both layouts call alike."""
    return {
        **{f"layers.time.mix_{share}": Stored(f"{time}.x_{share}") for share in "rwkvag"},
        "layers.time.removal": Stored(f"{time}.k_k"),
        "layers.time.renewal": Stored(f"{time}.k_a"),
        "layers.time.bonus": Stored(f"{time}.r_k"),
    }


_MAPS = {"decay": "w", "rate": "a", "value": "v", "gate": "g"}  # our name of a map -> the tensors'


def _original() -> Names:
    names = dict(ORIGINAL_FRAME) | _vectors("blocks.{n}.att")
    for ours, theirs in _MAPS.items():
        names[f"layers.time.{ours}"] = Stored(f"blocks.{{n}}.att.{theirs}0")
        names[f"layers.time.{ours}_down"] = Stored(f"blocks.{{n}}.att.{theirs}1", transposed=True)
        names[f"layers.time.{ours}_up"] = Stored(f"blocks.{{n}}.att.{theirs}2", transposed=True)
    return names | {"layers.channel.mix_k": Stored("blocks.{n}.ffn.x_k")}


def _hf() -> Names:
    layer, time = "model.layers.{n}.", "model.layers.{n}.attn"
    names = dict(_vectors(time))
    for ours, theirs in _MAPS.items():
        names[f"layers.time.{ours}"] = Stored(f"{time}.{theirs}_lora.lora.2.bias")
        names[f"layers.time.{ours}_down"] = Stored(f"{time}.{theirs}_lora.lora.0.weight")
        names[f"layers.time.{ours}_up"] = Stored(f"{time}.{theirs}_lora.lora.2.weight")
    return names | {
        "embed": "model.embeddings",
        "embed_norm": "model.layers.0.pre_norm",
        "layers.attn_norm": layer + "attn_norm",
        **{f"layers.time.{part}": f"{time}.{part}_proj" for part in "rkvo"},
        "layers.time.norm": time + ".g_norm",
        "layers.mlp_norm": layer + "ffn_norm",
        "layers.channel.mix_k": Stored(layer + "ffn.x_k"),
        "layers.channel.k": layer + "ffn.key",
        "layers.channel.v": layer + "ffn.value",
        "norm": "model.norm",
        "head": "lm_head",
    }


FAMILY = Family(
    "rwkv7",
    read,
    "RWKV 7 (Goose, RWKV-7 World)",
    example={"head_dim": 16} | {f"{theirs}_low_rank_dim": 8 for theirs in RANKS},
    hf=_hf(),
    original=_original(),
    gguf=None,
)
