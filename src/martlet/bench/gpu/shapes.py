"""What is measured on a GPU, as data: two shapes of model, the workloads, where vLLM stood, and what we want."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

from martlet.errors import UsageError, did_you_mean

SHAPES: dict[str, dict[str, Any]] = {
    "qwen3-0.6b": {
        "model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"], "hidden_size": 1024, "intermediate_size": 3072,
        "num_hidden_layers": 28, "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128,
        "vocab_size": 151936, "max_position_embeddings": 40960, "rms_norm_eps": 1e-6, "rope_theta": 1000000,
        "tie_word_embeddings": True, "hidden_act": "silu", "attention_bias": False, "torch_dtype": "bfloat16",
    },
    "llama3-8b": {
        "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 4096, "intermediate_size": 14336,
        "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256,
        "max_position_embeddings": 16384, "rms_norm_eps": 1e-5, "rope_theta": 500000.0, "tie_word_embeddings": False,
        "hidden_act": "silu", "attention_bias": False, "mlp_bias": False, "torch_dtype": "bfloat16",
    },
}  # fmt: skip
SETTLES = 8.0  # seconds after a start in which any engine may get ready for what comes
SERVED_VOCABULARY = 49152  # of the shapes in G5, where text is made

WORKLOADS = {
    "start": "process start to first token of a 512-token prompt, cold caches of kernels",
    "G1": "256 requests offline, prompts 100-1,024, outputs 100-1,024",
    "G2": "one stream, prompt 512: first token; milliseconds a token over 256 tokens",
    "G3": "prefill of 8,192 tokens",
    "G4": "64 streams, prompt 128: decode between token 1 and 257",
    "G5": "HTTP, streaming clients, prompt 256, 128 new; vocabulary cut to 49,152",
    "G6": "G4 of llama3-8b with 0, 1, 4, 16 LoRA adapters of rank 16 on every linear, dealt out in turns",
}
ADAPTED, ADAPTERS, RANK = "llama3-8b", (0, 1, 4, 16), 16  # of G6
CLIENTS = (1, 64, 256)
MAX_MODEL_LEN, MAX_SEQUENCES = 16384, 256

# vLLM 0.24.0 with FlashAttention 3, CUDA graphs and its default compilation, on one H200 with torch 2.11.
VLLM: dict[str, dict[tuple[str, str], float]] = {
    "qwen3-0.6b": {
        ("start", "start_s"): 95, ("G1", "output_tok_s"): 24441, ("G2", "ttft_ms"): 6.92, ("G2", "token_ms"): 1.65,
        ("G3", "prefill_tok_s"): 250401, ("G4", "decode_tok_s"): 19715, ("G5 x64", "output_tok_s"): 18986,
        ("G5 x64", "ttft_ms"): 108,
    },
    "llama3-8b": {
        ("start", "start_s"): 62, ("G1", "output_tok_s"): 10275, ("G2", "ttft_ms"): 14.67, ("G2", "token_ms"): 4.878,
        ("G3", "prefill_tok_s"): 40910, ("G4", "decode_tok_s"): 10589, ("G5 x64", "output_tok_s"): 6719,
        ("G5 x64", "ttft_ms"): 403,
    },
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Goal:
    """A figure of a workload against vLLM's: ours / theirs is at least (more) or at most `wanted`.

    against: "" for vLLM; "=" compares with `wanted` itself; else the variant of ours that it is beside.
    """

    model: str
    workload: str
    key: str
    wanted: float
    more: bool = True
    against: str = ""
    variant: str = ""


def _goals(model: str, g1: float, fp8: float, g2: float, g3: float, g4: float, g5: float, start: float) -> list[Goal]:
    return [
        Goal(model, "G1", "output_tok_s", g1),
        Goal(model, "G1", "output_tok_s", fp8, against="native", variant="fp8_kv"),
        Goal(model, "G2", "token_ms", g2, more=False),
        Goal(model, "G2", "ttft_ms", 1.0, more=False),
        Goal(model, "G3", "prefill_tok_s", g3),
        Goal(model, "G4", "decode_tok_s", g4),
        Goal(model, "G5 x64", "output_tok_s", g5),
        Goal(model, "G5 x64", "ttft_ms", 0.8, more=False),
        Goal(model, "start", "start_s", start, more=False, against="="),
    ]


GOALS = [
    *_goals("qwen3-0.6b", g1=1.05, fp8=1.25, g2=0.6, g3=1.0, g4=1.8, g5=1.3, start=12),
    *_goals("llama3-8b", g1=1.02, fp8=1.1, g2=0.86, g3=1.02, g4=1.15, g5=1.2, start=15),
    Goal("llama3-8b", "G6", "kept", 0.9, against="="),
]


def check(kind: str, names: tuple[str, ...], known: dict[str, Any]) -> None:
    """Raises UsageError for a name that is not known, with the nearest ones."""
    for name in names:
        if name not in known:
            said = f"no {kind} {name!r}; there are {', '.join(known)}.{did_you_mean(name, tuple(known))}"
            raise UsageError(said, param=f"{kind}s")


class Prompts:
    """Token ids below 32,000 in the order in which the workloads ask for them: the same for every engine."""

    def __init__(self) -> None:
        self._numbers = random.Random(0)

    def ids(self, count: int) -> list[int]:
        return [self._numbers.randint(0, 31999) for _ in range(count)]

    def length(self) -> int:
        return self._numbers.randint(100, 1024)


def served_prompts(count: int) -> list[list[int]]:
    """Of G5: 256 tokens each."""
    numbers = random.Random(0)
    return [[numbers.randint(20, SERVED_VOCABULARY - 1) for _ in range(256)] for _ in range(count)]
