"""Families that transformers lacks, written down once more in NumPy, in float64, from their authors' descriptions.

Independent of src/: each takes a config and a checkpoint under the published names and gives logits for a whole text.
"""

from __future__ import annotations

import numpy as np

HEADS, KV_HEADS, SIZE, WIDTH, HIDDEN, DEPTH, VOCAB = 4, 2, 16, 48, 56, 2, 97


def norm(x, weight, eps):
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + eps) * weight


def silu(x):
    return x / (1 + np.exp(-x))


def angles(length, size):
    return np.arange(length)[:, None] * 10000.0 ** (-np.arange(0, size, 2) / size)


def turn_halves(x):
    """x [T, heads, size]: element i with i + size / 2."""
    a, (p, q) = angles(len(x), x.shape[-1])[:, None], np.split(x, 2, -1)
    return np.concatenate([p * np.cos(a) - q * np.sin(a), q * np.cos(a) + p * np.sin(a)], -1)


def turn_pairs(x):
    """x [T, heads, size]: neighbours, in the first half of the head only."""
    size = x.shape[-1] // 2
    a, out = angles(len(x), size)[:, None], x.copy()
    p, q = x[..., 0:size:2], x[..., 1:size:2]
    out[..., 0:size:2], out[..., 1:size:2] = p * np.cos(a) - q * np.sin(a), q * np.cos(a) + p * np.sin(a)
    return out


def attend(q, k, v):
    """q [T, heads, size], k and v [T, kv heads, size] -> [T, heads * size]."""
    shared = q.shape[1] // k.shape[1]
    scores = np.einsum("thd,shd->hts", q, k.repeat(shared, 1)) / np.sqrt(q.shape[-1])
    scores = np.where(np.tri(len(q), dtype=bool), scores, -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    return np.einsum("hts,shd->thd", weights, v.repeat(shared, 1)).reshape(len(q), -1)


def qwen(w, text):
    x = w["transformer.wte.weight"][text]
    for n in range(DEPTH):
        at = f"transformer.h.{n}."
        y = norm(x, w[at + "ln_1.weight"], 1e-6)
        qkv = y @ w[at + "attn.c_attn.weight"].T + w[at + "attn.c_attn.bias"]
        q, k, v = (part.reshape(len(x), HEADS, SIZE) for part in np.split(qkv, 3, -1))
        x = x + attend(turn_halves(q), turn_halves(k), v) @ w[at + "attn.c_proj.weight"].T
        y = norm(x, w[at + "ln_2.weight"], 1e-6)
        one, two = y @ w[at + "mlp.w1.weight"].T, y @ w[at + "mlp.w2.weight"].T
        x = x + (one * silu(two)) @ w[at + "mlp.c_proj.weight"].T
    return norm(x, w["transformer.ln_f.weight"], 1e-6) @ w["lm_head.weight"].T


def chatglm(w, text):
    x = w["transformer.embedding.word_embeddings.weight"][text]
    for n in range(DEPTH):
        at = f"transformer.encoder.layers.{n}."
        y = norm(x, w[at + "input_layernorm.weight"], 1e-5)
        qkv = y @ w[at + "self_attention.query_key_value.weight"].T + w[at + "self_attention.query_key_value.bias"]
        qkv = qkv.reshape(len(x), HEADS + 2 * KV_HEADS, SIZE)
        q, k, v = qkv[:, :HEADS], qkv[:, HEADS : HEADS + KV_HEADS], qkv[:, HEADS + KV_HEADS :]
        x = x + attend(turn_pairs(q), turn_pairs(k), v) @ w[at + "self_attention.dense.weight"].T
        y = norm(x, w[at + "post_attention_layernorm.weight"], 1e-5)
        gate, up = np.split(y @ w[at + "mlp.dense_h_to_4h.weight"].T, 2, -1)
        x = x + (silu(gate) * up) @ w[at + "mlp.dense_4h_to_h.weight"].T
    x = norm(x, w["transformer.encoder.final_layernorm.weight"], 1e-5)
    return x @ w["transformer.output_layer.weight"].T


def internlm2(w, text):
    x = w["model.tok_embeddings.weight"][text]
    for n in range(DEPTH):
        at = f"model.layers.{n}."
        qkv = norm(x, w[at + "attention_norm.weight"], 1e-6) @ w[at + "attention.wqkv.weight"].T
        shared = HEADS // KV_HEADS
        qkv = qkv.reshape(len(x), KV_HEADS, shared + 2, SIZE)
        q = qkv[:, :, :shared].reshape(len(x), HEADS, SIZE)
        x = x + attend(turn_halves(q), turn_halves(qkv[:, :, -2]), qkv[:, :, -1]) @ w[at + "attention.wo.weight"].T
        y = norm(x, w[at + "ffn_norm.weight"], 1e-6)
        gate, up = y @ w[at + "feed_forward.w1.weight"].T, y @ w[at + "feed_forward.w3.weight"].T
        x = x + (silu(gate) * up) @ w[at + "feed_forward.w2.weight"].T
    return norm(x, w["model.norm.weight"], 1e-6) @ w["output.weight"].T


def baichuan2(w, text):
    x = w["model.embed_tokens.weight"][text]
    for n in range(DEPTH):
        at = f"model.layers.{n}."
        qkv = norm(x, w[at + "input_layernorm.weight"], 1e-6) @ w[at + "self_attn.W_pack.weight"].T
        q, k, v = qkv.reshape(len(x), 3, HEADS, SIZE).swapaxes(0, 1)
        x = x + attend(turn_halves(q), turn_halves(k), v) @ w[at + "self_attn.o_proj.weight"].T
        y = norm(x, w[at + "post_attention_layernorm.weight"], 1e-6)
        gate, up = y @ w[at + "mlp.gate_proj.weight"].T, y @ w[at + "mlp.up_proj.weight"].T
        x = x + (silu(gate) * up) @ w[at + "mlp.down_proj.weight"].T
    head = w["lm_head.weight"]
    return norm(x, w["model.norm.weight"], 1e-6) @ (head / np.linalg.norm(head, axis=1, keepdims=True)).T


GROUPED = SIZE * (HEADS + 2 * KV_HEADS)
SHAPES = {
    qwen: {
        "transformer.wte": (VOCAB, WIDTH),
        "transformer.h.{n}.ln_1": (WIDTH,),
        "transformer.h.{n}.attn.c_attn": (3 * HEADS * SIZE, WIDTH, "bias"),
        "transformer.h.{n}.attn.c_proj": (WIDTH, HEADS * SIZE),
        "transformer.h.{n}.ln_2": (WIDTH,),
        "transformer.h.{n}.mlp.w1": (HIDDEN, WIDTH),
        "transformer.h.{n}.mlp.w2": (HIDDEN, WIDTH),
        "transformer.h.{n}.mlp.c_proj": (WIDTH, HIDDEN),
        "transformer.ln_f": (WIDTH,),
        "lm_head": (VOCAB, WIDTH),
    },
    chatglm: {
        "transformer.embedding.word_embeddings": (VOCAB, WIDTH),
        "transformer.encoder.layers.{n}.input_layernorm": (WIDTH,),
        "transformer.encoder.layers.{n}.self_attention.query_key_value": (GROUPED, WIDTH, "bias"),
        "transformer.encoder.layers.{n}.self_attention.dense": (WIDTH, HEADS * SIZE),
        "transformer.encoder.layers.{n}.post_attention_layernorm": (WIDTH,),
        "transformer.encoder.layers.{n}.mlp.dense_h_to_4h": (2 * HIDDEN, WIDTH),
        "transformer.encoder.layers.{n}.mlp.dense_4h_to_h": (WIDTH, HIDDEN),
        "transformer.encoder.final_layernorm": (WIDTH,),
        "transformer.output_layer": (VOCAB, WIDTH),
    },
    internlm2: {
        "model.tok_embeddings": (VOCAB, WIDTH),
        "model.layers.{n}.attention_norm": (WIDTH,),
        "model.layers.{n}.attention.wqkv": (GROUPED, WIDTH),
        "model.layers.{n}.attention.wo": (WIDTH, HEADS * SIZE),
        "model.layers.{n}.ffn_norm": (WIDTH,),
        "model.layers.{n}.feed_forward.w1": (HIDDEN, WIDTH),
        "model.layers.{n}.feed_forward.w3": (HIDDEN, WIDTH),
        "model.layers.{n}.feed_forward.w2": (WIDTH, HIDDEN),
        "model.norm": (WIDTH,),
        "output": (VOCAB, WIDTH),
    },
    baichuan2: {
        "model.embed_tokens": (VOCAB, WIDTH),
        "model.layers.{n}.input_layernorm": (WIDTH,),
        "model.layers.{n}.self_attn.W_pack": (3 * HEADS * SIZE, WIDTH),
        "model.layers.{n}.self_attn.o_proj": (WIDTH, HEADS * SIZE),
        "model.layers.{n}.post_attention_layernorm": (WIDTH,),
        "model.layers.{n}.mlp.gate_proj": (HIDDEN, WIDTH),
        "model.layers.{n}.mlp.up_proj": (HIDDEN, WIDTH),
        "model.layers.{n}.mlp.down_proj": (WIDTH, HIDDEN),
        "model.norm": (WIDTH,),
        "lm_head": (VOCAB, WIDTH),
    },
}
CONFIGS = {
    qwen: {
        "model_type": "qwen", "hidden_size": WIDTH, "num_hidden_layers": DEPTH, "num_attention_heads": HEADS,
        "intermediate_size": 2 * HIDDEN, "kv_channels": SIZE, "seq_length": 256, "max_position_embeddings": 1024,
        "layer_norm_epsilon": 1e-6, "vocab_size": VOCAB, "rotary_emb_base": 10000, "rotary_pct": 1.0, "no_bias": True,
        "use_logn_attn": True, "use_dynamic_ntk": True, "tie_word_embeddings": False,
    },
    chatglm: {
        "model_type": "chatglm", "hidden_size": WIDTH, "num_layers": DEPTH, "num_attention_heads": HEADS,
        "ffn_hidden_size": HIDDEN, "kv_channels": SIZE, "seq_length": 256, "padded_vocab_size": VOCAB,
        "layernorm_epsilon": 1e-5, "multi_query_attention": True, "multi_query_group_num": KV_HEADS, "rmsnorm": True,
        "add_qkv_bias": True, "add_bias_linear": False, "post_layer_norm": True, "tie_word_embeddings": False,
    },
    internlm2: {
        "model_type": "internlm2", "hidden_size": WIDTH, "num_hidden_layers": DEPTH, "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS, "head_dim": SIZE, "intermediate_size": HIDDEN, "vocab_size": VOCAB,
        "max_position_embeddings": 256, "rms_norm_eps": 1e-6, "bias": False, "rope_theta": 10000,
        "rope_scaling": {"type": "dynamic", "factor": 2.0},
    },
    baichuan2: {
        "model_type": "baichuan", "hidden_size": WIDTH, "num_hidden_layers": DEPTH, "num_attention_heads": HEADS,
        "head_dim": SIZE, "intermediate_size": HIDDEN, "vocab_size": VOCAB, "max_position_embeddings": 256,
        "model_max_length": 256, "rms_norm_eps": 1e-6,
    },
}  # fmt: skip


def random_weights(family, seed: int = 0) -> dict[str, np.ndarray]:
    """A float32 checkpoint under the published names."""
    random, found = np.random.default_rng(seed), {}
    for name, (*shape, last) in SHAPES[family].items():
        shape = tuple(shape) if last == "bias" else (*shape, last)
        for n in range(DEPTH if "{n}" in name else 1):
            at = name.format(n=n)
            mean, spread = (1.0, 0.3) if len(shape) == 1 else (0.0, 0.2)
            found[at + ".weight"] = random.normal(mean, spread, shape).astype(np.float32)
            if last == "bias":
                found[at + ".bias"] = random.normal(0, 0.3, shape[0]).astype(np.float32)
    return found
