"""RWKV 5.0, 5.1 and 5.2 (Eagle), in the names of transformers and of the authors; `decoder` serves 6 and 7 too.

The versions differ in shapes alone: 5.0 has no gate, 5.0 and 5.1 one decay a head, 5.2 one a channel.
"""

from __future__ import annotations

from collections.abc import Iterable

from martlet.errors import CheckpointError
from martlet.model.families.family import Config, Family, Names, Stored, need
from martlet.model.spec import ChannelMix, DecoderSpec, Layer, Recurrence

LONGEST = 1 << 18
"""A recurrence has no longest text; this bounds the room for a sequence's token ids."""


def decoder(family: str, config: Config, mixers: Iterable[Recurrence], mlp: ChannelMix) -> DecoderSpec:
    """Layers of a time mix and a channel mix, with LayerNorms, one of them behind the embedding."""
    if config.get("tie_word_embeddings"):
        raise CheckpointError(f"a {family} whose head is its embedding matrix is not supported")
    return DecoderSpec(
        family=family,
        vocab_size=need(config, "vocab_size"),
        width=need(config, "hidden_size"),
        layers=tuple(Layer(mixer, mlp) for mixer in mixers),
        eps=float(config.get("layer_norm_epsilon") or config.get("norm_eps") or 1e-5),
        tied=False,
        max_positions=LONGEST,
        norms="layer",
        embed_norm=True,
    )


def heads_of(config: Config) -> dict[str, int]:
    """heads and head_dim of a Recurrence, under the names that configs have for them."""
    width, size = need(config, "hidden_size"), int(config.get("head_size") or config.get("head_dim") or 64)
    if config.get("attention_hidden_size") not in (None, width) or width % size:
        raise CheckpointError(
            f"hidden_size {width}, attention_hidden_size {config.get('attention_hidden_size')} and head_size {size}: "
            "RWKV's heads fill the hidden size"
        )
    return {"heads": width // size, "head_dim": size}


def hidden_of(config: Config) -> int:
    """Of the channel mix: what the config says, else 3.5 times the width in whole 32s."""
    return config.get("intermediate_size") or int(need(config, "hidden_size") * 3.5) // 32 * 32


def norm_eps(config: Config) -> float:
    """Of each head's norm: files tell of a norm of y / head_size_divisor with eps 1e-5, which is the same function."""
    return 1e-5 * float(config.get("head_size_divisor") or 8) ** 2


def read(config: Config) -> DecoderSpec:
    version = str(config.get("model_version") or "5_2").replace(".", "_")
    if version not in ("5_0", "5_1", "5_2"):
        raise CheckpointError(f"model_version {version!r} of RWKV 5 is none of 5_0, 5_1 and 5_2")
    mixer = Recurrence(
        generation=5,
        **heads_of(config),
        gated=version != "5_0",
        scalar=version != "5_2",
        log_bonus=bool(config.get("log_bonus", False)),
        eps=norm_eps(config),
    )
    return decoder("rwkv5", config, [mixer] * need(config, "num_hidden_layers"), ChannelMix(hidden_of(config)))


def frame(layer: str, embed: str, first_norm: str, last_norm: str, time: str, channel: str, norms: str) -> Names:
    """Names that generations 5 and 6 share. first_norm: of the embedding; norms: ln1 and ln2, {i} for the number."""
    return {
        "embed": embed,
        "embed_norm": first_norm,
        "layers.attn_norm": layer + norms.format(i=1),
        **{f"layers.time.{part}": f"{layer}{time}.{name}" for part, name in LINEARS.items()},
        "layers.time.decay": Stored(f"{layer}{time}.time_decay"),
        "layers.time.bonus": Stored(f"{layer}{time}.time_faaaa"),
        "layers.time.log_bonus": Stored(f"{layer}{time}.time_first"),
        "layers.time.norm": f"{layer}{time}.ln_x",
        "layers.mlp_norm": layer + norms.format(i=2),
        "layers.channel.k": f"{layer}{channel}.key",
        "layers.channel.r": f"{layer}{channel}.receptance",
        "layers.channel.v": f"{layer}{channel}.value",
        "norm": last_norm,
        "head": "head",
    }


LINEARS = {"r": "receptance", "k": "key", "v": "value", "g": "gate", "o": "output"}
HF_FRAME = frame("rwkv.blocks.{n}.", "rwkv.embeddings", "rwkv.blocks.0.pre_ln", "rwkv.ln_out", "attention",
                 "feed_forward", "ln{i}")  # fmt: skip
ORIGINAL_FRAME = frame("blocks.{n}.", "emb", "blocks.0.ln0", "ln_out", "att", "ffn", "ln{i}")


def _shares(time: str, channel: str, long: bool) -> Names:
    """time_mix_* tell what the token itself contributes; our shares are the other's."""
    spelled = LINEARS if long else {part: part for part in LINEARS}
    return {
        f"layers.{room}.mix_{part}": Stored(f"{where}.time_mix_{spelled[part]}", complement=True)
        for room, where, parts in (("time", time, "rkvg"), ("channel", channel, "kr"))
        for part in parts
    }


FAMILY = Family(
    "rwkv5",
    read,
    "RWKV 5.0, 5.1 and 5.2 (Eagle, RWKV-5 World)",
    example={"head_size": 16},
    hf=HF_FRAME | _shares("rwkv.blocks.{n}.attention", "rwkv.blocks.{n}.feed_forward", long=True),
    original=ORIGINAL_FRAME | _shares("blocks.{n}.att", "blocks.{n}.ffn", long=False),
    gguf=None,
)
