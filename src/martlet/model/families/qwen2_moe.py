"""Qwen1.5-MoE and Qwen2-MoE: Qwen2 with experts, and one that every token takes as well, behind a sigmoid gate."""

from __future__ import annotations

from martlet.model.families.experts import read_mlps
from martlet.model.families.family import Config, Family
from martlet.model.families.llama import decoder
from martlet.model.families.qwen2 import read_windows
from martlet.model.spec import DecoderSpec


def read(config: Config) -> DecoderSpec:
    config = {"shared_expert_intermediate_size": 5632, **config}
    shared, renormalise = config["shared_expert_intermediate_size"], bool(config.get("norm_topk_prob", False))
    mlps = read_mlps(config, count=60, active=4, renormalise=renormalise, shared=shared)
    bias = bool(config.get("qkv_bias", True))
    return decoder("qwen2_moe", config, windows=read_windows(config), mlps=mlps, qkv_bias=bias)


FAMILY = Family(
    "qwen2_moe",
    read,
    "Qwen1.5-MoE and Qwen2-MoE",
    example={"num_experts": 4, "moe_intermediate_size": 32, "shared_expert_intermediate_size": 64},
)
