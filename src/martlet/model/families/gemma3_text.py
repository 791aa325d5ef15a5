"""Gemma 3, text: Gemma 2 without soft caps, with norms on q and k; five local layers with their own rope base, then
one global."""

from __future__ import annotations

from martlet.model.families.family import Config, Family, read_head_dim
from martlet.model.families.gemma2 import NAMES, read_kinds, sandwich
from martlet.model.families.rotary import read_rope
from martlet.model.spec import DecoderSpec


def read(config: Config) -> DecoderSpec:
    config = {"head_dim": 256, **config}
    kinds = read_kinds(config, config.get("sliding_window_pattern") or 6)
    tables = config.get("rope_parameters") or {}
    local = tables.get("sliding_attention") or {"rope_theta": config.get("rope_local_base_freq") or 10_000.0}
    world = tables.get("full_attention") or config.get("rope_scaling") or {}
    ropes = {
        "sliding_attention": read_rope(config, read_head_dim(config), table=local),
        "full_attention": read_rope(config, read_head_dim(config), table=world, default_base=1_000_000.0),
    }
    return sandwich("gemma3_text", config, kinds, window=4096, ropes=[ropes[kind] for kind in kinds], qk_norm=True)


FAMILY = Family(
    "gemma3_text", read, "Gemma 3, text (270M, 1B)", example={"head_dim": 16}, hf=NAMES, norm_offset=1.0
)  # fmt: skip
