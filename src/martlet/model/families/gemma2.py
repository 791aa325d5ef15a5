"""Gemma 2: norms before and behind, soft caps on scores and logits, every other layer looks through a window."""

from __future__ import annotations

from martlet.model.families.family import HF, Config, Family, need
from martlet.model.families.gemma import gemma
from martlet.model.spec import DecoderSpec


def read_kinds(config: Config, every: int) -> list[str]:
    """One kind a layer: the config's list, else every `every`-th is global."""
    depth = need(config, "num_hidden_layers")
    return config.get("layer_types") or [
        "sliding_attention" if (n + 1) % every else "full_attention" for n in range(depth)
    ]


def sandwich(family: str, config: Config, kinds: list[str], *, window: int, **more) -> DecoderSpec:
    """What Gemma 2 and 3 share. window: of local layers, unless the config says."""
    size = config.get("sliding_window", window)
    return gemma(
        family,
        config,
        windows=[size if kind == "sliding_attention" else None for kind in kinds],
        scale=(config.get("query_pre_attn_scalar") or 256) ** -0.5,
        softcap=config.get("attn_logit_softcapping"),
        logit_softcap=config.get("final_logit_softcapping"),
        post_norms=True,
        **more,
    )


def read(config: Config) -> DecoderSpec:
    config = {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0, **config}
    return sandwich("gemma2", config, read_kinds(config, 2), window=4096)


NAMES = {
    **HF,
    "layers.attn_post_norm": "model.layers.{n}.post_attention_layernorm",
    "layers.mlp_norm": "model.layers.{n}.pre_feedforward_layernorm",
    "layers.mlp_post_norm": "model.layers.{n}.post_feedforward_layernorm",
}
FAMILY = Family("gemma2", read, "Gemma 2", example={"head_dim": 16}, hf=NAMES, norm_offset=1.0)
