"""How many tokens a step may have, learnt from how long the last ones took.

While somebody decodes, a step shall stay short, or their stream stutters whenever a prompt arrives. How many tokens
that allows depends on the machine, on what else runs on it and on the length of the contexts, so it is measured where
it matters: on the real steps. It changes when things are computed and never what is computed.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable

STEP_SECONDS = 0.07  # a mixed step should stay under 80 ms
LEAST, MOST = 32, 512  # tokens of a step; shorter steps are not learnt from, since reading the weights rules their time
FIRST = 64  # before anything was measured
WINDOW = 9  # the median of so many steps is not moved by a few that something else held up
ROUND = 16


class Pace:
    """tokens: how many a step may have now."""

    def __init__(self) -> None:
        self.tokens = FIRST
        self._seconds_per_token: deque[float] = deque(maxlen=WINDOW)

    def saw(self, tokens: int, seconds: float) -> None:
        """A step of `tokens` tokens took `seconds`."""
        if tokens >= LEAST:
            self._seconds_per_token.append(seconds / tokens)
            fit = STEP_SECONDS / max(_median(self._seconds_per_token), 1e-9)
            self.tokens = max(LEAST, min(MOST, int(fit) // ROUND * ROUND))


def _median(values: Iterable[float]) -> float:
    """The upper one of two in the middle."""
    ranked = sorted(values)
    return ranked[len(ranked) // 2]
