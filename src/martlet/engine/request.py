"""What goes into the engine and what comes out."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Literal, NamedTuple

from martlet.engine.histogram import Histogram
from martlet.runners.base import TokenLogprobs
from martlet.sampling_params import SamplingParams

FinishReason = Literal["stop", "length", "abort", "error"]


@dataclass(slots=True)
class Request:
    """One prompt and how to continue it.

    priority: lower runs first; equal priorities run in order of arrival. stream: an Output after every step that gave
    something, else one Output per sequence, when it ends. cache_salt: requests share cached prefixes only with
    requests of the same salt. adapter: name of a LoRA adapter, None for the base model.
    """

    id: str
    prompt_token_ids: Sequence[int]
    params: SamplingParams = field(default_factory=SamplingParams)
    priority: int = 0
    stream: bool = False
    cache_salt: str | None = None
    adapter: str | None = None
    arrival: float = field(default_factory=time.monotonic)


@dataclass(slots=True)
class Output:
    """News of one sequence of a request: what came since its last Output. Concatenated, they are the whole answer.

    index: which of the request's n sequences. token_ids: new tokens. text: new text, never cut inside a character.
    logprobs: as many entries as token_ids, when asked for. finish_reason: set on a sequence's last Output: "stop"
    (end token, stop string or stop token; stop_reason tells which of the latter two), "length", "abort", "error"
    (`error` holds the cause). prompt_logprobs: on a sequence's first Output, when asked for: None for the first token,
    then one entry a token. prompt_tokens, cached_tokens and queued, the seconds the sequence waited before it first
    ran, where the backend knows: on a sequence's first and last Output. last: this is the last Output of the whole
    request.
    """

    request_id: str
    index: int = 0
    token_ids: list[int] = field(default_factory=list)
    text: str = ""
    logprobs: list[TokenLogprobs] | None = None
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None
    prompt_logprobs: list[TokenLogprobs | None] | None = None
    prompt_tokens: int = 0
    cached_tokens: int = 0
    queued: float | None = None
    error: BaseException | None = None
    last: bool = False


class Stats(NamedTuple):
    """A snapshot for metrics, health and the log. Counters only grow. Times in seconds."""

    running: int = 0
    waiting: int = 0
    kv_blocks_total: int = 0
    kv_blocks_used: int = 0
    prompt_tokens: int = 0
    generated_tokens: int = 0
    cached_tokens: int = 0
    preemptions: int = 0
    prefix_queries: int = 0  # tokens looked up in the prefix cache
    prefix_hits: int = 0  # tokens found there
    steps: int = 0
    step_tokens: Histogram | None = None  # tokens of each step, where the backend knows
    guesses: int = 0  # how often a sequence's next tokens were guessed
    guessed_tokens: int = 0
    right_guesses: tuple[int, ...] = ()  # how many guessed tokens were right, by their place in the guess
    max_adapters: int = 0  # slots
    running_adapters: tuple[str, ...] = ()  # names, of sequences in the batch
    waiting_adapters: tuple[str, ...] = ()
    finished: Mapping[str, int] = MappingProxyType({})  # finish reason -> requests
    error: str | None = None  # set when the engine cannot go on; detail is in the log
    busy_seconds: float = 0.0  # how long the step now under way has taken, 0 when idle
