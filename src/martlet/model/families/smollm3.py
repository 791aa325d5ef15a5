"""SmolLM3: LLaMA's shape, where every fourth layer has no rotary embedding."""

from __future__ import annotations

from martlet.model.families.family import Config, Family, need, read_head_dim
from martlet.model.families.llama import decoder
from martlet.model.families.qwen2 import read_windows
from martlet.model.families.rotary import read_rope
from martlet.model.spec import DecoderSpec


def read(config: Config) -> DecoderSpec:
    depth, every = need(config, "num_hidden_layers"), config.get("no_rope_layer_interval") or 4
    # despite the name of the list, 1 stands for a layer with rotary embedding
    rotated = config.get("no_rope_layers") or [(n + 1) % every for n in range(depth)]
    rope = read_rope(config, read_head_dim(config), default_base=2_000_000.0)
    ropes = [rope if has else rope._replace(dim=0, scaling=None) for has in rotated]
    if config.get("layer_types") is None and config.get("use_sliding_window"):
        kinds = ["full_attention" if has else "sliding_attention" for has in rotated]
        config = {**config, "layer_types": kinds}
    bias, mlp_bias = bool(config.get("attention_bias", False)), bool(config.get("mlp_bias", False))
    return decoder(
        "smollm3",
        config,
        windows=read_windows(config),
        ropes=ropes,
        qkv_bias=bias,
        out_bias=bias,
        mlp_bias=mlp_bias,
        tied_default=True,
    )


FAMILY = Family("smollm3", read, "SmolLM3", example={"num_hidden_layers": 4}, gguf_interleaved=True)
