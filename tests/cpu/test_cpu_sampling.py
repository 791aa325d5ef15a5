"""The native sampler against one that sorts: same survivors, same draw, token for token; log-probabilities too."""

from __future__ import annotations

import functools

import numpy as np
import pytest
from cpu_oracle import HERE, Rows

from martlet.kernels import philox
from martlet.kernels.cpu import program as c
from martlet.kernels.cpu.library import Executor
from martlet.kernels.cpu.program import Format
from martlet.runners.cpu_runner.packing import Packer

PLAIN = {"temperature": 1.0, "top_p": 1.0, "repetition": 1.0}


@functools.cache
def executor(isa: str) -> Executor:
    return Executor(2, isa=isa)


def run_head(run: Executor, logits: np.ndarray, sampling: np.ndarray, *, tokens=None, targets=None, top=-1, k=0):
    """Answers for rows of logits [R, V], each a sequence of its own, made by a head whose inputs are unit vectors.

    tokens: int32 [R, known], what the rows hold; the last one is what the step computes.
    """
    n = len(logits)
    tokens = np.zeros((n, 1), np.int32) if tokens is None else np.array(tokens, np.int32)
    rows = Rows(np.pad(tokens, ((0, 0), (0, 1))), np.zeros((n, 64), np.int32), sampling)
    matrix = Packer(run).stack([np.ascontiguousarray(logits.T)], Format.F32)
    x = np.eye(n, dtype=np.float32)
    head = c.HeadOp(matrix, x.ctypes.data, None, n)
    asked = [(i, i, -1 if targets is None else targets[i], top) for i in range(n)]
    batch, answers, ids, values = rows.batch(np.arange(n), [tokens.shape[1] - 1] * n, [1] * n, asked, max(k, 0))
    run.run(c.Program([head]), batch)
    return answers, ids, values, rows.tokens[:, -1]


def settings(rows: int, **columns) -> np.ndarray:
    sampling = np.zeros(rows, c.SAMPLING)
    for name, value in (PLAIN | columns).items():
        sampling[name] = value
    return sampling


def survivors(x: np.ndarray, s: np.void) -> np.ndarray:
    """Tokens that are left of logits / temperature, by sorting (logit descending, id ascending)."""
    order = np.lexsort((np.arange(len(x)), -x))
    order = order[np.isfinite(x[order])]
    if s["min_p"] > 0:
        order = order[x[order] >= x.max() + np.log(s["min_p"])]
    if s["top_k"] > 0:
        order = order[: s["top_k"]]
    mass = np.exp(x[order].astype(np.float64) - x.max())
    before = np.cumsum(mass) - mass
    return order[before < np.float64(s["top_p"]) * mass.sum()]


def oracle(logits: np.ndarray, sampling: np.ndarray, position: int) -> list[int]:
    tokens = []
    for row, s in zip(logits, sampling, strict=True):
        if s["temperature"] == 0:
            tokens.append(int(row.argmax()))
            continue
        x = row / s["temperature"]
        kept = np.sort(survivors(x, s))
        tokens.append(int(kept[(x[kept] + philox.gumbel(int(s["seed"]), position, kept)).argmax()]))
    return tokens


def random_settings(rng: np.random.Generator, rows: int) -> np.ndarray:
    return settings(
        rows,
        temperature=rng.choice([0, 0.3, 0.7, 1, 1.5], rows),
        top_k=rng.choice([0, 0, 1, 2, 5, 50, 64, 700, 3000], rows),
        top_p=rng.choice([1, 1, 0.05, 0.5, 0.9, 0.97, 0.999], rows),
        min_p=rng.choice([0, 0, 0.01, 0.3, 1], rows),
        seed=rng.integers(0, 2**63, rows),
    )


@pytest.mark.parametrize("isa", HERE)
@pytest.mark.parametrize("vocab", [7, 100, 1500, 5003])
@pytest.mark.parametrize("spread", [0.2, 3.0, 20.0])
def test_draws_what_sorting_draws(isa, vocab, spread):
    rng = np.random.default_rng(vocab + int(10 * spread))
    for length in (1, 30):
        logits = (rng.standard_normal((24, vocab)) * spread).astype(np.float32)
        s, tokens = random_settings(rng, 24), rng.integers(0, vocab, (24, length))
        answers, *_, written = run_head(executor(isa), logits, s, tokens=tokens)
        assert answers["token"].tolist() == oracle(logits, s, length)
        assert written.tolist() == answers["token"].tolist()


@pytest.mark.parametrize("step", [0.25, 2.0, 100.0])
def test_ties_go_to_the_lower_id(step):
    """Logits on a coarse grid, as bfloat16 gives them: prefixes end inside long runs of equal logits."""
    rng = np.random.default_rng(3)
    for vocab in (40, 2003):
        logits = (np.round(rng.standard_normal((24, vocab)) / step) * step).astype(np.float32)
        s = random_settings(rng, 24)
        s["temperature"] = np.where(s["temperature"] > 0, 1, 0)
        answers, *_ = run_head(executor(HERE[-1]), logits, s)
        assert answers["token"].tolist() == oracle(logits, s, 1)


def test_draws_follow_the_probabilities():
    """Chi-square over 20,000 draws, each with a seed of its own."""
    rng = np.random.default_rng(5)
    row, draws = (rng.standard_normal(30) * 1.5).astype(np.float32), 20_000
    seen = np.zeros(30)
    for part in range(20):
        s = settings(1000, temperature=0.8, seed=np.arange(1000) + 1000 * part)
        answers, *_ = run_head(executor(HERE[-1]), np.broadcast_to(row, (1000, 30)), s)
        seen += np.bincount(answers["token"], minlength=30)
    expected = np.exp(row / 0.8)
    expected *= draws / expected.sum()
    likely = expected > 5
    assert ((seen - expected) ** 2 / expected)[likely].sum() < 2 * likely.sum()


@pytest.mark.parametrize("isa", HERE)
def test_penalties_follow_their_formulae(isa):
    rng = np.random.default_rng(6)
    logits = rng.standard_normal((3, 40)).astype(np.float32)
    tokens, prompt = rng.integers(0, 40, (3, 25)), 9
    s = settings(3, temperature=0, presence=[0.7, -0.3, 0], frequency=[0.2, 0, -1.1], repetition=[1, 1.7, 0.6])
    s["prompt_len"] = prompt
    wanted = logits.copy()
    for i in range(3):
        for t in range(40):
            count = (tokens[i, prompt:] == t).sum()
            if (tokens[i] == t).any():
                wanted[i, t] = (
                    wanted[i, t] / s["repetition"][i] if wanted[i, t] > 0 else wanted[i, t] * s["repetition"][i]
                )
            wanted[i, t] -= s["frequency"][i] * count + s["presence"][i] * (count > 0)
    for _ in range(2):  # twice: nothing may stay behind
        answers, *_ = run_head(executor(isa), logits, s, tokens=tokens)
        assert answers["token"].tolist() == wanted.argmax(-1).tolist()


def test_bias_allowed_and_ends():
    logits = np.tile(np.linspace(0, 1, 50, dtype=np.float32), (5, 1))
    bias_ids, biases = np.array([3, 9], np.int32), np.array([2.0, 1.5], np.float32)
    allowed, ends = np.array([4, 30, 9], np.int32), np.array([49, 48], np.int32)
    s = settings(5, temperature=0)
    s["prompt_len"] = 1
    s["n_bias"][[0, 1]], s["bias_ids"], s["biases"] = 2, bias_ids.ctypes.data, biases.ctypes.data
    s["n_allowed"][[1, 2]], s["allowed_ids"] = 3, allowed.ctypes.data
    s["n_end"][[3, 4]], s["end_ids"], s["min_tokens"] = 2, ends.ctypes.data, [0, 0, 0, 2, 1]
    answers, *_ = run_head(executor(HERE[-1]), logits, s, tokens=np.zeros((5, 2), np.int32))
    assert answers["token"].tolist() == [3, 9, 30, 47, 49]
    s["temperature"] = 1  # only allowed tokens are drawn, whatever the seed
    for seed in range(50):
        s["seed"] = seed
        answers, *_ = run_head(executor(HERE[-1]), logits, s, tokens=np.zeros((5, 2), np.int32))
        assert {*answers["token"][1:3].tolist()} <= {4, 30, 9} and answers["token"][3] < 48


@pytest.mark.parametrize("isa", HERE)
@pytest.mark.parametrize(("vocab", "k"), [(7, 20), (100, 0), (5003, 5), (5003, 1000)])
def test_logprobs(isa, vocab, k):
    rng = np.random.default_rng(k)
    logits = (rng.standard_normal((70, vocab)) * 4).astype(np.float32)
    logits[1] = np.round(logits[1])
    targets = rng.integers(0, vocab, 70)
    answers, ids, values, _ = run_head(executor(isa), logits, settings(70), targets=targets, top=k, k=k)
    exact = logits.astype(np.float64)
    logprobs = exact - exact.max(-1, keepdims=True)
    logprobs -= np.log(np.exp(logprobs).sum(-1, keepdims=True))
    assert answers["token"].tolist() == targets.tolist()
    for i, target in enumerate(targets):
        assert answers["rank"][i] == (logits[i] > logits[i, target]).sum() + 1
        assert abs(answers["logprob"][i] - logprobs[i, target]) < 2e-5
        order = np.lexsort((np.arange(vocab), -logits[i]))[:k]
        assert ids[i, : len(order)].tolist() == order.tolist()
        np.testing.assert_allclose(values[i, : len(order)], logprobs[i, order], atol=2e-5)


def test_greedy_without_logits_equals_greedy_with():
    """The fused argmax over panels and the sampler agree, ties and all, for more rows than one round takes."""
    rng = np.random.default_rng(8)
    logits = np.round(rng.standard_normal((130, 999)) * 2).astype(np.float32)
    fused, *_ = run_head(executor(HERE[-1]), logits, settings(130, temperature=0))
    full, *_ = run_head(executor(HERE[-1]), logits, settings(130, temperature=0), top=0)
    assert fused["token"].tolist() == full["token"].tolist() == logits.argmax(-1).tolist()
