"""ChatGLM3 and GLM-4-9B as first published: rotary on half of each head in adjacent pairs, few key groups, fused
tensors. (GLM-4-9B converted for transformers has model_type glm.) ChatGLM2 is the same network.
"""

from __future__ import annotations

from martlet.errors import CheckpointError
from martlet.model.families.family import GGUF, Config, Family, fused, need, read_head_dim, renamed
from martlet.model.families.llama import decoder
from martlet.model.spec import DecoderSpec


def read(config: Config) -> DecoderSpec:
    for key, wanted in {
        "rmsnorm": True,
        "post_layer_norm": True,
        "apply_residual_connection_post_layernorm": False,
        "add_bias_linear": False,
    }.items():
        if config.get(key, wanted) is not wanted:
            raise CheckpointError(f"a ChatGLM with {key}: {config[key]} is not supported")
    names = {
        "num_layers": "num_hidden_layers",
        "ffn_hidden_size": "intermediate_size",
        "padded_vocab_size": "vocab_size",
        "kv_channels": "head_dim",
        "layernorm_epsilon": "rms_norm_eps",
        "seq_length": "max_position_embeddings",
    }
    config = renamed(config, names)
    if config.get("multi_query_attention"):
        config["num_key_value_heads"] = need(config, "multi_query_group_num")
    config.setdefault("rms_norm_eps", 1e-5)
    config.setdefault("partial_rotary_factor", 0.5)
    config["rope_theta"] = config.get("rope_theta", 10000.0) * config.get("rope_ratio", 1.0)
    config["head_dim"] = read_head_dim(config)
    return decoder("chatglm", config, style="interleaved", qkv_bias=bool(config.get("add_qkv_bias", True)))


_LAYER = "transformer.encoder.layers.{n}."
NAMES = {
    "embed": "transformer.embedding.word_embeddings",
    "layers.attn_norm": _LAYER + "input_layernorm",
    **fused(_LAYER + "self_attention.query_key_value", "q", "k", "v"),
    "layers.o": _LAYER + "self_attention.dense",
    "layers.mlp_norm": _LAYER + "post_attention_layernorm",
    **fused(_LAYER + "mlp.dense_h_to_4h", "gate", "up"),
    "layers.down": _LAYER + "mlp.dense_4h_to_h",
    "norm": "transformer.encoder.final_layernorm",
    "head": "transformer.output_layer",
}
FAMILY = Family(
    "chatglm",
    read,
    "ChatGLM2, ChatGLM3, GLM-4-9B",
    example={"multi_query_attention": True, "multi_query_group_num": 2},
    hf=NAMES,
    gguf=GGUF | fused("blk.{n}.attn_qkv", "q", "k", "v") | fused("blk.{n}.ffn_up", "gate", "up"),
)
