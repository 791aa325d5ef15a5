"""GGUF files of every family that llama.cpp has: converted here as its converter does, by the gguf package's own names,
they must read as the same decoder with the same parameters as the Hugging Face checkpoint they were made from."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
from safetensors.numpy import load_file
from tiny_models import random_checkpoint

from martlet import hub
from martlet.hub.resolver import card_of
from martlet.model import families, weights

ARCHITECTURES = {  # where the name is not the model_type
    "mistral": "llama",
    "mixtral": "llama",
    "gemma3_text": "gemma3",
    "glm": "chatglm",
    "qwen2_moe": "qwen2moe",
    "qwen3_moe": "qwen3moe",
}
PERMUTED = ("llama", "mistral", "mixtral", "internlm2", "baichuan", "smollm3")
LONG = {"type": "longrope", "short_factor": [1.0] * 8, "long_factor": [1.0 + i for i in range(8)]}
MORE = {
    "mistral": {"sliding_window": 32},
    "gemma2": {"sliding_window": 32, "query_pre_attn_scalar": 16},
    "gemma3_text": {"sliding_window": 32, "query_pre_attn_scalar": 16, "rope_theta": 1e6, "num_hidden_layers": 7},
    "qwen3_moe": {"norm_topk_prob": True},
    "qwen2_moe": {"num_experts_per_tok": 2},
    "phi3": {"rope_scaling": LONG, "original_max_position_embeddings": 32, "sliding_window": 100},
    "qwen": {"num_key_value_heads": 4},
    "baichuan": {"num_key_value_heads": 4},
}


def permuted(w: np.ndarray, heads: int) -> np.ndarray:
    return w.reshape(heads, 2, -1, *w.shape[1:]).swapaxes(1, 2).reshape(w.shape)


def converted(family: str, tensors: dict[str, np.ndarray], spec) -> dict[str, np.ndarray]:
    """The tensors under names that the gguf package knows, cut and permuted as llama.cpp's converter does."""
    attention, found, stacks = spec.layers[0].mixer, {}, {}
    group, size, width = attention.heads // attention.kv_heads, attention.head_dim, spec.width
    for name, w in tensors.items():
        if family.startswith("gemma") and name.endswith("norm.weight"):
            w = w + 1
        if ".experts." in name:
            before, _, rest = name.partition(".experts.")
            number, _, part = rest.partition(".")
            merged = before.replace("model.layers", "layers") if family == "mixtral" else before
            merged = merged.replace("block_sparse_moe", "feed_forward")
            stacks.setdefault(f"{merged}.experts.{part}", []).append((int(number), w))
            continue
        if "attention.wqkv" in name:
            parts = w.reshape(attention.kv_heads, group + 2, size, width)
            q, k, v = parts[:, :group], parts[:, group], parts[:, group + 1]
            for part, piece in (("wq", q), ("wk", k), ("wv", v)):
                found[name.replace("wqkv", part)] = piece.reshape(-1, width)
        elif "W_pack" in name:
            for part, piece in zip(("q_proj", "k_proj", "v_proj"), np.split(w, 3), strict=True):
                found[name.replace("W_pack", part)] = piece
        else:
            found[name] = w
    for name, stack in stacks.items():
        found[name] = np.stack([w for _, w in sorted(stack, key=lambda item: item[0])])
    if family in PERMUTED:
        for name, w in found.items():
            if any(part in name for part in ("q_proj", "attention.wq.")):
                found[name] = permuted(w, attention.heads)
            elif any(part in name for part in ("k_proj", "attention.wk.")):
                found[name] = permuted(w, attention.kv_heads)
    return found


def write(path, family: str, tensors: dict[str, np.ndarray], spec, config) -> None:
    arch = ARCHITECTURES.get(family, family)
    kind = next(k for k, name in gguf.MODEL_ARCH_NAMES.items() if name == arch)
    names, layer = gguf.get_tensor_name_map(kind, len(spec.layers)), spec.layers[0]
    attention, writer = layer.mixer, gguf.GGUFWriter(path, arch)
    writer.add_block_count(len(spec.layers))
    writer.add_context_length(spec.max_positions)
    writer.add_embedding_length(spec.width)
    writer.add_feed_forward_length(config.get("ffn_hidden_size") or config["intermediate_size"])
    writer.add_head_count(attention.heads)
    writer.add_head_count_kv(attention.kv_heads)
    writer.add_key_length(attention.head_dim)
    writer.add_rope_dimension_count(attention.rope.dim)
    writer.add_rope_freq_base(spec.layers[-2].mixer.rope.base)  # a global layer's, where layers differ
    writer.add_layer_norm_rms_eps(spec.eps)
    writer.add_vocab_size(spec.vocab_size)
    if attention.window:
        writer.add_sliding_window(attention.window)
    if attention.softcap:
        writer.add_attn_logit_softcapping(attention.softcap)
    if spec.logit_softcap:
        writer.add_final_logit_softcapping(spec.logit_softcap)
    if (experts := layer.mlp.experts) is not None:
        writer.add_expert_count(experts.count)
        writer.add_expert_used_count(experts.active)
        if "moe_intermediate_size" in config:
            writer.add_expert_feed_forward_length(layer.mlp.hidden)
        if experts.shared:
            writer.add_expert_shared_feed_forward_length(experts.shared)
    if (scaling := attention.rope.scaling) is not None:
        writer.add_rope_scaling_orig_ctx_len(scaling.original_max_positions)
        writer.add_rope_scaling_attn_factors(scaling.magnitude)
        writer.add_tensor("rope_factors_short.weight", np.array(scaling.short, np.float32))
        writer.add_tensor("rope_factors_long.weight", np.array(scaling.long, np.float32))
    for name, w in converted(family, tensors, spec).items():
        stem, suffix = name.removesuffix(".weight").removesuffix(".bias"), name.rpartition(".")[2]
        known = names.get_name(stem.removeprefix("transformer.") if family == "chatglm" else stem)
        assert known, f"gguf knows no {name}"
        writer.add_tensor(f"{known}.{suffix}", np.ascontiguousarray(w))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.parametrize("family", [name for name in families.names() if families.get(name).gguf is not None])
def test_a_converted_checkpoint_is_the_same_decoder(family, tmp_path):
    plain = random_checkpoint(family, tmp_path, MORE.get(family, {}))
    spec = weights.read_spec(plain)
    path = tmp_path / "model.gguf"
    write(path, family, load_file(tmp_path / "model.safetensors"), spec, plain.config)
    card = card_of(path)
    assert card.family == family
    found = weights.read_spec(card)
    if family == "phi3":  # the file holds its magnitude in float32
        magnitude = found.layers[0].mixer.rope.scaling.magnitude
        assert magnitude == pytest.approx(spec.layers[0].mixer.rope.scaling.magnitude)
        spec, found = (without_scaling(one) for one in (spec, found))
    assert found == spec
    wanted = dict(weights.load(plain, spec, hub.open_checkpoint(plain)))
    for name, array in weights.load(card, spec, hub.open_checkpoint(card)):
        np.testing.assert_array_equal(array, wanted.pop(name), err_msg=name)
    assert not wanted


def without_scaling(spec):
    layers = [
        layer._replace(mixer=layer.mixer._replace(rope=layer.mixer.rope._replace(scaling=None)))
        for layer in spec.layers
    ]
    return spec._replace(layers=tuple(layers))


def test_llama_3_1_keeps_its_scaling_in_a_tensor(tmp_path):
    card = random_checkpoint("llama", tmp_path, {})
    spec = weights.read_spec(card)
    tensors = load_file(tmp_path / "model.safetensors")
    factors = [1.0, 1.0, 1.5, 3.0, 7.0, 8.0, 8.0, 8.0]
    original = gguf.GGUFWriter.write_header_to_file

    def with_factors(writer, *arguments):
        writer.add_tensor("rope_freqs.weight", np.array(factors, np.float32))
        original(writer, *arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gguf.GGUFWriter, "write_header_to_file", with_factors)
        write(tmp_path / "model.gguf", "llama", tensors, spec, card.config)
    scaling = weights.read_spec(card_of(tmp_path / "model.gguf")).layers[0].mixer.rope.scaling
    assert scaling.kind == "factors" and scaling.short == scaling.long == tuple(factors)
