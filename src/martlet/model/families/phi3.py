"""Phi-3, Phi-3.5 and Phi-4 (also mini): LLaMA's shape, fused tensors, LongRoPE for contexts beyond 4096."""

from __future__ import annotations

from martlet.model.families.family import GGUF, HF, Config, Family, fused, need
from martlet.model.families.llama import decoder
from martlet.model.spec import DecoderSpec


def read(config: Config) -> DecoderSpec:
    scaling = config.get("rope_scaling")
    if scaling and (scaling.get("rope_type") or scaling.get("type")) == "yarn":  # what early configs call LongRoPE
        config = {**config, "rope_scaling": {**scaling, "type": "longrope", "rope_type": "longrope"}}
    config = {"rms_norm_eps": 1e-5, **config}
    return decoder("phi3", config, windows=[config.get("sliding_window")] * need(config, "num_hidden_layers"))


FAMILY = Family(
    "phi3",
    read,
    "Phi-3, Phi-3.5, Phi-4",
    hf=HF
    | fused("model.layers.{n}.self_attn.qkv_proj", "q", "k", "v")
    | fused("model.layers.{n}.mlp.gate_up_proj", "gate", "up"),
    gguf=GGUF | fused("blk.{n}.attn_qkv", "q", "k", "v") | fused("blk.{n}.ffn_up", "gate", "up"),
)
