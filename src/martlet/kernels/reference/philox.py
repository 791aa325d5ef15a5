"""martlet.kernels.philox in torch: 32-bit words in int64 tensors, whose products wrap to the right bits."""

from __future__ import annotations

import numpy as np
import torch

from martlet.kernels.philox import KEY_STEPS, MULTIPLIERS, ROUNDS

_LOW = 0xFFFFFFFF


def gumbel(
    seed: np.ndarray, position: np.ndarray, tokens: torch.Tensor | None, vocab: int, device: torch.device
) -> torch.Tensor:
    """Noise float32 [R, C] of tokens int64 [R, C], or [R, vocab] of all when `tokens` is None; seed uint64 [R]."""

    def column(values: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(values.astype(np.int64)).to(device)[:, None]

    key = column(seed & np.uint64(_LOW)), column(seed >> np.uint64(32))
    if tokens is None:
        counter = torch.arange(-(-vocab // 4), device=device).expand(len(seed), -1)
        words = torch.stack(philox4x32(counter, column(position), key), dim=-1).flatten(1)[:, :vocab]
    else:
        words = torch.stack(philox4x32(tokens // 4, column(position), key), dim=-1)
        words = words.gather(-1, (tokens % 4)[..., None]).squeeze(-1)
    return (words >> 9).float().add_(0.5).mul_(2**-23).log_().neg_().log_().neg_()


def philox4x32(
    c0: torch.Tensor, c1: torch.Tensor, key: tuple[torch.Tensor, torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Words of the counter (c0, c1, 0, 0), all int64 of values below 2**32 and broadcast together."""
    k0, k1 = key
    c0, c1 = torch.broadcast_tensors(c0, c1)
    c2 = c3 = torch.zeros_like(c0)
    for _ in range(ROUNDS):
        p0, p1 = c0 * MULTIPLIERS[0], c2 * MULTIPLIERS[1]
        c0, c2 = _next(p1, c1, k0), _next(p0, c3, k1)
        c1, c3 = p1.bitwise_and_(_LOW), p0.bitwise_and_(_LOW)
        k0, k1 = (k0 + KEY_STEPS[0]) & _LOW, (k1 + KEY_STEPS[1]) & _LOW
    return c0, c1, c2, c3


def _next(product: torch.Tensor, word: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    """(high half of product) ^ word ^ key; the shift carries the sign down, the last mask takes it off."""
    return (product >> 32).bitwise_xor_(word).bitwise_xor_(key).bitwise_and_(_LOW)
