"""Small random models and a set of requests that walks every path of a runner, for the runner tests and bench/gpu."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from martlet.engine.engine import Engine, drain
from martlet.engine.options import EngineOptions
from martlet.engine.request import Request
from martlet.hub.card import ModelCard
from martlet.runners.base import LoadOptions
from martlet.sampling_params import SamplingParams

COMMON = {"vocab_size": 300, "hidden_size": 48, "num_hidden_layers": 2, "max_position_embeddings": 256}
CONFIGS = {
    "llama": {"num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 80},
    "qwen3": {
        "num_attention_heads": 3,
        "num_key_value_heads": 1,
        "head_dim": 24,
        "intermediate_size": 48,
        "tie_word_embeddings": True,
    },
    "qwen2": {
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "intermediate_size": 64,
        "use_sliding_window": True,
        "sliding_window": 9,
        "max_window_layers": 1,
    },
    "gemma2": {
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 24,
        "intermediate_size": 48,
        "sliding_window": 9,
        "attn_logit_softcapping": 2.0,
        "final_logit_softcapping": 0.5,
    },
    "glm4": {"num_attention_heads": 3, "num_key_value_heads": 1, "head_dim": 16, "intermediate_size": 48},
}


def card(family: str) -> ModelCard:
    return ModelCard(family, Path("-"), "dummy", family, config=COMMON | CONFIGS[family] | {"model_type": family})


def options(device: str, **more) -> LoadOptions:
    settings = {"max_num_seqs": 6, "max_model_len": 64, "block_size": 4, "kv_cache_tokens": 320} | more
    return LoadOptions(device=device, dtype="float32", **settings)


def requests(max_tokens: int = 6) -> list[Request]:
    """Prompts of 1 to 40 tokens: greedy, forked, sampled and cut ones, log-probabilities, penalties and bans."""
    random = np.random.default_rng(3)
    wants = [
        {"temperature": 0},
        {"temperature": 0, "logprobs": 2, "prompt_logprobs": 1},
        {"temperature": 1.2, "seed": 5, "n": 2},
        {"temperature": 0.8, "seed": 2**63 + 9, "top_k": 20, "top_p": 0.9},
        {"temperature": 0, "repetition_penalty": 1.3, "frequency_penalty": 0.5, "presence_penalty": -0.2},
        {"temperature": 0, "logit_bias": {7: 5.0}, "allowed_token_ids": [3, 7, 11]},
        {"temperature": 0.7, "seed": 1, "min_p": 0.05, "stop_token_ids": [4], "min_tokens": 2},
    ]
    return [
        Request(
            str(i),
            random.integers(0, 300, length).tolist(),
            SamplingParams(max_tokens=max_tokens, ignore_eos=True, **want),
        )
        for i, (length, want) in enumerate(zip([1, 9, 18, 40, 5, 2, 23], wants, strict=True))
    ]


def answers(runner, max_tokens: int = 6, first: int | None = None, **settings) -> dict:
    """What the first `first` requests (None: all) are given."""
    outputs = drain(Engine(runner, options=EngineOptions(seed=0, **settings)), requests(max_tokens)[:first])
    assert not [o.error for o in outputs if o.error]
    found: dict = {}
    for o in outputs:
        entry = found.setdefault((o.request_id, o.index), [[], [], []])
        entry[0] += o.token_ids
        entry[1] += o.logprobs or []
        entry[2] += (o.prompt_logprobs or [])[1:]
    return found


def check(got: dict, want: dict) -> None:
    assert got.keys() == want.keys()
    for key, (tokens, *logprobs) in want.items():
        assert got[key][0] == tokens, key
        for mine, theirs in zip(got[key][1:], logprobs, strict=True):
            assert [(e.token, e.rank, e.top_ids.tolist()) for e in mine] == [
                (e.token, e.rank, e.top_ids.tolist()) for e in theirs
            ]
            for a, b in zip(mine, theirs, strict=True):
                assert abs(a.logprob - b.logprob) < 1e-4 and np.allclose(a.top_logprobs, b.top_logprobs, atol=1e-4)
