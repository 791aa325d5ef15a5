"""RWKV 6 (Finch): the fifth's shape, with shares of the token before and decays that depend on the token."""

from __future__ import annotations

from martlet.model.families.family import Config, Family, Names, Stored, need
from martlet.model.families.rwkv5 import HF_FRAME, ORIGINAL_FRAME, decoder, heads_of, hidden_of, norm_eps
from martlet.model.spec import ChannelMix, DecoderSpec, Recurrence


def read(config: Config) -> DecoderSpec:
    large = need(config, "hidden_size") >= 4096  # configs do not tell the ranks; ours do where files are known
    mixer = Recurrence(
        generation=6,
        **heads_of(config),
        eps=norm_eps(config),
        mix_rank=config.get("mix_low_rank_dim") or (64 if large else 32),
        decay_rank=config.get("decay_low_rank_dim") or (128 if large else 64),
    )
    return decoder("rwkv6", config, [mixer] * need(config, "num_hidden_layers"), ChannelMix(hidden_of(config)))


def _names(frame: Names, time: str, channel: str) -> Names:
    return {
        **frame,
        **{f"layers.time.mix_{share}": Stored(f"{time}.time_maa_{share}") for share in "rkvgwx"},
        "layers.time.mix_down": Stored(f"{time}.time_maa_w1", transposed=True),
        "layers.time.mix_up": Stored(f"{time}.time_maa_w2"),
        "layers.time.decay_down": Stored(f"{time}.time_decay_w1", transposed=True),
        "layers.time.decay_up": Stored(f"{time}.time_decay_w2", transposed=True),
        **{f"layers.channel.mix_{share}": Stored(f"{channel}.time_maa_{share}") for share in "kr"},
    }


FAMILY = Family(
    "rwkv6",
    read,
    "RWKV 6 (Finch, RWKV-6 World)",
    example={"head_size": 16, "mix_low_rank_dim": 8, "decay_low_rank_dim": 8},
    hf=_names(HF_FRAME, "rwkv.blocks.{n}.attention", "rwkv.blocks.{n}.feed_forward"),
    original=_names(ORIGINAL_FRAME, "blocks.{n}.att", "blocks.{n}.ffn"),
    gguf=None,
)
