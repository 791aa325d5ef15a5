"""LLaMA 2, 3 and 3.1, and all that share its shape: SmolLM2, Yi, Zephyr's base, TinyLlama.

`decoder` is the shape itself; the pages of its relatives call it and say what differs.
"""

from __future__ import annotations

from martlet.model.families.family import Config, Family, need, read_activation, read_head_dim, read_rope
from martlet.model.spec import Attention, DecoderSpec, FeedForward, Layer


def decoder(
    family: str,
    config: Config,
    *,
    windows: list[int | None] | None = None,
    qk_norm: bool = False,
    qkv_bias: bool = False,
    out_bias: bool = False,
    mlp_bias: bool = False,
    tied_default: bool = False,
) -> DecoderSpec:
    """Pre-norm blocks of grouped-query attention and a gated feed-forward. windows: one entry a layer."""
    depth, heads, head_dim = (
        need(config, "num_hidden_layers"),
        need(config, "num_attention_heads"),
        read_head_dim(config),
    )
    rope = read_rope(config, head_dim)
    mlp = FeedForward(need(config, "intermediate_size"), activation=read_activation(config), bias=mlp_bias)

    def attention(window: int | None) -> Attention:
        return Attention(
            heads=heads,
            kv_heads=config.get("num_key_value_heads") or heads,
            head_dim=head_dim,
            rope=rope,
            scale=head_dim**-0.5,
            window=window,
            qk_norm=qk_norm,
            qkv_bias=qkv_bias,
            out_bias=out_bias,
        )

    return DecoderSpec(
        family=family,
        vocab_size=need(config, "vocab_size"),
        width=need(config, "hidden_size"),
        layers=tuple(Layer(attention(window), mlp) for window in windows or [None] * depth),
        eps=float(config.get("rms_norm_eps") or 1e-6),
        tied=bool(config.get("tie_word_embeddings", tied_default)),
        max_positions=int(config.get("max_position_embeddings") or 2048),
    )


def read(config: Config) -> DecoderSpec:
    bias = bool(config.get("attention_bias", False))
    mlp_bias = bool(config.get("mlp_bias", False))
    return decoder("llama", config, qkv_bias=bias, out_bias=bias, mlp_bias=mlp_bias)


FAMILY = Family("llama", read, gguf_interleaved=True)
