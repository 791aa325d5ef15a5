"""Paged attention and the KV write against loops over tokens and heads, in odd shapes."""

import numpy as np
import pytest
import torch

from martlet.kernels import ops_for
from martlet.kernels.ops import Layout
from martlet.kernels.reference import attention as module
from martlet.model.spec import Attention, Rope, RopeScaling

OPS = ops_for("cpu")


def spec(heads: int, kv_heads: int, head_dim: int, window: int | None = None, **rest) -> Attention:
    return Attention(
        heads, kv_heads, head_dim, rest.pop("rope", Rope(10000.0, head_dim)), head_dim**-0.5, window, **rest
    )


def random_layout(rng, start, count, block_size: int, num_blocks: int) -> Layout:
    """Sequences on blocks of their own in random order; entries past a sequence's end point anywhere."""
    start, count = np.array(start, np.int64), np.array(count, np.int64)
    used = -(-(start + count) // block_size)
    blocks = rng.integers(0, num_blocks, (len(start), used.max())).astype(np.int32)
    order = iter(rng.permutation(num_blocks))
    for i, n in enumerate(used):
        blocks[i, :n] = [next(order) for _ in range(n)]
    rows = np.repeat(np.arange(len(start)), count)
    positions = np.concatenate([np.arange(s, s + c) for s, c in zip(start, count, strict=True)])
    slots = blocks[rows, positions // block_size].astype(np.int64) * block_size + positions % block_size
    return Layout(start, count, blocks, positions, slots, block_size)


def oracle(q: np.ndarray, cache: np.ndarray, layout: Layout, attention: Attention) -> np.ndarray:
    out, token = np.zeros((len(q), attention.q_size)), 0
    shared = attention.heads // attention.kv_heads
    for i, (start, count) in enumerate(zip(layout.start, layout.count, strict=True)):
        for position in range(start, start + count):
            first = 0 if attention.window is None else max(0, position - attention.window + 1)
            where = np.arange(first, position + 1)
            kv = cache[layout.blocks[i, where // layout.block_size], where % layout.block_size].astype(np.float64)
            for head in range(attention.heads):
                scores = kv[:, 0, head // shared] @ q[token, head] * attention.scale
                weights = np.exp(scores - scores.max())
                result = weights / weights.sum() @ kv[:, 1, head // shared]
                out[token, head * attention.head_dim : (head + 1) * attention.head_dim] = result
            token += 1
    return out


def check(attention: Attention, start, count, *, block_size=4, num_blocks=40, dtype=torch.float32, seed=0):
    rng = np.random.default_rng(seed)
    layout = random_layout(rng, start, count, block_size, num_blocks)
    shape = (num_blocks, block_size, 2, attention.kv_heads, attention.head_dim)
    cache = torch.from_numpy(rng.standard_normal(shape).astype(np.float32)).to(dtype)
    q_shape = (int(layout.count.sum()), attention.heads, attention.head_dim)
    q = torch.from_numpy(rng.standard_normal(q_shape).astype(np.float32)).to(dtype)
    plan = OPS.plan(layout, attention, OPS.rotation(attention.rope, 200, "cpu"), dtype)
    found = OPS.paged_attention(q, cache, plan)
    assert found.dtype == dtype
    want = oracle(q.double().numpy(), cache.float().numpy(), layout, attention)
    np.testing.assert_allclose(found.float().numpy(), want, atol=1e-5 if dtype == torch.float32 else 2e-2)
    return plan


MIXED = ([0, 17, 3, 40, 0], [5, 1, 9, 1, 1])


@pytest.mark.parametrize(("heads", "kv_heads"), [(2, 2), (3, 1), (9, 3), (5, 1), (7, 1), (14, 2), (8, 1)])
@pytest.mark.parametrize("head_dim", [32, 80, 256])
def test_every_ratio_and_head_size(heads, kv_heads, head_dim):
    check(spec(heads, kv_heads, head_dim), *MIXED)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("window", [None, 1, 5, 4, 200])
def test_windows_and_dtypes(window, dtype):
    check(spec(6, 2, 64, window), *MIXED, dtype=dtype)


@pytest.mark.parametrize("length", [1, 3, 4, 5, 8, 15, 16, 17])
def test_block_boundaries(length):
    check(spec(3, 1, 32), [0, length - 1, length], [length, 1, 1])
    check(spec(3, 1, 32, 4), [0, length - 1, length], [length, 1, 1])
    check(spec(3, 1, 32), [length], [length])


def test_decoding_sequences_of_very_different_length(monkeypatch):
    monkeypatch.setattr(module, "FREE_KEYS", 0)
    start = [0, 1, 2, 4, 9, 150, 70, 33]
    plan = check(spec(4, 2, 32), start, [1] * 8, num_blocks=100)
    assert 1 < len(plan.groups) < 8
    plan = check(spec(4, 2, 32), [30, 31, 28, 24], [1] * 4)
    assert len(plan.groups) == 1 and plan.groups[0].queries is None


@pytest.mark.parametrize("window", [None, 6])
@pytest.mark.parametrize(("mask", "gather"), [(100, 1 << 24), (1 << 23, 1500), (300, 3000), (1, 1)])
def test_groups_are_cut_to_bound_memory(monkeypatch, mask, gather, window):
    monkeypatch.setattr(module, "MASK_ELEMENTS", mask)
    monkeypatch.setattr(module, "GATHER_ELEMENTS", gather)
    whole = check(spec(6, 2, 32, window), [0, 17, 3, 40, 0, 12, 14], [25, 1, 9, 1, 1, 8, 8])
    for group in whole.groups:
        size, _, queries, keys = group.mask.shape
        assert group.mask.numel() <= mask or (queries == 3 and size == 1)
        assert size == 1 or size * keys * 2 * 64 <= gather


def test_stale_memory_of_others_is_never_read():
    """Blocks of other sequences may hold NaN; only a sequence's own blocks count."""
    rng = np.random.default_rng(0)
    attention = spec(3, 1, 32)
    layout = random_layout(rng, [5, 30], [1, 3], 4, 20)
    cache = torch.zeros(20, 4, 2, 1, 32)
    own = np.concatenate([layout.blocks[0, :2], layout.blocks[1, :9]])
    cache[np.setdiff1d(np.arange(20), own)] = float("nan")
    plan = OPS.plan(layout, attention, OPS.rotation(attention.rope, 64, "cpu"), torch.float32)
    assert torch.isfinite(OPS.paged_attention(torch.randn(4, 3, 32), cache, plan)).all()


ROPES = [
    Rope(10000.0, 32),
    Rope(500.0, 16),
    Rope(10000.0, 32, "interleaved"),
    Rope(10000.0, 8, "interleaved"),
    Rope(100.0, 32, scaling=RopeScaling("linear", 4.0)),
]


@pytest.mark.parametrize("rope", ROPES, ids=str)
@pytest.mark.parametrize("normed", [False, True])
def test_rotate_and_write(rope, normed):
    rng = np.random.default_rng(1)
    attention = spec(6, 2, 32, rope=rope, qk_norm=normed)
    layout = random_layout(rng, [0, 9], [5, 2], 4, 12)
    rotation = OPS.rotation(rope, 64, "cpu")
    plan = OPS.plan(layout, attention, rotation, torch.float32)
    qkv = torch.randn(7, 10 * 32)
    norms = torch.rand(8, 32) + 0.5 if normed else None
    cache = torch.zeros(12, 4, 2, 2, 32)

    x = qkv.double().view(7, 10, 32).clone()
    if norms is not None:
        scale = (x[:, :8].square().mean(-1, keepdim=True) + 1e-5).rsqrt()
        x[:, :8] *= scale * norms
    for token, position in enumerate(layout.positions):
        for pair in range(rope.dim // 2):
            a, b = (pair, pair + rope.dim // 2) if rope.style == "half" else (2 * pair, 2 * pair + 1)
            angle = position * rope.base ** (-2 * pair / rope.dim) / (rope.scaling.factor if rope.scaling else 1)
            first, second = x[token, :8, a].clone(), x[token, :8, b].clone()
            x[token, :8, a] = first * np.cos(angle) - second * np.sin(angle)
            x[token, :8, b] = second * np.cos(angle) + first * np.sin(angle)

    q = OPS.rotate_and_write(qkv.clone(), norms, 1e-5, cache, plan)
    torch.testing.assert_close(q.double(), x[:, :6], atol=2e-5, rtol=1e-5)
    written = cache.view(48, 2, 2, 32)[layout.slots]
    torch.testing.assert_close(written.double(), x[:, 6:].view(7, 2, 2, 32), atol=2e-5, rtol=1e-5)
    assert cache.view(48, -1).any(-1).sum() == 7


def test_copy_blocks_reads_before_it_writes():
    cache = torch.arange(6.0)[:, None, None, None, None].expand(6, 2, 2, 1, 3).clone()
    OPS.copy_blocks(cache, torch.tensor([0, 1, 1]), torch.tensor([1, 2, 5]))
    assert cache[:, 0, 0, 0, 0].tolist() == [0, 0, 1, 3, 4, 1]
