"""Choosing tokens for a batch of rows that each have their own SamplingParams, as a logits processor for generate().

`generate` runs greedy; where a row wants anything else, its token is chosen here and all other logits are masked.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch
from transformers import LogitsProcessor

from martlet.runners.base import TokenLogprobs
from martlet.sampling_params import SamplingParams


@dataclass(slots=True)
class SampledRow:
    """prompt, end_ids: token ids. draws: the row's own random numbers, so that its tokens do not depend on the batch.
    logprobs: of the newest token, until somebody takes it.
    """

    params: SamplingParams
    prompt: list[int]
    end_ids: tuple[int, ...]
    draws: torch.Generator
    output: list[int] = field(default_factory=list)
    finished: bool = False
    logprobs: TokenLogprobs | None = None

    @property
    def plain(self) -> bool:
        """Greedy over the logits as they are."""
        params = self.params
        return (
            params.greedy
            and params.logprobs is None
            and not (params.has_penalties or params.logit_bias or params.allowed_token_ids)
            and len(self.output) >= params.min_tokens
        )


class RowSampler(LogitsProcessor):
    def __init__(self, rows: list[SampledRow]):
        self._rows = rows

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """scores: float32 [rows, vocabulary]."""
        for at, row in enumerate(self._rows):
            if row.finished or row.plain:
                continue
            token = choose(row, scores[at])
            if row.params.logprobs is not None:
                row.logprobs = token_logprobs(scores[at], token, row.params.logprobs)
            scores[at] = -torch.inf
            scores[at, token] = 0.0
        return scores


def choose(row: SampledRow, raw: torch.Tensor) -> int:
    """The next token of a row from its raw logits, float32 [vocabulary]."""
    params, logits = row.params, raw.clone()
    if params.has_penalties:
        _penalise(logits, row)
    for token, bias in params.logit_bias.items():
        logits[token] += bias
    if params.allowed_token_ids is not None:
        allowed = torch.tensor(params.allowed_token_ids, device=logits.device)
        logits = torch.full_like(logits, -torch.inf).index_copy(0, allowed, logits[allowed])
    if len(row.output) < params.min_tokens and row.end_ids:
        logits[list(row.end_ids)] = -torch.inf
    if params.greedy:
        return int(logits.argmax())
    logits /= params.temperature
    if 0 < params.top_k < len(logits):
        logits[logits < logits.topk(params.top_k).values[-1]] = -torch.inf
    probs = logits.softmax(-1)
    if params.min_p > 0:
        probs[probs < params.min_p * probs.max()] = 0.0
    if params.top_p < 1:
        ordered, order = probs.sort(descending=True)
        # A token stays while those before it have not reached top_p; the likeliest always does.
        beyond = ordered.cumsum(-1) - ordered >= params.top_p * ordered.sum()
        beyond[0] = False
        probs[order[beyond]] = 0.0
    return int(torch.multinomial(probs.cpu(), 1, generator=row.draws))


def _penalise(logits: torch.Tensor, row: SampledRow) -> None:
    params = row.params
    if params.repetition_penalty != 1.0:
        seen = torch.tensor(sorted({*row.prompt, *row.output}), device=logits.device)
        values = logits[seen]
        penalty = params.repetition_penalty
        logits[seen] = torch.where(values > 0, values / penalty, values * penalty)
    if row.output and (params.presence_penalty or params.frequency_penalty):
        tokens, counts = torch.tensor(row.output, device=logits.device).unique(return_counts=True)
        logits[tokens] -= params.presence_penalty + params.frequency_penalty * counts


def token_logprobs(raw: torch.Tensor, token: int, k: int) -> TokenLogprobs:
    """Of the raw distribution, before temperature and penalties."""
    logprobs = raw.log_softmax(-1)
    own = logprobs[token]
    top = logprobs.topk(k) if k else None
    return TokenLogprobs(
        token=token,
        logprob=float(own),
        rank=int((logprobs > own).sum()) + 1,
        top_ids=np.empty(0, np.int32) if top is None else top.indices.cpu().numpy().astype(np.int32),
        top_logprobs=np.empty(0, np.float32) if top is None else top.values.cpu().numpy(),
    )
