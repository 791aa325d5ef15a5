"""Qwen3 (dense): Qwen2 with an RMSNorm on each head of q and k in place of the biases, and head_dim its own number."""

from __future__ import annotations

from martlet.model.families.family import Config, Family
from martlet.model.families.llama import decoder
from martlet.model.families.qwen2 import read_windows
from martlet.model.spec import DecoderSpec


def read(config: Config) -> DecoderSpec:
    bias = bool(config.get("attention_bias", False))
    config = {"head_dim": 128, **config}  # Hugging Face's default, unlike the other families'
    return decoder("qwen3", config, windows=read_windows(config), qk_norm=True, qkv_bias=bias, out_bias=bias)


FAMILY = Family("qwen3", read, "Qwen3, dense", example={"head_dim": 16})
