"""Small random models of every family, saved by transformers, and a way to ask both sides for their logits."""

import numpy as np
import torch
import transformers
from safetensors.numpy import save_file

from martlet.hub.card import ModelCard
from martlet.model import families, weights
from martlet.runners.base import Batch, LoadOptions, NewRow
from martlet.runners.torch_runner import TorchRunner
from martlet.sampling_params import SamplingParams

VOCAB = 97
COMMON = {
    "vocab_size": VOCAB,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "initializer_range": 0.15,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
LLAMA3_ROPE = {
    "rope_theta": 500.0,
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
YARN_ROPE = {
    "rope_theta": 500.0, "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32, "beta_fast": 8.0,
}  # fmt: skip
LONG_ROPE = {
    "rope_theta": 500.0,
    "rope_type": "longrope",
    "short_factor": [1.0, 1.1, 1.2, 1.3, 1.4, 1.5],
    "long_factor": [1.0, 1.5, 2.0, 3.0, 4.0, 5.0],
}
MOE = {"num_experts": 6, "num_experts_per_tok": 3, "moe_intermediate_size": 20}
CAPS = {"attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0}


def sketch(kind: str, heads: int, kv_heads: int, **rest) -> tuple[str, dict]:
    return kind, COMMON | {"num_attention_heads": heads, "num_key_value_heads": kv_heads} | rest


MODELS = {
    "llama": sketch("Llama", 6, 2, tie_word_embeddings=True),
    "llama3": sketch("Llama", 4, 4, rope_parameters=LLAMA3_ROPE, head_dim=16),
    "llama-bias": sketch("Llama", 3, 1, attention_bias=True, mlp_bias=True, hidden_act="gelu"),
    "mistral": sketch("Mistral", 6, 2, sliding_window=9),
    "mistral-full": sketch("Mistral", 6, 6, sliding_window=None, head_dim=32),
    "qwen2": sketch("Qwen2", 6, 3),
    "qwen2-window": sketch("Qwen2", 6, 3, use_sliding_window=True, sliding_window=11, max_window_layers=1),
    "qwen3": sketch("Qwen3", 4, 2, head_dim=32, tie_word_embeddings=True),
    "qwen2-yarn": sketch("Qwen2", 6, 3, rope_parameters=YARN_ROPE),
    "mixtral": sketch("Mixtral", 6, 2, num_local_experts=5, num_experts_per_tok=2, sliding_window=9),
    "qwen2_moe": sketch("Qwen2Moe", 6, 3, **MOE, shared_expert_intermediate_size=36, decoder_sparse_step=2),
    "qwen3_moe": sketch("Qwen3Moe", 4, 2, **MOE, norm_topk_prob=True, mlp_only_layers=[1], head_dim=16),
    "glm": sketch("Glm", 4, 2, head_dim=16),
    "glm4": sketch("Glm4", 6, 2, head_dim=16, tie_word_embeddings=True),
    "gemma": sketch("Gemma", 4, 1, head_dim=16),
    "gemma2": sketch("Gemma2", 4, 2, head_dim=16, sliding_window=9, query_pre_attn_scalar=30, **CAPS),
    "gemma3_text": sketch("Gemma3", 4, 1, head_dim=16, sliding_window=9, num_hidden_layers=7),
    "smollm3": sketch("SmolLM3", 6, 2, num_hidden_layers=4),
    "phi3": sketch("Phi3", 4, 2, sliding_window=9),
    "phi3-long": sketch("Phi3", 4, 2, rope_parameters=LONG_ROPE, original_max_position_embeddings=24),
}


def make(name: str, folder) -> tuple[ModelCard, torch.nn.Module]:
    """Write a random model into `folder`; its card and transformers' own copy in float32."""
    kind, settings = MODELS[name]
    torch.manual_seed(sum(map(ord, name)))
    page = "Gemma3Text" if kind == "Gemma3" else kind
    config = getattr(transformers, page + "Config")(**settings, attn_implementation="eager")
    model = getattr(transformers, kind + "ForCausalLM")(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:  # norms and biases start as ones and zeros, which hide mistakes
                parameter.add_(torch.randn_like(parameter) * 0.3)
    model.save_pretrained(folder)
    config = model.config.to_dict()
    return ModelCard(name, folder, "safetensors", config["model_type"], config=config), model


def reference_logprobs(model: torch.nn.Module, tokens: np.ndarray) -> np.ndarray:
    """Log-softmax after every token, float32 [T, vocab]."""
    with torch.no_grad():
        return model(torch.from_numpy(tokens.astype(np.int64))[None]).logits[0].float().log_softmax(-1).numpy()


def random_checkpoint(family: str, folder, more: dict) -> ModelCard:
    """Random numbers under the family's Hugging Face names. more: of the config, beyond the page's example."""
    config = families.example(family) | more
    card = ModelCard(family, folder, "safetensors", family, config=config)
    spec, random, tensors = weights.read_spec(card), np.random.default_rng(1), {}
    for parameter in weights.parameters(spec):
        source = families.get(family).source(spec, parameter.name, card.format)
        mean = 1.0 - source.add if parameter.kind == "norm" else 0.0
        if source.name not in tensors:
            tensors[source.name] = random.normal(mean, 0.15, source.shape(parameter.shape)).astype(np.float32)
    save_file(tensors, folder / "model.safetensors")
    return card


class Driver:
    """Feeds sequences to a runner as an engine would, with blocks dealt out in random order."""

    def __init__(self, card: ModelCard, seed: int = 0, runner=TorchRunner, **options):
        small = {"max_num_seqs": 8, "max_model_len": 96, "block_size": 4, "kv_cache_tokens": 800}
        options = {"device": "cpu", "dtype": "float32"} | small | options
        self.runner = runner(card, LoadOptions(**options))
        self.rng = np.random.default_rng(seed)
        self.free = list(self.rng.permutation(self.runner.memory.num_blocks))
        self.blocks: dict[int, list[int]] = {}
        self.done: dict[int, int] = {}

    def enter(self, row: int, tokens: np.ndarray, **params) -> NewRow:
        self.blocks[row], self.done[row] = [], 0
        params = SamplingParams(**({"temperature": 0, "logprobs": VOCAB, "prompt_logprobs": VOCAB} | params))
        return NewRow(row, tokens.astype(np.int32), len(tokens), params, seed=7 + row)

    def step(self, work: list[tuple[int, int, bool]], new: list[NewRow] = (), copies=()):
        """work: (row, tokens to compute, whether to sample)."""
        writes = []
        for row, count, _ in work:
            while len(self.blocks[row]) * self.runner.memory.block_size < self.done[row] + count:
                self.blocks[row].append(int(self.free.pop()))
                writes.append((row, len(self.blocks[row]) - 1, self.blocks[row][-1]))
        rows, slots, ids = np.array(writes, np.int32).reshape(-1, 3).T
        batch = Batch(
            rows=np.array([w[0] for w in work], np.int32),
            start=np.array([self.done[w[0]] for w in work], np.int32),
            count=np.array([w[1] for w in work], np.int32),
            sample=np.array([w[2] for w in work], bool),
            new_rows=list(new),
            block_rows=rows,
            block_slots=slots,
            block_ids=ids,
            copies=np.array(copies, np.int32).reshape(-1, 2),
        )
        for row, count, _ in work:
            self.done[row] += count
        return self.runner.launch(batch).result()


def dense(entry) -> np.ndarray:
    """All log-probabilities of a TokenLogprobs that holds the whole vocabulary."""
    out = np.full(len(entry.top_ids), np.nan, np.float32)
    out[entry.top_ids] = entry.top_logprobs
    return out


PROMPT, DECODED = 37, 6


def compare(card, reference, tolerance: float = 1e-4, **options) -> None:
    """Our logits over a prompt in chunks and some decoding against a reference's.

    reference: tokens -> log-probabilities after each of them, [T, vocab].
    """
    driver, found = Driver(card, **options), []
    text = np.random.default_rng(3).integers(3, driver.runner.vocab_size, PROMPT)
    for done in range(0, PROMPT, 10):
        count = min(10, PROMPT - done)
        new = [driver.enter(0, text)] if done == 0 else []
        result = driver.step([(0, count, done + count == PROMPT)], new)
        found += result.prompt_logprobs.get(0, [])
    found.append(result.logprobs[0])
    for _ in range(DECODED):
        text = np.append(text, result.tokens[0])
        result = driver.step([(0, 1, True)])
        found.append(result.logprobs[0])
    found = np.stack([dense(entry) for entry in found])
    want = reference(text)
    assert np.abs(want - want.mean(-1, keepdims=True)).max() > 0.3  # logits that tell one network from another
    np.testing.assert_allclose(found, want, atol=tolerance)
    driver.runner.close()
