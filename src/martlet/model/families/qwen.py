"""The first Qwen: LLaMA's shape, one tensor for q, k and v, with biases.

Its log-n attention and dynamic NTK begin beyond seq_length, and there this page ends: within it neither does anything.
"""

from __future__ import annotations

from martlet.errors import CheckpointError
from martlet.model.families.family import GGUF, Config, Family, fused, need, renamed
from martlet.model.families.llama import decoder
from martlet.model.spec import DecoderSpec


def read(config: Config) -> DecoderSpec:
    names = {
        "layer_norm_epsilon": "rms_norm_eps",
        "rotary_emb_base": "rope_theta",
        "rotary_pct": "partial_rotary_factor",
        "kv_channels": "head_dim",
        "seq_length": "max_position_embeddings",
    }
    if not config.get("no_bias", True):
        raise CheckpointError("a first Qwen with biases in all linears (no_bias false) is not supported")
    config = renamed(config, names)
    config |= {"intermediate_size": need(config, "intermediate_size") // 2}  # it counts gate and up together
    return decoder("qwen", config, qkv_bias=True)


_LAYER = "transformer.h.{n}."
NAMES = {
    "embed": "transformer.wte",
    "layers.attn_norm": _LAYER + "ln_1",
    **fused(_LAYER + "attn.c_attn", "q", "k", "v"),
    "layers.o": _LAYER + "attn.c_proj",
    "layers.mlp_norm": _LAYER + "ln_2",
    "layers.gate": _LAYER + "mlp.w2",
    "layers.up": _LAYER + "mlp.w1",
    "layers.down": _LAYER + "mlp.c_proj",
    "norm": "transformer.ln_f",
    "head": "lm_head",
}
FAMILY = Family(
    "qwen",
    read,
    "Qwen (first generation) up to its seq_length",
    example={"kv_channels": 16, "seq_length": 256, "layer_norm_epsilon": 1e-6},
    hf=NAMES,
    gguf=GGUF | fused("blk.{n}.attn_qkv", "q", "k", "v"),
)
