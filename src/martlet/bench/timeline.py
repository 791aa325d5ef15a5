"""When the tokens of each request came, and the figures that follow from it. All times in seconds of one clock."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field

from martlet.errors import MartletError


@dataclass(slots=True)
class Timeline:
    """One request. times[i]: when the i-th piece of the answer came; counts[i]: how many tokens it had."""

    submitted: float
    prompt_tokens: int
    times: list[float] = field(default_factory=list)
    counts: list[int] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)  # ids, where the engine tells them

    def add(self, time: float, count: int, tokens: Sequence[int] = ()) -> None:
        self.times.append(time)
        self.counts.append(count)
        self.tokens += tokens

    @property
    def new_tokens(self) -> int:
        return sum(self.counts)

    @property
    def first(self) -> float:
        return self.times[0] - self.submitted

    @property
    def gaps(self) -> list[float]:
        """Seconds between one piece and the next."""
        return [b - a for a, b in itertools.pairwise(self.times)]


def figures(timelines: Sequence[Timeline]) -> dict[str, float]:
    """Figures of one run: medians over requests, throughput over the time from first submission to last token.

    prefill_tok_s counts the prompt over the time to first token, so it is a lower bound: sampling is in it. Raises
    MartletError when a request got no token.
    """
    import statistics

    if not all(t.times for t in timelines):
        raise MartletError("a request of the benchmark was answered with no token")
    began = min(t.submitted for t in timelines)
    ended = max(t.times[-1] for t in timelines)
    gaps = [gap for t in timelines for gap in t.gaps]
    paces = [(t.new_tokens - t.counts[0]) / (t.times[-1] - t.times[0]) for t in timelines if len(t.times) > 1]
    tokens = sum(t.new_tokens for t in timelines)
    return {
        "ttft_ms": 1e3 * statistics.median(t.first for t in timelines),
        "itl_ms": 1e3 * statistics.median(gaps) if gaps else 0.0,
        "decode_tok_s": statistics.median(paces) if paces else 0.0,
        "prefill_tok_s": statistics.median(t.prompt_tokens / t.first for t in timelines),
        "output_tok_s": tokens / (ended - began),
        "seconds": ended - began,
        "new_tokens": float(tokens),
    }


def fingerprint(timelines: Sequence[Timeline]) -> str:
    """Changes when any token of any answer does; '' where the engine does not tell its tokens."""
    import zlib

    import numpy as np

    if not all(t.tokens for t in timelines):
        return ""
    return f"{zlib.crc32(np.concatenate([np.asarray(t.tokens, '<i4') for t in timelines]).tobytes()):08x}"


def medians(runs: Sequence[dict[str, float]]) -> dict[str, float]:
    import statistics

    return {key: statistics.median(run[key] for run in runs) for key in runs[0]}


def enough(runs: Sequence[dict[str, float]], seconds: float | None) -> bool:
    """Whether one more run would take these runs past `seconds` in all. The first run is always made."""
    spent = sum(run["seconds"] for run in runs)
    return seconds is not None and bool(runs) and spent + spent / len(runs) > seconds
