"""Qwen1.5, Qwen2 and Qwen2.5: LLaMA's shape with biases on q, k and v, and a window on the upper layers if asked."""

from __future__ import annotations

from martlet.model.families.family import Config, Family, need
from martlet.model.families.llama import decoder
from martlet.model.spec import DecoderSpec


def read_windows(config: Config) -> list[int | None]:
    """One window a layer: from layer_types, else layers from max_window_layers on, and none unless switched on."""
    depth = need(config, "num_hidden_layers")
    if not config.get("use_sliding_window"):
        return [None] * depth
    window = config.get("sliding_window")
    types = config.get("layer_types")
    if types is None:
        first = config.get("max_window_layers", 28)
        types = ["sliding_attention" if n >= first else "full_attention" for n in range(depth)]
    return [window if kind == "sliding_attention" else None for kind in types]


def read(config: Config) -> DecoderSpec:
    return decoder("qwen2", config, windows=read_windows(config), qkv_bias=True)


FAMILY = Family("qwen2", read, "Qwen1.5, Qwen2 and Qwen2.5")
