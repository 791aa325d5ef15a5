"""GLM-4-9B as transformers has it: half of each head rotates, in adjacent pairs; gate and up are one tensor."""

from __future__ import annotations

from martlet.model.families.family import GGUF, HF, Config, Family, fused
from martlet.model.families.llama import decoder
from martlet.model.spec import DecoderSpec


def glm(family: str, config: Config, *, post_norms: bool = False) -> DecoderSpec:
    config = {"head_dim": 128, "partial_rotary_factor": 0.5, "rms_norm_eps": 1.5625e-07, **config}
    bias = bool(config.get("attention_bias", True))
    return decoder(family, config, style="interleaved", qkv_bias=bias, post_norms=post_norms)


def read(config: Config) -> DecoderSpec:
    return glm("glm", config)


HF_NAMES = HF | fused("model.layers.{n}.mlp.gate_up_proj", "gate", "up")
GGUF_NAMES = GGUF | fused("blk.{n}.ffn_up", "gate", "up")
FAMILY = Family("glm", read, "GLM-4-9B in transformers' form", example={"head_dim": 16}, hf=HF_NAMES, gguf=GGUF_NAMES)
