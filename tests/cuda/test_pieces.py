"""What a piece of a step keeps of it."""

from __future__ import annotations

import numpy as np

from martlet.runners.base import Batch
from martlet.runners.cuda_runner.pieces import pieces


class Numbered:
    """martlet.runners.base.Masks whose mask number m holds 10 + m."""

    entries = np.array([0, 2, 3])

    def wait(self) -> np.ndarray:
        return np.array([[10], [11], [12]], np.uint32)


def test_a_mask_goes_with_the_piece_that_samples():
    count = np.array([7, 4, 1, 5, 2], np.int32)
    sample = np.array([True, True, True, True, False])
    batch = Batch(np.arange(5, dtype=np.int32) + 20, np.zeros(5, np.int32), count, sample, masks=Numbered())
    found = {}
    parts = list(pieces(batch, 6))
    assert [part.num_tokens for _, part in parts] == [6, 6, 6, 1]
    for which, part in parts:
        if part.masks is not None:
            assert part.sample[part.masks.entries].all()
            found |= dict(zip(which[part.masks.entries].tolist(), part.masks.wait()[:, 0].tolist(), strict=True))
    assert parts[0][1].masks is None and found == {0: 10, 2: 11, 3: 12}
