"""Gemma: LLaMA's shape with GELU, norms stored as w - 1, and embeddings that grow by sqrt(width) where they enter."""

from __future__ import annotations

from martlet.model.families.family import Config, Family, need
from martlet.model.families.llama import decoder
from martlet.model.spec import DecoderSpec


def gemma(family: str, config: Config, **more) -> DecoderSpec:
    # `hidden_act` of early configs says gelu, but the network was trained with the tanh form
    activation = config.get("hidden_activation") or "gelu_pytorch_tanh"
    config = {"head_dim": 256, **config, "hidden_act": activation}
    scale = need(config, "hidden_size") ** 0.5
    bias = bool(config.get("attention_bias", False))
    return decoder(
        family, config, qkv_bias=bias, out_bias=bias, tied_default=True, embedding_scale=scale, **more
    )  # fmt: skip


def read(config: Config) -> DecoderSpec:
    return gemma("gemma", config)


FAMILY = Family("gemma", read, "Gemma 2B and 7B", example={"head_dim": 16}, norm_offset=1.0)
