"""Guessing the next tokens from the text itself: where did the last few tokens stand before, and what followed them?

Known as prompt lookup. Costs microseconds, needs no second model, and helps where answers repeat their prompt: code
edits, quotations, extraction. Guesses only save time; verification keeps exactly the tokens that would have come.
"""

from __future__ import annotations

import numpy as np

SIZES = (4, 3, 2)  # longer matches first: what followed them is likelier to follow again
REACH = 4096  # how far back to look


def propose(tokens: np.ndarray, count: int) -> np.ndarray:
    """`count` tokens that may follow `tokens` (int32 [n]): what followed the latest earlier match, going round if it
    runs into the end of the text. None at all, int32 [0], when there is no match."""
    tokens = tokens[-REACH:]
    for size in SIZES:
        if len(tokens) <= size:
            continue
        match = tokens[size - 1 : -1] == tokens[-1]
        for back in range(2, size + 1):
            match &= tokens[size - back : -back] == tokens[-back]
        found = np.flatnonzero(match)
        if len(found):
            return np.resize(tokens[found[-1] + size :], count)
    return tokens[:0]
