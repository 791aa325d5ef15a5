"""The sampler against one that sorts: same survivors, same draw, token for token."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from martlet.kernels import philox
from martlet.kernels.ops import Penalties, Sampling
from martlet.kernels.reference import sampling as module
from martlet.kernels.reference.sampling import sample


def settings(rows: int, **columns) -> Sampling:
    plain = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "seed": 0, "position": 0}
    kinds = dict(zip(plain, (np.float32, np.int64, np.float32, np.float32, np.uint64, np.int64), strict=True))
    extras = {name: columns.pop(name) for name in ("penalties", "bias", "banned", "allowed") if name in columns}
    full = {n: np.broadcast_to(columns.get(n, v), rows).astype(kinds[n]) for n, v in plain.items()}
    return Sampling(**full, **extras)


def survivors(x: np.ndarray, top_k: int, top_p: float, min_p: float) -> np.ndarray:
    """Tokens that are left of logits / temperature, by sorting (logit descending, id ascending)."""
    order = np.lexsort((np.arange(len(x)), -x))
    order = order[np.isfinite(x[order])]
    if min_p > 0:
        order = order[x[order] >= x.max() + np.log(np.float32(min_p))]
    if top_k > 0:
        order = order[:top_k]
    mass = np.exp(x[order].astype(np.float64) - x.max())
    before = np.cumsum(mass) - mass
    return order[before < np.float64(np.float32(top_p)) * mass.sum()]


def oracle(logits: np.ndarray, s: Sampling) -> list[int]:
    tokens = []
    for i, row in enumerate(logits):
        if s.temperature[i] == 0:
            tokens.append(int(row.argmax()))
            continue
        x = row / s.temperature[i]
        kept = np.sort(survivors(x, s.top_k[i], s.top_p[i], s.min_p[i]))
        noise = philox.gumbel(int(s.seed[i]), int(s.position[i]), kept)
        tokens.append(int(kept[(x[kept] + noise).argmax()]))
    return tokens


def draw(logits: np.ndarray, s: Sampling) -> list[int]:
    return sample(torch.from_numpy(logits.copy()), s).tolist()


def random_settings(rng: np.random.Generator, rows: int) -> Sampling:
    return settings(
        rows,
        temperature=rng.choice([0, 0.3, 0.7, 1, 1.5], rows),
        top_k=rng.choice([0, 0, 1, 2, 5, 50, 64, 700, 3000], rows),
        top_p=rng.choice([1, 1, 0.05, 0.5, 0.9, 0.97, 0.999], rows),
        min_p=rng.choice([0, 0, 0.01, 0.3, 1], rows),
        seed=rng.integers(0, 2**63, rows),
        position=rng.integers(0, 9000, rows),
    )


@pytest.mark.parametrize("vocab", [7, 100, 1500, 5003])
@pytest.mark.parametrize("spread", [0.2, 3.0, 20.0])
def test_draws_what_sorting_draws(vocab, spread):
    rng = np.random.default_rng(vocab + int(10 * spread))
    for _ in range(5):
        logits = (rng.standard_normal((16, vocab)) * spread).astype(np.float32)
        s = random_settings(rng, 16)
        assert draw(logits, s) == oracle(logits, s)


@pytest.mark.parametrize("step", [0.25, 2.0, 100.0])
def test_ties_go_to_the_lower_id(step):
    """Logits on a coarse grid, as bfloat16 gives them: prefixes end inside long runs of equal logits."""
    rng = np.random.default_rng(3)
    for vocab in (40, 2003):
        logits = (np.round(rng.standard_normal((24, vocab)) / step) * step).astype(np.float32)
        s = replace(random_settings(rng, 24), temperature=np.ones(24, np.float32))
        assert draw(logits, s) == oracle(logits, s)


def test_survivors_are_exact():
    rng = np.random.default_rng(11)
    for _ in range(30):
        x = (rng.standard_normal((4, 300)) * rng.choice([0.1, 1, 5])).astype(np.float32)
        x[rng.random(x.shape) < 0.3] = np.round(x[0, 0])
        s = random_settings(rng, 4)
        columns = (torch.from_numpy(c.copy())[:, None] for c in (s.top_k, s.top_p, s.min_p))
        kept = module._survivors(torch.from_numpy(x), *columns).numpy()
        for i in range(4):
            assert set(np.flatnonzero(kept[i])) == set(survivors(x[i], s.top_k[i], s.top_p[i], s.min_p[i]))


@pytest.mark.parametrize("cut", [{}, {"top_k": 12}, {"top_p": 0.9}, {"min_p": 0.05}])
def test_draws_follow_the_probabilities(cut):
    """Chi-square over 8,000 draws of one distribution, at successive positions of one seed."""
    rng = np.random.default_rng(5)
    row, draws = (rng.standard_normal(30) * 1.5).astype(np.float32), 8_000
    logits = np.broadcast_to(row, (draws, 30))
    tokens = draw(logits, settings(draws, temperature=0.8, seed=99, position=np.arange(draws), **cut))
    x = row / np.float32(0.8)
    kept = survivors(x, cut.get("top_k", 0), cut.get("top_p", 1.0), cut.get("min_p", 0.0))
    expected = np.exp(x[kept].astype(np.float64))
    expected *= draws / expected.sum()
    seen = np.bincount(tokens, minlength=30)
    assert seen.sum() == seen[kept].sum()
    freedom = len(kept) - 1
    assert ((seen[kept] - expected) ** 2 / expected).sum() < freedom + 3.7 * np.sqrt(2 * freedom)


def test_a_row_does_not_depend_on_its_batch():
    rng = np.random.default_rng(8)
    logits = rng.standard_normal((16, 900)).astype(np.float32)
    s = random_settings(rng, 16)
    together = draw(logits, s)
    names = ("temperature", "top_k", "top_p", "min_p", "seed", "position")
    for order in (rng.permutation(16), np.array([3]), np.array([9, 2])):
        part = Sampling(**{name: getattr(s, name)[order] for name in names})
        assert draw(logits[order], part) == [together[i] for i in order]


def test_seed_and_position_matter():
    logits = np.zeros((64, 5000), np.float32)
    assert len(set(draw(logits, settings(64, seed=np.arange(64))))) > 55
    assert len(set(draw(logits, settings(64, position=np.arange(64))))) > 55
    assert len(set(draw(logits, settings(64, seed=4, position=4)))) == 1


@pytest.mark.parametrize("greedy", [True, False])
def test_penalties_follow_their_formulae(greedy):
    rng = np.random.default_rng(2)
    vocab = 50
    logits = rng.standard_normal((5, vocab)).astype(np.float32) * 2
    lengths, prompts = [12, 1, 7], [4, 1, 0]
    tokens = np.full((3, 12), -1, np.int64)
    for i, n in enumerate(lengths):
        tokens[i, :n] = rng.integers(0, vocab, n)
    tokens[0, 4:7] = tokens[0, 4]
    repetition, presence, frequency = np.array([[1.7, 1, 0.6], [0.4, 0, -1], [0.3, 2, 0.5]], np.float32)
    rows = np.array([0, 2, 4])
    want = logits.copy()
    for i, row in enumerate(rows):
        for token in range(vocab):
            value, output = want[row, token], list(tokens[i, prompts[i] : lengths[i]])
            if token in tokens[i, : lengths[i]]:
                value = value / repetition[i] if value > 0 else value * repetition[i]
            want[row, token] = value - frequency[i] * output.count(token) - presence[i] * (token in output)
    found = torch.from_numpy(logits.copy())
    penalties = Penalties(rows, tokens, np.array(prompts), repetition, presence, frequency)
    s = settings(5, temperature=0 if greedy else 1, seed=np.arange(5), penalties=penalties)
    assert sample(found, s).tolist() == oracle(want, s)
    if greedy:
        np.testing.assert_allclose(found.numpy(), want, rtol=1e-6, atol=1e-6)


def test_bias_banned_and_allowed():
    logits = np.tile(np.arange(10, dtype=np.float32), (5, 1))
    rows, ids = np.array([0, 1, 1]), np.array([3, 4, 9])
    s = settings(
        5,
        temperature=0,
        bias=(rows, ids, np.array([100, 5.5, -5], np.float32)),
        banned=(np.array([2, 2, 4]), np.array([9, 8, 2])),
        allowed=(np.array([3, 3, 4, 4]), np.array([1, 6, 2, 0])),
    )
    assert draw(logits, s) == [3, 4, 7, 6, 0]
    warm = replace(s, temperature=np.full(5, 50, np.float32), top_k=np.array([0, 0, 0, 0, 5]))
    for position in range(200):
        tokens = draw(logits, replace(warm, position=np.full(5, position)))
        assert tokens[2] not in (8, 9) and tokens[3] in (1, 6) and tokens[4] == 0


def test_bias_adds_up_with_allowed():
    """A bias on an allowed token counts, one on a token that is not allowed does not bring it back."""
    s = settings(
        1,
        temperature=0,
        bias=(np.array([0, 0]), np.array([5, 2]), np.array([1000, 10], np.float32)),
        allowed=(np.array([0, 0]), np.array([2, 3])),
    )
    assert draw(np.arange(8, dtype=np.float32)[None], s) == [2]
