"""Rotary embedding and the write of keys and values, in torch.

Rotation of a pair (a, b) is (a cos - b sin, b cos + a sin): x * cos + partner(x) * signed sin over whole heads, where
`partner` swaps the two elements of each pair. The table holds cos and signed sin laid out for that.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from martlet.kernels.reference.attention import AttentionPlan
from martlet.model.rope import rotation_table
from martlet.model.spec import Rope


def rotation(rope: Rope, length: int, device: str) -> torch.Tensor:
    """float32 [2, length, dim]: cos, and sin with the sign it has in the sum above."""
    cos, sin = (torch.from_numpy(table).to(device) for table in rotation_table(rope, length))
    if rope.style == "half":
        return torch.stack([torch.cat([cos, cos], -1), torch.cat([-sin, sin], -1)])
    return torch.stack([cos.repeat_interleave(2, -1), torch.stack([-sin, sin], -1).flatten(-2)])


def partner(x: torch.Tensor, rope: Rope) -> torch.Tensor:
    """x [..., dim] with the elements of each pair swapped."""
    if rope.style == "half":
        return x.roll(rope.dim // 2, -1)
    return x.unflatten(-1, (-1, 2)).flip(-1).flatten(-2)


def rotate_and_write(
    qkv: torch.Tensor, norms: torch.Tensor | None, eps: float, cache: torch.Tensor, plan: AttentionPlan
) -> torch.Tensor:
    spec = plan.spec
    rope, heads, kv_heads = spec.rope, spec.heads, spec.kv_heads
    qkv = qkv.view(-1, heads + 2 * kv_heads, spec.head_dim)
    qk = qkv[:, : heads + kv_heads]
    if norms is not None:
        qk.copy_(F.rms_norm(qk.float(), (spec.head_dim,), None, eps).mul_(norms))
    x = qk[..., : rope.dim]
    x.copy_((x * plan.cos).addcmul_(partner(x, rope), plan.sin))
    tokens = cache.view(-1, 2, kv_heads, spec.head_dim)
    tokens.index_copy_(0, plan.slots, qkv[:, heads:].unflatten(1, (2, kv_heads)))
    return qkv[:, :heads]
