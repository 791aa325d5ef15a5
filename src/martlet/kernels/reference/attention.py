"""Paged attention over a whole batch in torch: no loop over sequences or blocks, only over a few groups of sequences.

A group is padded to one query and one key length, its pages are gathered into a dense [B, L, 2, kv_heads, head_dim] and
attended in one call. Heads that share keys stand along the query axis, so nothing is repeated. Groups hold sequences of
like length, and are cut so that neither the gather nor the mask outgrows a fixed size. All of it is planned once a
step, in numpy, and shared by the layers.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

from martlet.kernels.ops import Layout
from martlet.model.spec import Attention

MASK_ELEMENTS = 1 << 23  # most elements of a group's mask (16 MiB in bfloat16)
GATHER_ELEMENTS = 1 << 24  # most elements of a group's gathered keys and values (32 MiB in bfloat16)
WASTE = 1.5  # decoding sequences stay in one group while padding costs at most this factor,
FREE_KEYS = 1024  # and this many keys, which take about as long as one more group would


@dataclass(frozen=True, slots=True)
class Group:
    """B sequences with T queries each over L = P * block_size keys.

    pages: int64 [B * P]. mask: [B, 1, T * heads / kv_heads, L] to add to the scores. queries, results: int64 [B * T],
    which tokens of the step are its queries and where their results go (padding: any token, and row N); None when the
    group is the whole step in order.
    """

    size: int
    pages: torch.Tensor
    mask: torch.Tensor
    queries: torch.Tensor | None
    results: torch.Tensor | None


@dataclass(frozen=True, slots=True)
class AttentionPlan:
    """cos, sin: float32 [N, 1, rope.dim]. slots: int64 [N]."""

    spec: Attention
    cos: torch.Tensor
    sin: torch.Tensor
    slots: torch.Tensor
    groups: tuple[Group, ...]


def plan(layout: Layout, spec: Attention, rotation: torch.Tensor, dtype: torch.dtype) -> AttentionPlan:
    device = rotation.device
    cos, sin = rotation.index_select(1, _to(layout.positions, device)).unsqueeze(2)
    groups = tuple(_group(layout, spec, *pieces, dtype, device) for pieces in _pieces(layout, spec))
    return AttentionPlan(spec, cos, sin, _to(layout.slots, device), groups)


def paged_attention(q: torch.Tensor, cache: torch.Tensor, plan: AttentionPlan) -> torch.Tensor:
    spec, total = plan.spec, len(q)
    out = None
    for group in plan.groups:
        result = _attend(q if group.queries is None else q.index_select(0, group.queries), cache, spec, group)
        if group.results is None:
            return result
        if out is None:  # one row more than tokens: padding goes there
            out = result.new_empty(total + 1, spec.q_size)
        out.index_copy_(0, group.results, result)
    assert out is not None
    return out[:total]


def copy_blocks(cache: torch.Tensor, source: torch.Tensor, target: torch.Tensor) -> None:
    cache.index_copy_(0, target, cache.index_select(0, source))


def _attend(q: torch.Tensor, cache: torch.Tensor, spec: Attention, group: Group) -> torch.Tensor:
    """q [B * T, heads, head_dim] of one group -> [B * T, heads * head_dim]."""
    size, shared = group.size, spec.heads // spec.kv_heads
    keys, values = cache.index_select(0, group.pages).view(size, -1, 2, spec.kv_heads, spec.head_dim).unbind(2)
    q = q.view(size, -1, spec.kv_heads, shared, spec.head_dim).transpose(1, 2).flatten(2, 3)
    keys, values = keys.transpose(1, 2), values.transpose(1, 2)
    if spec.softcap is None:
        out = F.scaled_dot_product_attention(q, keys, values, attn_mask=group.mask, scale=spec.scale)
    else:
        scores = (q @ keys.mT).float().mul_(spec.scale / spec.softcap).tanh_().mul_(spec.softcap)
        out = scores.add_(group.mask).softmax(-1).to(q.dtype) @ values
    return out.unflatten(2, (-1, shared)).transpose(1, 2).reshape(-1, spec.q_size)


def _pieces(layout: Layout, spec: Attention) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """The step cut into groups of pieces: (sequence, first query, queries), each int64 [B].

    A piece is a sequence's queries of this step, or a part of them where the whole would outgrow the mask.
    """
    shared = spec.heads // spec.kv_heads
    keys = _keys(layout.start, layout.count, spec.window, layout.block_size)
    most = np.maximum(MASK_ELEMENTS // (shared * keys), 1)
    parts = -(-layout.count // most)
    sequence = np.repeat(np.arange(len(parts)), parts)
    number = np.arange(len(sequence)) - np.repeat(np.cumsum(parts) - parts, parts)
    first = number * most[sequence]
    queries = np.minimum(most[sequence], layout.count[sequence] - first)
    keys = _keys(layout.start[sequence] + first, queries, spec.window, layout.block_size)

    if queries.max() == 1 and len(keys) * keys.max() <= WASTE * keys.sum() + FREE_KEYS:
        bucket = np.zeros(len(keys), np.int64)
    else:  # like lengths together: at most a factor of two apart in queries and in keys
        bucket = np.ceil(np.log2(queries)).astype(np.int64) * 64 + np.ceil(np.log2(keys)).astype(np.int64)
    groups = []
    for kind in np.unique(bucket):
        members = np.flatnonzero(bucket == kind)
        longest = keys[members].max()
        mask = shared * queries[members].max() * longest
        room = max(1, min(MASK_ELEMENTS // mask, GATHER_ELEMENTS // (2 * spec.kv_size * longest)))
        for cut in range(0, len(members), room):
            chosen = members[cut : cut + room]
            groups.append((sequence[chosen], first[chosen], queries[chosen]))
    return groups


def _first_block(start: np.ndarray, window: int | None, block_size: int) -> np.ndarray:
    """The first block that a query at position `start` can see."""
    return np.zeros_like(start) if window is None else np.maximum(start - window + 1, 0) // block_size


def _keys(start: np.ndarray, queries: np.ndarray, window: int | None, block_size: int) -> np.ndarray:
    """Keys, in whole blocks, that `queries` positions from `start` on can see."""
    last = -(-(start + queries) // block_size)
    return (last - _first_block(start, window, block_size)) * block_size


def _group(
    layout: Layout,
    spec: Attention,
    sequence: np.ndarray,
    first: np.ndarray,
    queries: np.ndarray,
    dtype: torch.dtype,
    device: torch.device,
) -> Group:
    start = layout.start[sequence] + first
    begin = _first_block(start, spec.window, layout.block_size)
    used = _keys(start, queries, spec.window, layout.block_size) // layout.block_size
    # Padding repeats the sequence's own first page, so that nothing of another sequence is ever read.
    page = np.arange(used.max())
    page = np.where(page < used[:, None], page, 0) + begin[:, None]
    pages = np.take_along_axis(layout.blocks[sequence], page, axis=1).reshape(-1)

    longest = int(queries.max())
    step = np.minimum(np.arange(longest), queries[:, None] - 1)  # [B, T], padding repeats the last query
    position = _to((start[:, None] + step)[:, None, :, None, None], device)
    key = _to(np.arange(used.max() * layout.block_size) + (begin * layout.block_size)[:, None], device)
    key = key[:, None, None, None, :]
    hidden = key > position
    if spec.window is not None:
        hidden |= key <= position - spec.window
    shared = spec.heads // spec.kv_heads
    hidden = hidden.expand(-1, -1, -1, shared, -1).flatten(2, 3)
    mask = torch.zeros(hidden.shape, dtype=dtype, device=device).masked_fill_(hidden, float("-inf"))

    total = len(layout.positions)
    token = (np.cumsum(layout.count) - layout.count)[sequence][:, None] + first[:, None] + step
    if token.size == total and np.array_equal(token.reshape(-1), np.arange(total)):
        return Group(len(sequence), _to(pages, device), mask, None, None)
    result = np.where(np.arange(longest) < queries[:, None], token, total)
    return Group(
        len(sequence), _to(pages, device), mask, _to(token.reshape(-1), device), _to(result.reshape(-1), device)
    )


def _to(array: np.ndarray, device: torch.device) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(array, dtype=np.int64)).to(device)
