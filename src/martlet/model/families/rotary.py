"""The rotary embedding of a config, in every spelling Hugging Face has used: rope_theta and rope_scaling (old),
rope_parameters (new), each kind of scaling with its own fields."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from martlet.errors import CheckpointError
from martlet.model.families.family import Config, need
from martlet.model.spec import Rope, RopeScaling


def read_rope(
    config: Config,
    head_dim: int,
    *,
    default_base: float = 10000.0,
    style: str = "half",
    table: Mapping[str, Any] | None = None,
) -> Rope:
    """table: the scaling fields, where a config has several; by default those at its top."""
    if table is None:
        table = dict(config.get("rope_scaling") or {}) | dict(config.get("rope_parameters") or {})
    base = float(table.get("rope_theta") or config.get("rope_theta") or default_base)
    dim = int(head_dim * float(table.get("partial_rotary_factor") or config.get("partial_rotary_factor") or 1.0))
    return Rope(base, dim, style, _scaling(config, table))


def longest(config: Config, rope: Rope) -> int:
    """Tokens of the longest sequence: what the config says, or what YaRN stretches the original length to."""
    said = int(config.get("max_position_embeddings") or 2048)
    scaling = rope.scaling
    if scaling is None or scaling.kind != "yarn":
        return said
    return max(said, int(scaling.original_max_positions * scaling.factor))


def _scaling(config: Config, table: Mapping[str, Any]) -> RopeScaling | None:
    kind = table.get("rope_type") or table.get("type") or "default"
    original = table.get("original_max_position_embeddings") or config.get("original_max_position_embeddings")
    length = config.get("max_position_embeddings")
    match kind:
        case "default" | "dynamic":  # dynamic NTK begins beyond max_position_embeddings, where we end
            return None
        case "linear":
            return RopeScaling("linear", float(need(table, "factor")))
        case "llama3":
            return RopeScaling(
                "llama3",
                factor=float(need(table, "factor")),
                low_freq_factor=float(table.get("low_freq_factor", 1.0)),
                high_freq_factor=float(table.get("high_freq_factor", 4.0)),
                original_max_positions=int(original or 8192),
            )
        case "yarn":
            original = int(original or need(config, "max_position_embeddings"))
            factor = float(table.get("factor") or need(config, "max_position_embeddings") / original)
            return RopeScaling(
                "yarn",
                factor=factor,
                beta_fast=float(table.get("beta_fast") or 32.0),
                beta_slow=float(table.get("beta_slow") or 1.0),
                truncate=bool(table.get("truncate", True)),
                original_max_positions=original,
                magnitude=_yarn_magnitude(table, factor),
            )
        case "longrope" | "su":
            original = int(original or need(config, "max_position_embeddings"))
            factor = length / original if length else float(table.get("factor") or 1.0)
            magnitude = math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0
            return RopeScaling(
                "factors",
                short=tuple(map(float, need(table, "short_factor"))),
                long=tuple(map(float, need(table, "long_factor"))),
                original_max_positions=original,
                magnitude=float(table.get("attention_factor") or magnitude),
            )
        case "factors":  # ours: the table in a GGUF file
            factors = tuple(map(float, need(table, "factors")))
            return RopeScaling("factors", short=factors, long=factors)
    known = "default, dynamic, factors, linear, llama3, longrope and yarn"
    raise CheckpointError(f"rope scaling {kind!r} is not supported; {known} are")


def _yarn_magnitude(table: Mapping[str, Any], factor: float) -> float:
    if table.get("attention_factor"):
        return float(table["attention_factor"])

    def grown(by: float) -> float:
        return 0.1 * by * math.log(factor) + 1.0 if factor > 1 else 1.0

    over, under = table.get("mscale"), table.get("mscale_all_dim")
    return grown(over) / grown(under) if over and under else grown(1.0)
