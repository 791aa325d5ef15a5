"""What LoRA adapters add to a linear layer."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from martlet.kernels.ops import LoraPart


def lora(x: torch.Tensor, y: torch.Tensor, groups: Sequence[tuple[torch.Tensor, Sequence[LoraPart]]]) -> None:
    for tokens, parts in groups:
        if not parts:
            continue
        rows = x.index_select(0, tokens)
        for part in parts:
            columns = y[:, part.column : part.column + len(part.b)]
            columns.index_add_(0, tokens, (rows @ part.a.T) @ part.b.T)
