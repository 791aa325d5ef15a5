"""A mixture of experts in torch: tokens sorted by expert, one product an expert that anybody chose."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from martlet.kernels.reference.layers import Linear, activation, linear
from martlet.model.spec import Experts, FeedForward


def experts(
    x: torch.Tensor, ratings: torch.Tensor, up: Sequence[Linear], down: Sequence[Linear], mlp: FeedForward
) -> torch.Tensor:
    assert mlp.experts is not None
    weights, chosen = route(ratings, mlp.experts)
    order = chosen.flatten().argsort(stable=True)
    counts = torch.bincount(chosen.flatten(), minlength=mlp.experts.count).tolist()
    results = x.new_empty(len(order), x.shape[1])
    begin = 0
    for number, count in enumerate(counts):
        if count:
            pairs = order[begin : begin + count]  # of token and choice: pair // active is the token
            hidden = activation(linear(x.index_select(0, pairs // mlp.experts.active), up[number]), mlp)
            results[pairs] = linear(hidden, down[number])
            begin += count
    mixed = results.view(*chosen.shape, -1).float() * weights.unsqueeze(-1)
    return mixed.sum(1).to(x.dtype)


def route(ratings: torch.Tensor, experts: Experts) -> tuple[torch.Tensor, torch.Tensor]:
    """(weights float32, experts int64), each [N, active], of ratings [N, count]."""
    weights, chosen = ratings.float().softmax(-1).topk(experts.active, dim=-1)
    if experts.renormalise:
        weights = weights / weights.sum(-1, keepdim=True)
    return weights, chosen
