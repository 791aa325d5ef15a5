"""Our logits against transformers', in float32: every shape of decoder, every way of cutting a sequence into steps.

(Every family, in fewer ways, is in test_family_logits.py.)
"""

import numpy as np
import pytest
from tiny_models import VOCAB, Driver, dense, make, reference_logprobs

TOLERANCE = 1e-4
SHAPES = ("llama", "llama-bias", "mistral", "qwen2-window", "qwen3", "gemma2", "qwen2_moe")


@pytest.fixture(scope="module", params=SHAPES)
def pair(request, tmp_path_factory):
    return make(request.param, tmp_path_factory.mktemp(request.param))


def prompt(length: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, VOCAB, length)


@pytest.mark.parametrize("chunk", [1, 7, 64])
def test_prefill_in_chunks(pair, chunk):
    card, model = pair
    tokens = prompt(41)
    driver = Driver(card)
    found, new = [], [driver.enter(0, tokens)]
    while driver.done[0] < len(tokens):
        count = min(chunk, len(tokens) - driver.done[0])
        result = driver.step([(0, count, driver.done[0] + count == len(tokens))], new)
        found += result.prompt_logprobs.get(0, [])
        new = []
    want = reference_logprobs(model, tokens)
    found = np.stack([dense(entry) for entry in [*found, result.logprobs[0]]])
    np.testing.assert_allclose(found, want, atol=TOLERANCE)
    assert result.tokens[0] == want[-1].argmax()


def test_mixed_batches(pair):
    """Prefill, chunks and decode of several sequences together, entering and leaving at different times."""
    card, model = pair
    driver = Driver(card, seed=1)
    texts = {row: prompt(length, row) for row, length in enumerate((3, 30, 17, 1, 50))}
    seen = {row: [] for row in texts}
    last: dict[int, int] = {}
    schedule = [
        {0: 3, 1: 10},
        {0: 1, 1: 20, 3: 1},
        {2: 5, 0: 1, 3: 1, 1: 1},
        {3: 1, 4: 50, 2: 12},
        {4: 1, 3: 1, 2: 1, 1: 1, 0: 1},
        {1: 1, 4: 1},
    ]
    for step in schedule:
        new = [driver.enter(row, texts[row]) for row in step if row not in driver.done]
        work = [(row, count, driver.done[row] + count >= len(texts[row])) for row, count in step.items()]
        for row, _, _ in work:
            if row in last:  # the runner itself wrote the token it sampled
                texts[row] = np.append(texts[row], last.pop(row))
        result = driver.step(work, new)
        for b, (row, _, sampled) in enumerate(work):
            seen[row] += [dense(entry) for entry in result.prompt_logprobs.get(b, [])]
            if sampled:
                seen[row].append(dense(result.logprobs[b]))
                last[row] = int(result.tokens[b])
            else:
                assert result.tokens[b] == -1
    for row, found in seen.items():
        np.testing.assert_allclose(np.stack(found), reference_logprobs(model, texts[row]), atol=TOLERANCE)


def test_copied_blocks_continue_like_the_original(pair):
    """A fork: a second row whose full blocks are shared and whose last, partial block is a copy."""
    card, model = pair
    driver = Driver(card, seed=2)
    tokens = prompt(14, 5)
    driver.step([(0, 14, True)], [driver.enter(0, tokens)])
    fork = np.append(tokens, [11, 12])
    new = driver.enter(1, fork)
    copy = int(driver.free.pop())
    driver.blocks[1], driver.done[1] = [*driver.blocks[0][:3], copy], 14
    runner = driver.runner
    runner.rows.blocks[1, :4] = driver.blocks[1]
    source = driver.blocks[0][3]
    result = driver.step([(1, 2, True), (0, 1, True)], [new], copies=[(source, copy)])
    np.testing.assert_allclose(dense(result.logprobs[0]), reference_logprobs(model, fork)[-1], atol=TOLERANCE)
    other = np.append(tokens, runner.rows.tokens[0, 14])
    np.testing.assert_allclose(dense(result.logprobs[1]), reference_logprobs(model, other)[-1], atol=TOLERANCE)
