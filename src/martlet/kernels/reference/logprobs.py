"""Log-probabilities of the raw distribution, in torch."""

from __future__ import annotations

import torch


def logprobs(
    logits: torch.Tensor, tokens: torch.Tensor, k: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    total = logits.logsumexp(-1, keepdim=True)
    chosen = logits.gather(-1, tokens[:, None])
    rank = (logits > chosen).sum(-1) + 1
    top, ids = logits.topk(min(k, logits.shape[-1]), dim=-1)
    return (chosen - total).squeeze(-1), rank, ids, top - total
