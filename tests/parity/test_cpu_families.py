"""Every family on the C++ runner: the logits of the torch runner on the same random checkpoint, and no bit moved by
how a sequence is cut into steps."""

import numpy as np
import pytest
from tiny_models import LLAMA3_ROPE, Driver, dense, random_checkpoint

from martlet.hub.card import ModelCard
from martlet.model import families
from martlet.runners.coverage import runners_for
from martlet.runners.cpu_runner import CpuRunner
from martlet.runners.torch_runner import TorchRunner

LONG = {"type": "longrope", "short_factor": [1.0] * 8, "long_factor": [1.0 + i for i in range(8)]}
MORE = {
    "gemma2": {"attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0, "sliding_window": 9},
    "gemma3_text": {"sliding_window": 9, "num_hidden_layers": 6},
    "mixtral": {"sliding_window": 9},
    "phi3": {"rope_scaling": LONG, "original_max_position_embeddings": 32},
    "qwen2_moe": {"decoder_sparse_step": 2},
    "llama": {"rope_scaling": LLAMA3_ROPE},
    "qwen2": {"rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}},
}
COVERED = [n for n in families.names() if "c++" in runners_for(families.get(n).read(families.example(n)))]
SMALL = {"max_num_seqs": 2, "max_model_len": 96, "block_size": 16, "kv_cache_tokens": 256}
TOKENS = np.random.default_rng(0).integers(0, 128, 60)


def logprobs(runner: type, card: ModelCard, chunks: list[int]) -> np.ndarray:
    driver, found = Driver(card, runner=runner, **SMALL), []
    for i, count in enumerate(chunks):
        last = i == len(chunks) - 1
        new = [driver.enter(0, TOKENS, logprobs=128, prompt_logprobs=128)] if i == 0 else []
        result = driver.step([(0, count, last)], new)
        found += result.prompt_logprobs.get(0, [])
    found.append(result.logprobs[0])
    driver.runner.close()
    return np.stack([dense(entry) for entry in found])


@pytest.mark.parametrize("family", COVERED)
def test_the_cpp_runner_gives_the_logits_of_the_reference(family, tmp_path):
    card = random_checkpoint(family, tmp_path, MORE.get(family, {}))
    want = logprobs(TorchRunner, card, [60])
    assert np.abs(want - want.mean(-1, keepdims=True)).max() > 0.3
    found = logprobs(CpuRunner, card, [60])
    np.testing.assert_allclose(found, want, atol=2e-4)
    np.testing.assert_array_equal(logprobs(CpuRunner, card, [1, 7, 40, *[1] * 12]), found)
