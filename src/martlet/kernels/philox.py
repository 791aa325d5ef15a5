"""The random draw of the sampler, in plain numpy: the rule that every kernel implements and is tested against.

A token is drawn by the Gumbel-max rule: the surviving token with the largest logit / temperature + noise wins, which
draws it with its softmax probability. The noise of one vocabulary entry is a pure function of (seed, position, token),
so a request's tokens depend on its seed alone, never on what else is in its batch:

    words  = philox4x32-10(counter = (token // 4, position, 0, 0), key = (seed & 0xffffffff, seed >> 32))
    u      = ((words[token % 4] >> 9) + 0.5) * 2**-23         exact in float32, 0 < u < 1
    noise  = -log(-log(u))

`seed` is the row's 64-bit seed, `position` the index in the sequence of the token being sampled. Philox4x32-10:
J. Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011.
"""

from __future__ import annotations

import numpy as np

MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
ROUNDS = 10
_LOW = np.uint64(0xFFFFFFFF)
_HALF = np.uint64(32)


def philox4x32(counter: np.ndarray, key: np.ndarray) -> np.ndarray:
    """Four random words, uint32 [..., 4], from counter [..., 4] and key [..., 2], both of 32-bit words."""
    c0, c1, c2, c3 = np.moveaxis(np.asarray(counter, np.uint64), -1, 0)
    k0, k1 = np.moveaxis(np.asarray(key, np.uint64), -1, 0)
    for _ in range(ROUNDS):
        p0, p1 = c0 * np.uint64(MULTIPLIERS[0]), c2 * np.uint64(MULTIPLIERS[1])
        c0, c1, c2, c3 = (p1 >> _HALF) ^ c1 ^ k0, p1 & _LOW, (p0 >> _HALF) ^ c3 ^ k1, p0 & _LOW
        k0, k1 = (k0 + np.uint64(KEY_STEPS[0])) & _LOW, (k1 + np.uint64(KEY_STEPS[1])) & _LOW
    return np.stack([c0, c1, c2, c3], axis=-1).astype(np.uint32)


def gumbel(seed: int, position: int, tokens: np.ndarray) -> np.ndarray:
    """Noise of `tokens` (any shape) for one draw, float32."""
    tokens = np.asarray(tokens, np.uint64)
    zero = np.zeros_like(tokens)
    counter = np.stack([tokens // np.uint64(4), zero + np.uint64(position), zero, zero], axis=-1)
    words = philox4x32(counter, np.array([seed & 0xFFFFFFFF, seed >> 32], np.uint64))
    word = np.take_along_axis(words, (tokens % np.uint64(4)).astype(np.int64)[..., None], axis=-1)[..., 0]
    u = ((word >> np.uint32(9)).astype(np.float32) + np.float32(0.5)) * np.float32(2**-23)
    return -np.log(-np.log(u))
