"""GLM-4-0414 (9B, 32B) and GLM-Z1: GLM with norms behind attention and feed-forward too."""

from __future__ import annotations

from martlet.model.families.family import Config, Family
from martlet.model.families.glm import GGUF_NAMES, HF_NAMES, glm
from martlet.model.spec import DecoderSpec


def read(config: Config) -> DecoderSpec:
    return glm("glm4", config, post_norms=True)


NAMES = {
    **HF_NAMES,
    "layers.attn_post_norm": "model.layers.{n}.post_self_attn_layernorm",
    "layers.mlp_post_norm": "model.layers.{n}.post_mlp_layernorm",
}
FAMILY = Family("glm4", read, "GLM-4-0414, GLM-Z1", example={"head_dim": 16}, hf=NAMES, gguf=GGUF_NAMES)
