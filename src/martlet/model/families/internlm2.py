"""InternLM2 and 2.5: LLaMA's shape; q, k and v are one tensor in which the rows of a kv head lie together."""

from __future__ import annotations

from martlet.model.families.family import Config, Family, fused
from martlet.model.families.llama import decoder
from martlet.model.spec import DecoderSpec


def read(config: Config) -> DecoderSpec:
    bias = bool(config.get("bias", False))
    return decoder("internlm2", config, qkv_bias=bias, out_bias=bias)


_LAYER = "model.layers.{n}."
NAMES = {
    "embed": "model.tok_embeddings",
    "layers.attn_norm": _LAYER + "attention_norm",
    **fused(_LAYER + "attention.wqkv", "q", "k", "v", grouped=True),
    "layers.o": _LAYER + "attention.wo",
    "layers.mlp_norm": _LAYER + "ffn_norm",
    "layers.gate": _LAYER + "feed_forward.w1",
    "layers.up": _LAYER + "feed_forward.w3",
    "layers.down": _LAYER + "feed_forward.w2",
    "norm": "model.norm",
    "head": "output",
}
FAMILY = Family("internlm2", read, "InternLM2, InternLM2.5", hf=NAMES, gguf_interleaved=True)
