"""GGUF metadata as the Hugging Face config that the same model would have, so that families read one kind of config."""

from __future__ import annotations

from typing import Any

import numpy as np

from martlet.errors import CheckpointError
from martlet.hub.gguf_header import BLOCK_TYPES, GGUFHeader

MODEL_TYPES = {  # GGUF architecture -> Hugging Face model_type, where they differ
    "gemma3": "gemma3_text",
    "qwen2moe": "qwen2_moe",
    "qwen3moe": "qwen3_moe",
    "phi2": "phi",
    "command-r": "cohere",
}
_FIELDS = {  # config key: metadata key below the architecture's name
    "hidden_size": "embedding_length",
    "num_hidden_layers": "block_count",
    "intermediate_size": "feed_forward_length",
    "num_attention_heads": "attention.head_count",
    "num_key_value_heads": "attention.head_count_kv",
    "head_dim": "attention.key_length",
    "max_position_embeddings": "context_length",
    "rms_norm_eps": "attention.layer_norm_rms_epsilon",
    "rope_theta": "rope.freq_base",
    "sliding_window": "attention.sliding_window",
    "num_experts": "expert_count",
    "num_experts_per_tok": "expert_used_count",
    "moe_intermediate_size": "expert_feed_forward_length",
    "shared_expert_intermediate_size": "expert_shared_feed_forward_length",
    "attn_logit_softcapping": "attn_logit_softcapping",
    "final_logit_softcapping": "final_logit_softcapping",
    "original_max_position_embeddings": "rope.scaling.original_context_length",
}
_REQUIRED = ("hidden_size", "num_hidden_layers", "intermediate_size", "num_attention_heads")
_MAY_BE_ZERO = (
    "sliding_window",
    "num_experts",
    "num_experts_per_tok",
    "moe_intermediate_size",
    "shared_expert_intermediate_size",
)
_TOKEN_IDS = {
    "bos_token_id": "tokenizer.ggml.bos_token_id",
    "eos_token_id": "tokenizer.ggml.eos_token_id",
    "pad_token_id": "tokenizer.ggml.padding_token_id",
}


def config_from(header: GGUFHeader) -> dict[str, Any]:
    """A Hugging Face style config. CheckpointError when the metadata lacks what every decoder needs."""
    architecture = header.architecture
    config: dict[str, Any] = {"model_type": MODEL_TYPES.get(architecture, architecture)}
    for field, key in _FIELDS.items():
        value = _uniform(header, f"{architecture}.{key}")
        if value is not None or field in _REQUIRED:
            least = 0 if field in _MAY_BE_ZERO else 1e-12
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not least <= value < 2**32:
                raise CheckpointError(f"{header.path}: metadata {architecture}.{key} is {value!r}, no sensible number")
            config[field] = value
    config.setdefault("num_key_value_heads", config["num_attention_heads"])
    config.setdefault("head_dim", config["hidden_size"] // config["num_attention_heads"])
    config.setdefault("rope_theta", 10000.0)
    rotated = header.get(f"{architecture}.rope.dimension_count")
    if isinstance(rotated, int) and rotated != config["head_dim"]:
        config["partial_rotary_factor"] = rotated / config["head_dim"]
    config["vocab_size"] = _vocab_size(header)
    config["tie_word_embeddings"] = "output.weight" not in header.tensors
    for field, key in _TOKEN_IDS.items():
        if isinstance(token := header.get(key), int):
            config[field] = token
    if scaling := _rope_scaling(header):
        config["rope_scaling"] = scaling
    return _specialise(config, header)


def _specialise(config: dict[str, Any], header: GGUFHeader) -> dict[str, Any]:
    """What the file leaves unsaid because every model of the architecture has it, or says by the tensors it holds."""
    model_type = config["model_type"]
    config["attention_bias"] = "blk.0.attn_output.bias" in header.tensors
    if model_type == "llama":
        if config.get("num_experts"):
            config["model_type"] = "mixtral"
        elif config.get("sliding_window"):
            config["model_type"] = "mistral"
    elif model_type in ("chatglm", "glm", "glm4"):
        config["attention_bias"] = "blk.0.attn_q.bias" in header.tensors
        if model_type == "chatglm" and "blk.0.attn_q.weight" in header.tensors:
            config["model_type"] = "glm"  # the same network, from transformers' form, whose q, k and v lie apart
    elif model_type == "qwen3_moe":
        config["norm_topk_prob"] = True
    elif model_type in ("gemma2", "gemma3_text"):
        layers, every = config["num_hidden_layers"], 2 if model_type == "gemma2" else 6
        big = layers in (46, 62)  # the 27B models scale queries by width / heads, the others by the head's size
        width = config["hidden_size"] // config["num_attention_heads"]
        config |= {
            "rope_local_base_freq": 10000.0,
            "query_pre_attn_scalar": width if big else config["head_dim"],
            "layer_types": ["sliding_attention" if (i + 1) % every else "full_attention" for i in range(layers)],
        }
    return config


def _uniform(header: GGUFHeader, key: str) -> Any:
    """A metadata value, or the one that all layers have where it is given per layer."""
    value = header.get(key)
    if not isinstance(value, (np.ndarray, list)):
        return value
    values = set(value.tolist() if isinstance(value, np.ndarray) else map(str, value))
    if len(values) != 1:
        raise CheckpointError(f"{header.path}: {key} differs from layer to layer; no family here has that")
    return values.pop()


def _vocab_size(header: GGUFHeader) -> int:
    if embedding := header.tensors.get("token_embd.weight"):
        return embedding.shape[0]
    return header.get(f"{header.architecture}.vocab_size") or header.count("tokenizer.ggml.tokens")


def _rope_scaling(header: GGUFHeader) -> dict[str, Any] | None:
    """What the scaling keys say, or the tensors that Llama 3.1 (`rope_freqs`) and LongRoPE (`rope_factors_*`) have."""
    if "rope_freqs.weight" in header.tensors:
        return {"rope_type": "factors", "factors": _floats(header, "rope_freqs.weight")}
    if "rope_factors_long.weight" in header.tensors:
        magnitude = header.get(f"{header.architecture}.rope.scaling.attn_factor")
        return {
            "rope_type": "longrope",
            "short_factor": _floats(header, "rope_factors_short.weight"),
            "long_factor": _floats(header, "rope_factors_long.weight"),
        } | ({"attention_factor": magnitude} if isinstance(magnitude, float) else {})
    prefix = f"{header.architecture}.rope.scaling."
    kind = header.get(prefix + "type", "none")
    if kind == "none":
        return None
    factor, original = header.get(prefix + "factor", 1.0), header.get(prefix + "original_context_length")
    if not isinstance(kind, str) or not isinstance(factor, (int, float)):
        raise CheckpointError(f"{header.path}: rope scaling of type {kind!r} by {factor!r} makes no sense")
    scaling = {"rope_type": kind, "factor": float(factor)}
    return scaling | ({"original_max_position_embeddings": original} if original else {})


def _floats(header: GGUFHeader, name: str) -> list[float]:
    """A float32 tensor that is configuration rather than a weight."""
    info = header.tensors.get(name)
    if info is None or BLOCK_TYPES[info.type_id].name != "f32":
        raise CheckpointError(f"{header.path}: {name} should be a float32 tensor")
    return np.frombuffer(header.map, "<f4", info.nbytes // 4, info.start).tolist()
