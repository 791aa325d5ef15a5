"""The counter RNG: Random123's known answers for philox4x32-10, and torch's version against numpy's."""

import numpy as np
import pytest
import torch

from martlet.kernels import philox
from martlet.kernels.reference.philox import gumbel

KNOWN = [  # counter, key, words
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]


def words(text: str) -> np.ndarray:
    return np.array([int(word, 16) for word in text.split()], np.uint64)


@pytest.mark.parametrize(("counter", "key", "want"), KNOWN)
def test_known_answers(counter, key, want):
    assert philox.philox4x32(words(counter), words(key)).tolist() == words(want).tolist()


def test_torch_noise_is_numpys():
    seeds = np.array([0, 1, 2**32 - 1, 2**63, 2**64 - 1, 0x0123456789ABCDEF], np.uint64)
    positions = np.array([0, 5, 131071, 2**31, 77, 4095])
    vocab = 1003
    every = gumbel(seeds, positions, None, vocab, torch.device("cpu")).numpy()
    tokens = np.random.default_rng(0).integers(0, vocab, (len(seeds), 9))
    some = gumbel(seeds, positions, torch.from_numpy(tokens), vocab, torch.device("cpu")).numpy()
    for i, (seed, position) in enumerate(zip(seeds.tolist(), positions.tolist(), strict=True)):
        want = philox.gumbel(seed, position, np.arange(vocab))
        np.testing.assert_allclose(every[i], want, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(some[i], want[tokens[i]], rtol=1e-5, atol=1e-6)


def test_noise_is_gumbel_distributed():
    noise = np.sort(philox.gumbel(42, 0, np.arange(200_000)).astype(np.float64))
    empirical = (np.arange(len(noise)) + 0.5) / len(noise)
    assert np.abs(np.exp(-np.exp(-noise)) - empirical).max() < 1.63 / np.sqrt(len(noise))  # Kolmogorov-Smirnov, 1 %
    assert np.isfinite(noise).all()
