"""The torch runner through its contract, on small dummy models."""

import logging
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from martlet.errors import BackendUnavailable, UsageError
from martlet.hub.card import ModelCard
from martlet.runners import LoadOptions
from martlet.runners.base import Batch, NewRow
from martlet.runners.torch_runner import TorchRunner
from martlet.sampling_params import SamplingParams

CONFIG = {
    "model_type": "qwen3",
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "vocab_size": 300,
    "max_position_embeddings": 128,
}
CARD = ModelCard("tiny", Path("tiny"), "dummy", "qwen3", config=CONFIG)
OPTIONS = {"dtype": "float32", "device": "cpu", "max_num_seqs": 6, "kv_cache_tokens": 6 * 64, "max_model_len": 64}


@pytest.fixture
def runner():
    return TorchRunner(CARD, LoadOptions(**OPTIONS))


def run(runner, prompts: dict[int, list[int]], steps: int, params=None, seed=3, end_ids=()) -> dict[int, list[int]]:
    """Prefill `prompts` (row -> tokens) together, then decode; what each row was given."""
    rows = np.array(list(prompts), np.int32)
    new = [
        NewRow(row, np.array(p, np.int32), len(p), params or SamplingParams(temperature=1, seed=0), seed + row, end_ids)
        for row, p in prompts.items()
    ]
    table = np.arange(4)
    update = {
        "block_rows": np.repeat(rows, 4),
        "block_slots": np.tile(table, len(rows)).astype(np.int32),
        "block_ids": (rows[:, None] * 4 + table).reshape(-1).astype(np.int32),
    }
    start, count = np.zeros(len(rows), np.int32), np.array([len(p) for p in prompts.values()], np.int32)
    out = {row: [] for row in prompts}
    for step in range(steps):
        more = {"new_rows": new, **update} if step == 0 else {}
        result = runner.launch(Batch(rows, start, count, np.ones(len(rows), bool), **more)).result()
        start, count = start + count, np.ones_like(count)
        for row, token in zip(prompts, result.tokens.tolist(), strict=True):
            out[row].append(token)
    return out


PROMPTS = {0: [5, 6, 7], 1: [9], 4: list(range(20, 45)), 2: [1, 2]}


def test_contract(runner):
    assert (runner.lag, runner.vocab_size, runner.memory.max_rows, runner.memory.max_model_len) == (0, 300, 6, 64)
    assert runner.memory.num_blocks == 24 and runner.max_step_tokens > 0
    assert runner.memory.bytes_per_token == 2 * 2 * 2 * 32 * 4
    empty = np.empty(0, np.int32)
    assert len(runner.launch(Batch(empty, empty, empty, np.empty(0, bool))).result().tokens) == 0


def test_sampled_tokens_do_not_depend_on_the_batch(runner):
    together = run(runner, PROMPTS, 12)
    assert len(set(together[0])) > 6
    for row, prompt in PROMPTS.items():
        assert run(runner, {row: prompt}, 12) == {row: together[row]}
    assert run(runner, dict(reversed(PROMPTS.items())), 12) == together
    assert run(runner, PROMPTS, 12, seed=4) != together


def test_a_preempted_sequence_goes_on_as_before(runner):
    """It comes back as prompt and output so far; the draw depends on position, not on the step."""
    whole = run(runner, {0: PROMPTS[4]}, 12)[0]
    params = SamplingParams(temperature=1)
    tokens = np.array(PROMPTS[4] + whole[:5], np.int32)
    blocks = {"block_rows": np.zeros(4, np.int32), "block_slots": np.arange(4, dtype=np.int32)}
    new = NewRow(0, tokens, len(PROMPTS[4]), params, 3)
    one = np.array([0], np.int32)
    count = np.array([len(tokens)], np.int32)
    step = Batch(
        one, one, count, np.array([True]), new_rows=[new], **blocks, block_ids=np.arange(9, 13, dtype=np.int32)
    )
    assert runner.launch(step).result().tokens.tolist() == [whole[5]]


def test_min_tokens_holds_back_the_end(runner):
    greedy = run(runner, {0: [5, 6, 7]}, 8, SamplingParams(temperature=0))[0]
    ends = tuple(greedy[:2])
    found = run(runner, {0: [5, 6, 7]}, 8, SamplingParams(temperature=0, min_tokens=4), end_ids=ends)[0]
    assert not set(found[:4]) & set(ends)


def test_penalties_count_what_the_runner_sampled(runner):
    free = run(runner, {0: [5, 6, 7]}, 20, SamplingParams(temperature=0))[0]
    held = run(runner, {0: [5, 6, 7]}, 20, SamplingParams(temperature=0, presence_penalty=2, frequency_penalty=2))[0]
    assert len(set(held)) > len(set(free))
    assert len(set(held)) == len(held)  # dummy logits are far smaller than the penalty


def test_logprobs_only_where_asked(runner):
    params = SamplingParams(temperature=0, logprobs=2, prompt_logprobs=0)
    plain = SamplingParams(temperature=0)
    rows, count = np.array([3, 1], np.int32), np.array([3, 3], np.int32)
    new = [
        NewRow(3, np.array([1, 2, 3], np.int32), 3, plain, 0),
        NewRow(1, np.array([1, 2, 3], np.int32), 3, params, 0),
    ]
    update = {"block_rows": rows, "block_slots": np.zeros(2, np.int32), "block_ids": np.array([5, 6], np.int32)}
    step = Batch(rows, np.zeros(2, np.int32), count, np.ones(2, bool), new_rows=new, **update)
    result = runner.launch(step).result()
    assert set(result.logprobs) == set(result.prompt_logprobs) == {1}
    entry = result.logprobs[1]
    assert entry.token == result.tokens[1] == entry.top_ids[0] and entry.rank == 1
    assert entry.logprob == pytest.approx(float(entry.top_logprobs[0])) and len(entry.top_ids) == 2
    assert [p.token for p in result.prompt_logprobs[1]] == [2, 3]
    assert all(len(p.top_ids) == 0 and p.logprob < 0 for p in result.prompt_logprobs[1])


def test_loading_says_what_it_did(caplog):
    caplog.set_level(logging.INFO, "martlet")
    seen = []
    runner = TorchRunner(CARD, LoadOptions(**OPTIONS), lambda done, total: seen.append((done, total)))
    assert seen[-1] == (2 * 11 + 3, 2 * 11 + 3) and len(seen) == seen[-1][0]
    assert "loaded tiny in" in caplog.text and "float32 (as asked)" in caplog.text and "KV" in caplog.text
    assert runner.decoder.weight_bytes == pytest.approx(4 * (2 * 300 * 64 + 2 * 43200), rel=0.02)


def test_bfloat16_stays_close(runner):
    half = TorchRunner(CARD, LoadOptions(**OPTIONS | {"dtype": "bfloat16"}))
    assert half.caches[0].dtype == torch.bfloat16
    params = SamplingParams(temperature=0, logprobs=300)
    count = np.array([25], np.int32)
    one = np.zeros(1, np.int32)
    blocks = {"block_rows": np.zeros(2, np.int32), "block_slots": np.arange(2, dtype=np.int32)}
    new = [NewRow(0, np.arange(20, 45, dtype=np.int32), 25, params, 0)]
    step = Batch(one, one, count, np.ones(1, bool), new_rows=new, **blocks, block_ids=np.array([3, 1], np.int32))
    found, want = (r.launch(step).result().logprobs[0] for r in (half, runner))
    dense = [entry.top_logprobs[np.argsort(entry.top_ids)] for entry in (found, want)]
    np.testing.assert_allclose(*dense, atol=0.05)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"quant": "int3"}, UsageError, "int3.*int8"),
        ({"dtype": "int3"}, UsageError, "int3.*bfloat16"),
        ({"device": "tpu"}, BackendUnavailable, "tpu"),
    ],
)
def test_wrong_options(options, error, message):
    with pytest.raises(error, match=message):
        TorchRunner(CARD, LoadOptions(**OPTIONS | options))


def test_without_torch_it_says_what_to_install():
    """In a process of its own, where importing torch fails as if it were not installed, for blocks only torch takes."""
    code = (
        "import sys; sys.modules['torch'] = None\n"
        "from pathlib import Path\n"
        "from martlet import runners\n"
        "from martlet.hub.card import ModelCard\n"
        "from martlet.errors import BackendUnavailable\n"
        f"card = ModelCard('m', Path('m'), 'dummy', 'qwen3', config={CONFIG!r})\n"
        "try: runners.load(card, runners.LoadOptions(device='cpu', block_size=6))\n"
        "except BackendUnavailable as e: print(e)"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert "pip install 'martlet[torch]'" in found.stdout, found.stderr
