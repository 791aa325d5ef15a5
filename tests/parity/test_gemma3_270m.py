"""Gemma 3 270M, as packages carry it (240 MB to fetch): golden numbers, and greedy answers token for token."""

from __future__ import annotations

import os

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, GgufConfig

from martlet import hub
from martlet.engine.engine import Engine, drain
from martlet.engine.request import Request
from martlet.runners.base import LoadOptions
from martlet.runners.cpu_runner import CpuRunner
from martlet.runners.torch_runner import TorchRunner
from martlet.sampling_params import SamplingParams

pytestmark = pytest.mark.slow
TEXT = (
    "The capital of France is Paris. The capital of Germany is Berlin. Water boils at one hundred degrees Celsius, "
    "and freezes at zero. In 1969 the first people walked on the Moon."
)
PROMPTS = [
    "The capital of France is",
    "Once upon a time",
    "def fibonacci(n):",
    "1, 1, 2, 3, 5, 8,",
    "你好，",
    TEXT * 14,
]
NEW_TOKENS = 48


@pytest.fixture(scope="module")
def card():
    return hub.resolve("gemma3-270m")


@pytest.fixture(scope="module")
def reference(card):
    folder, file = os.path.split(card.path)
    config = GgufConfig(dequantize=True)
    return AutoModelForCausalLM.from_pretrained(folder, gguf_file=file, quantization_config=config, dtype=torch.float32)


@pytest.fixture(scope="module", params=[CpuRunner, TorchRunner])
def outputs(request, card):
    """Of each prompt in float32: (ids, answer), and the prompt log-probabilities of TEXT."""
    runner = request.param(card, LoadOptions(device="cpu", dtype="float32", kv_cache_tokens=4096, max_model_len=1024))
    tokenizer = hub.load_tokenizer(card)
    greedy = SamplingParams(temperature=0, max_tokens=NEW_TOKENS, ignore_eos=True)
    ids = [tokenizer.encode_prompt(text) for text in PROMPTS]
    scored = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0)
    requests = [Request(str(i), prompt, greedy) for i, prompt in enumerate(ids)]
    found = {o.request_id: o for o in drain(Engine(runner), [*requests, Request("T", ids[-1][:42], scored)])}
    runner.close()
    answers = [found[str(i)].token_ids for i in range(len(ids))]
    return ids, answers, [entry.logprob for entry in found["T"].prompt_logprobs if entry is not None], tokenizer


def test_golden_numbers(outputs):
    ids, answers, logprobs, tokenizer = outputs
    assert len(ids[-1]) > 550 and len(logprobs) == 41  # the long prompt leaves the window of 512
    assert -np.mean(logprobs) == pytest.approx(2.777, abs=2e-3)
    assert tokenizer.decode(answers[0]).startswith(" the capital of the country of France. It is the largest")


def test_greedy_tokens_equal_those_of_transformers(reference, outputs):
    """Read by the reference in one pass: each token of ours is its best, but where its two best are within 1e-3."""
    ids, answers, *_ = outputs
    for prompt, answer in zip(ids, answers, strict=True):
        with torch.inference_mode():
            logits = reference(torch.tensor([prompt + answer]), logits_to_keep=NEW_TOKENS + 1).logits[0, :-1]
        best = logits.topk(2).values
        below = best[:, 0] - logits.gather(1, torch.tensor(answer)[:, None])[:, 0]
        differs = below > 0
        print(f"{int(differs.sum())} of {len(answer)} tokens differ, by at most {float(below.max()):.2e}")
        assert float(below.max()) < 1e-3
