"""How one request wants its tokens chosen. Field names are the ones vLLM users know."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from reprlib import repr as brief

from martlet.errors import InvalidRequest
from martlet.grammar import Grammar

MAX_STOPS = 64
MAX_N = 128


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """Sampling settings of a request; checked when made (InvalidRequest names the field).

    temperature 0 is greedy. top_k 0 or -1 means all tokens. seed None draws one at random; with a seed, a request's
    tokens do not depend on what else is in its batch. max_tokens None means up to the model's length.
    logprobs k: the chosen token's log-probability and the k most likely ones, of the raw distribution (before
    temperature, penalties and truncation); 0 gives the chosen token's alone. shown_token_ids: control tokens that stay
    in the text although skip_special_tokens leaves them out: marks that a parser of the text has to see.
    grammar: what the answer must look like.
    """

    n: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None
    stop: str | Sequence[str] | None = None
    stop_token_ids: Sequence[int] | None = None
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    max_tokens: int | None = 16
    min_tokens: int = 0
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    allowed_token_ids: Sequence[int] | None = None
    detokenize: bool = True
    skip_special_tokens: bool = True
    shown_token_ids: Sequence[int] = ()
    grammar: Grammar | None = None

    def __post_init__(self) -> None:
        def check(ok: bool, name: str, want: str) -> None:
            if not ok:
                raise InvalidRequest(f"{name} must be {want}, got {brief(getattr(self, name))}", param=name)

        def is_int(value: object) -> bool:
            return isinstance(value, int) and not isinstance(value, bool)

        def is_real(value: object) -> bool:
            return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)

        check(is_int(self.n) and 1 <= self.n <= MAX_N, "n", f"a whole number from 1 to {MAX_N}")
        check(is_real(self.temperature) and 0 <= self.temperature <= 100, "temperature", "a number from 0 to 100")
        check(is_real(self.top_p) and 0 < self.top_p <= 1, "top_p", "a number above 0 and at most 1")
        check(is_int(self.top_k) and self.top_k >= -1, "top_k", "a whole number, 0 or -1 for all tokens")
        check(is_real(self.min_p) and 0 <= self.min_p <= 1, "min_p", "a number from 0 to 1")
        for name in ("presence_penalty", "frequency_penalty"):
            check(is_real(getattr(self, name)) and -2 <= getattr(self, name) <= 2, name, "a number from -2 to 2")
        check(is_real(self.repetition_penalty) and self.repetition_penalty > 0, "repetition_penalty", "above 0")
        check(self.seed is None or (is_int(self.seed) and -(2**63) <= self.seed < 2**64), "seed", "a 64-bit integer")
        check(self.max_tokens is None or (is_int(self.max_tokens) and self.max_tokens >= 1), "max_tokens", "at least 1")
        check(is_int(self.min_tokens) and self.min_tokens >= 0, "min_tokens", "0 or more")
        if self.max_tokens is not None:
            check(self.min_tokens <= self.max_tokens, "min_tokens", f"at most max_tokens ({self.max_tokens})")
        for name in ("logprobs", "prompt_logprobs"):
            value = getattr(self, name)
            check(value is None or (is_int(value) and 0 <= value <= 1000), name, "a whole number from 0 to 1000")

        stops = [self.stop] if isinstance(self.stop, str) else list(self.stop or ())
        check(
            len(stops) <= MAX_STOPS and all(isinstance(s, str) and s for s in stops),
            "stop",
            f"a non-empty string or a list of at most {MAX_STOPS}",
        )
        object.__setattr__(self, "stop", tuple(stops))
        check(all(is_int(t) for t in self.stop_token_ids or ()), "stop_token_ids", "a list of token ids")
        object.__setattr__(self, "stop_token_ids", tuple(self.stop_token_ids or ()))
        check(
            self.allowed_token_ids is None
            or (len(self.allowed_token_ids) > 0 and all(map(is_int, self.allowed_token_ids))),
            "allowed_token_ids",
            "a non-empty list of token ids",
        )
        if self.allowed_token_ids is not None:
            object.__setattr__(self, "allowed_token_ids", tuple(self.allowed_token_ids))
        check(
            all(is_int(t) and is_real(b) for t, b in self.logit_bias.items()),
            "logit_bias",
            "a map from token id to a number",
        )
        check(self.grammar is None or isinstance(self.grammar, Grammar), "grammar", "a martlet.grammar.Grammar")
        if self.grammar is not None and self.ignore_eos:
            raise InvalidRequest(
                "ignore_eos: with a grammar, the answer ends where the grammar does", param="ignore_eos"
            )
        if stops and not self.detokenize:
            raise InvalidRequest("stop strings need detokenize=True", param="stop")

    @property
    def greedy(self) -> bool:
        return self.temperature < 1e-5

    @property
    def has_penalties(self) -> bool:
        return bool(self.presence_penalty or self.frequency_penalty or self.repetition_penalty != 1.0)

    def check_vocabulary(self, vocab_size: int) -> None:
        """Raise InvalidRequest when a token id in any field is not below `vocab_size`."""
        for name in ("stop_token_ids", "allowed_token_ids", "logit_bias"):
            for token in getattr(self, name) or ():
                if not 0 <= token < vocab_size:
                    raise InvalidRequest(f"{name} holds {token}; token ids go from 0 to {vocab_size - 1}", param=name)
