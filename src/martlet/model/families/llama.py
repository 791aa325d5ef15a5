"""LLaMA 2, 3 and 3.1, and all that share its shape: SmolLM2, Yi, Zephyr's base, TinyLlama.

`decoder` is the shape itself; the pages of its relatives call it and say what differs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from martlet.model.families.family import Config, Family, need, read_activation, read_head_dim
from martlet.model.families.rotary import longest, read_rope
from martlet.model.spec import Attention, DecoderSpec, FeedForward, Layer, Rope


def decoder(
    family: str,
    config: Config,
    *,
    windows: Sequence[int | None] | None = None,
    ropes: Sequence[Rope] | None = None,
    mlps: Sequence[FeedForward] | None = None,
    style: str = "half",
    scale: float | None = None,
    softcap: float | None = None,
    qk_norm: bool = False,
    qkv_bias: bool = False,
    out_bias: bool = False,
    mlp_bias: bool = False,
    post_norms: bool = False,
    tied_default: bool = False,
    **rest: Any,
) -> DecoderSpec:
    """Pre-norm blocks of grouped-query attention and a gated feed-forward.

    windows, ropes, mlps: one entry a layer, where they are not what the config says of all. scale: of the scores, by
    default 1 / sqrt(head_dim). rest: further fields of the DecoderSpec.
    """
    depth, heads = need(config, "num_hidden_layers"), need(config, "num_attention_heads")
    head_dim = read_head_dim(config)
    windows = windows or [None] * depth
    ropes = ropes or [read_rope(config, head_dim, style=style)] * depth
    if mlps is None:
        mlps = [FeedForward(need(config, "intermediate_size"), read_activation(config), bias=mlp_bias)] * depth
    layers = [
        Layer(
            Attention(
                heads=heads,
                kv_heads=config.get("num_key_value_heads") or heads,
                head_dim=head_dim,
                rope=rope,
                scale=scale or head_dim**-0.5,
                window=window or None,
                softcap=softcap,
                qk_norm=qk_norm,
                qkv_bias=qkv_bias,
                out_bias=out_bias,
            ),
            mlp,
            post_norms,
        )
        for window, rope, mlp in zip(windows, ropes, mlps, strict=True)
    ]
    return DecoderSpec(
        family=family,
        vocab_size=need(config, "vocab_size"),
        width=need(config, "hidden_size"),
        layers=tuple(layers),
        eps=float(config.get("rms_norm_eps") or 1e-6),
        tied=bool(config.get("tie_word_embeddings", tied_default)),
        max_positions=longest(config, ropes[0]),
        **rest,
    )


def read(config: Config) -> DecoderSpec:
    bias = bool(config.get("attention_bias", False))
    mlp_bias = bool(config.get("mlp_bias", False))
    return decoder("llama", config, qkv_bias=bias, out_bias=bias, mlp_bias=mlp_bias)


FAMILY = Family("llama", read, "LLaMA 2, 3, 3.1 and 3.2, Yi, SmolLM2, TinyLlama", gguf_interleaved=True)
