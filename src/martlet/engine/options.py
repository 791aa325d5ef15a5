"""The few knobs of the engine; the rest follows from the model and the machine."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class EngineOptions:
    """max_num_batched_tokens: most tokens in a step; it is also the prefill chunk, so it bounds how long a step can
    hold up the streams of others (None: the runner's advice, which is more while nobody decodes). max_num_queued:
    requests that may wait for a free row before new ones are refused with Overloaded (None: no limit). seed: makes
    unseeded sampling reproducible (None: random). speculative_tokens: how many tokens to guess a step from the text
    so far (0: none); answers stay the same.
    """

    max_num_batched_tokens: int | None = None
    enable_prefix_caching: bool = True
    max_num_queued: int | None = None
    seed: int | None = None
    speculative_tokens: int = 0
