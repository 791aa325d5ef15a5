"""Qwen3 with experts: Qwen3's attention, and in each layer a mixture of many small experts."""

from __future__ import annotations

from martlet.model.families.experts import read_mlps
from martlet.model.families.family import Config, Family
from martlet.model.families.llama import decoder
from martlet.model.families.qwen2 import read_windows
from martlet.model.spec import DecoderSpec


def read(config: Config) -> DecoderSpec:
    config = {"head_dim": 128, **config}
    mlps = read_mlps(config, count=128, active=8, renormalise=bool(config.get("norm_topk_prob", False)))
    bias = bool(config.get("attention_bias", False))
    windows = read_windows(config)
    return decoder("qwen3_moe", config, windows=windows, mlps=mlps, qk_norm=True, qkv_bias=bias, out_bias=bias)


FAMILY = Family(
    "qwen3_moe",
    read,
    "Qwen3 with experts (30B-A3B and others)",
    example={"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "head_dim": 16},
)
