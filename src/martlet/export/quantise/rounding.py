"""Rounding a matrix to few bits: to the nearest (rtn), or so that its products stay (gptq, awq).

What a layer's inputs are like is told by their Gram matrix G = X^T X / rows: an error D of a matrix changes its
products by tr(D G D^T) in the mean square.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

DAMP = 0.01  # of the mean of G's diagonal, added to it so that it can be inverted
STRENGTHS = 20  # exponents that awq tries between 0 and 1
CLIPS = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.65, 0.6)  # parts of a group's range that are tried


@dataclass(frozen=True, slots=True)
class Grid:
    """bits a weight; group: inputs that share a scale, at most the whole row. symmetric: the zero is in the middle."""

    bits: int
    group: int
    symmetric: bool = True

    @property
    def most(self) -> int:
        return (1 << self.bits) - 1

    def fit(self, w: torch.Tensor, clip: torch.Tensor | float = 1.0) -> tuple[torch.Tensor, torch.Tensor]:
        """(scale, zero) [...] for w [..., inputs of a group]; scales are float16 numbers, as files keep them."""
        low, high = w.amin(-1).clamp(max=0) * clip, w.amax(-1).clamp(min=0) * clip
        if self.symmetric:
            high = torch.maximum(-low, high)
            low = -high
        scale = ((high - low) / self.most).clamp(min=1e-7).half().float()
        if self.symmetric:
            return scale, torch.full_like(scale, (self.most + 1) // 2)
        return scale, (-low / scale).round().clamp(0, self.most)

    def round(self, w: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor) -> torch.Tensor:
        """Quants of w, as floats."""
        return ((w / scale).round() + zero).clamp(0, self.most)


@dataclass(frozen=True, slots=True)
class Rounded:
    """quants: uint8 [out, in]. scales, zeros: float32 [out, groups]. group_of: int64 [in]."""

    quants: torch.Tensor
    scales: torch.Tensor
    zeros: torch.Tensor
    group_of: torch.Tensor

    def values(self) -> torch.Tensor:
        return (self.quants.float() - self.zeros[:, self.group_of]) * self.scales[:, self.group_of]


def rtn(w: torch.Tensor, grid: Grid, clip: torch.Tensor | float = 1.0) -> Rounded:
    """w [out, in] to the nearest. clip: of each group's range, [out, groups] or a number."""
    groups = _grouped(w, grid)
    scale, zero = grid.fit(groups, clip)
    quants = grid.round(groups, scale[..., None], zero[..., None]).flatten(1)
    return Rounded(quants.to(torch.uint8), scale, zero, torch.arange(w.shape[1], device=w.device) // grid.group)


def gptq(w: torch.Tensor, gram: torch.Tensor, grid: Grid, *, act_order: bool = False) -> Rounded:
    """Column by column, what a column loses is made up for by those behind it (Frantar et al., arXiv 2210.17323).

    Each group's grid is fitted to what its columns have become when their turn comes, over the part of their range that
    loses least. act_order: columns that matter most come first. Groups are those of the matrix as it lies, fitted
    before, so that a group's columns stay together.
    """
    w, gram = w.clone(), gram.clone()
    dead = gram.diagonal() == 0
    gram[dead, dead] = 1
    w[:, dead] = 0
    columns = w.shape[1]
    group_of = torch.arange(columns, device=w.device) // grid.group
    order = torch.argsort(gram.diagonal(), descending=True) if act_order else torch.arange(columns, device=w.device)
    fitted = grid.fit(_grouped(w, grid), best_clip(w, gram, grid)) if act_order else None
    w, gram = w[:, order], gram[order][:, order]
    gram.diagonal().add_(DAMP * gram.diagonal().mean())
    inverse = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(gram)), upper=True)
    quants = torch.empty_like(w)
    scales = w.new_empty(len(w), columns // grid.group)
    zeros = torch.empty_like(scales)
    if fitted is not None:
        scales, zeros = fitted
    for begin in range(0, columns, grid.group):
        block, errors = slice(begin, begin + grid.group), w.new_empty(len(w), grid.group)
        part, share = w[:, block], inverse[block, block]
        if fitted is None:
            best = best_clip(part, gram[block, block], grid)[:, 0]
            scales[:, begin // grid.group], zeros[:, begin // grid.group] = grid.fit(part, best)
        for i in range(grid.group):
            group = group_of[order[begin + i]]
            scale, zero = scales[:, group], zeros[:, group]
            quants[:, begin + i] = grid.round(part[:, i], scale, zero)
            lost = (part[:, i] - (quants[:, begin + i] - zero) * scale) / share[i, i]
            part[:, i + 1 :] -= lost[:, None] * share[i, i + 1 :]
            errors[:, i] = lost
        w[:, block.stop :] -= errors @ inverse[block, block.stop :]
    there = torch.empty_like(quants)
    there[:, order] = quants
    return Rounded(there.to(torch.uint8), scales, zeros, group_of)


def awq_scale(matrices: list[torch.Tensor], gram: torch.Tensor, grid: Grid) -> torch.Tensor:
    """What to multiply the inputs of `matrices` with, float32 [in] (Lin et al., arXiv 2306.00978).

    Weights of large inputs are made larger, so that rounding costs them less, by the power of the inputs' size that
    loses least over all the matrices; all ones are among what is tried.
    """
    size = gram.diagonal().sqrt().clamp(min=1e-8)
    best, least = torch.ones_like(size), torch.inf
    for strength in range(STRENGTHS):
        scale = size.pow(strength / STRENGTHS).clamp(min=1e-4)
        scale = scale / (scale.max() * scale.min()).sqrt()
        lost = sum(loss(rtn(w * scale, grid).values() / scale - w, gram) for w in matrices)
        if lost < least:
            best, least = scale, lost
    return best


def best_clip(w: torch.Tensor, gram: torch.Tensor, grid: Grid) -> torch.Tensor:
    """Which part of its range each group of w is to be rounded over so that least is lost, float32 [out, groups]."""
    groups = _grouped(w, grid)
    count = groups.shape[1]
    here = torch.arange(count, device=w.device)
    own = gram.view(count, grid.group, count, grid.group)[here, :, here]  # [groups, group, group]
    best = torch.ones(groups.shape[:2], device=w.device)
    least = torch.full_like(best, torch.inf)
    for part in CLIPS:
        error = (rtn(w, grid, part).values() - w).view_as(groups)
        lost = (torch.einsum("ogi,gij->ogj", error, own) * error).sum(-1)
        best = torch.where(lost < least, part, best)
        least = torch.minimum(lost, least)
    return best


def loss(error: torch.Tensor, gram: torch.Tensor) -> float:
    """Mean square change of the products, summed over the outputs."""
    return ((error @ gram) * error).sum().item()


def _grouped(w: torch.Tensor, grid: Grid) -> torch.Tensor:
    """[out, in] -> [out, groups, inputs of a group]."""
    return w.view(len(w), -1, grid.group)
