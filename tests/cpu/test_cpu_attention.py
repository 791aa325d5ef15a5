"""Rotation, cache and paged attention against plain numpy: odd head ratios and sizes, windows, long contexts."""

from __future__ import annotations

import functools
import itertools

import ml_dtypes
import numpy as np
import pytest
from cpu_oracle import HERE, Rows

from martlet.kernels.cpu import program as c
from martlet.kernels.cpu.library import Executor
from martlet.kernels.cpu.program import CacheKind
from martlet.model.rope import inverse_frequencies
from martlet.model.spec import Rope


@functools.cache
def executor(isa: str) -> Executor:
    return Executor(2, isa=isa)


class Layer:
    """One attention layer with its cache, run step by step; blocks of a row are scattered over the cache."""

    def __init__(self, executor, heads, kv_heads, dim, *, rows=2, longest=256, cache=CacheKind.F32, window=0,
                 rotary=None, interleaved=False, norms=None, block_size=16):  # fmt: skip
        self.executor, self.heads, self.kv_heads, self.dim = executor, heads, kv_heads, dim
        per_row = -(-longest // block_size)
        blocks = np.random.default_rng(1).permutation(rows * per_row).astype(np.int32).reshape(rows, per_row)
        self.rows = Rows(np.zeros((rows, 1), np.int32), blocks, np.zeros(rows, c.SAMPLING), block_size)
        size = kv_heads * block_size * cache.bytes_per_token(dim)
        # Whatever an earlier owner left in a block must not be seen.
        self.k, self.v = (np.full((rows * per_row, size), 0xFF, np.uint8) for _ in range(2))
        self.frequencies = inverse_frequencies(Rope(10000.0, rotary or dim))
        self.norms = norms
        self.op = c.AttentionOp(
            k_cache=self.k.ctypes.data, v_cache=self.v.ctypes.data, heads=heads, kv_heads=kv_heads, dim=dim,
            rotary=rotary or dim, interleaved=interleaved, window=window, cache=cache, scale=dim**-0.5, eps=1e-6,
            q_norm=norms[0].ctypes.data if norms else None, k_norm=norms[1].ctypes.data if norms else None,
        )  # fmt: skip

    def step(self, qkv: np.ndarray, rows, start, count) -> np.ndarray:
        n, half = len(qkv), self.op.rotary // 2
        y = np.zeros((n, self.heads * self.dim), np.float32)
        cosines, sines = np.zeros((2, n, half), np.float32)
        op = self.op
        op.qkv, op.y, op.qkv_stride, op.y_stride = qkv.ctypes.data, y.ctypes.data, qkv.shape[1], y.shape[1]
        op.cosines, op.sines = cosines.ctypes.data, sines.ctypes.data
        angles = c.AnglesOp(self.frequencies.ctypes.data, cosines.ctypes.data, sines.ctypes.data, half, 1.0)
        batch, *_ = self.rows.batch(rows, start, count)
        self.executor.run(c.Program([angles, op]), batch)
        return y

    def wanted(self, qkv: np.ndarray) -> np.ndarray:
        """The same for one whole sequence, in float64."""
        n, heads, kv, dim = len(qkv), self.heads, self.kv_heads, self.dim
        x = qkv.astype(np.float64).reshape(n, heads + 2 * kv, dim)
        q, k, v = x[:, :heads], x[:, heads : heads + kv], x[:, heads + kv :]
        if self.norms:
            q, k = (
                t / np.sqrt((t * t).mean(-1, keepdims=True) + 1e-6) * w for t, w in zip((q, k), self.norms, strict=True)
            )
        q, k = (self._rotated(t) for t in (q, k))
        scores = np.einsum("qkgd,tkd->kgqt", q.reshape(n, kv, heads // kv, dim), k) * dim**-0.5
        seen = np.tril(np.ones((n, n), bool))
        if self.op.window:
            seen &= ~np.tril(np.ones((n, n), bool), -self.op.window)
        scores = np.where(seen, scores, -np.inf)
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        weights /= weights.sum(-1, keepdims=True)
        return np.einsum("kgqt,tkd->qkgd", weights, v).reshape(n, heads * dim)

    def _rotated(self, x: np.ndarray) -> np.ndarray:
        half = self.op.rotary // 2
        angle = np.arange(len(x))[:, None, None] * self.frequencies
        cos, sin, out = np.cos(angle), np.sin(angle), x.copy()
        first, second = (slice(0, 2 * half, 2), slice(1, 2 * half, 2)) if self.op.interleaved else (
            slice(0, half), slice(half, 2 * half))  # fmt: skip
        a, b = x[..., first], x[..., second]
        out[..., first], out[..., second] = a * cos - b * sin, b * cos + a * sin
        return out


def inputs(seed: int, n: int, layer: Layer) -> np.ndarray:
    size = (layer.heads + 2 * layer.kv_heads) * layer.dim
    x = np.random.default_rng(seed).normal(0, 1, (n, size)).astype(np.float32)
    return x.astype(ml_dtypes.bfloat16).astype(np.float32)


ERRORS = {CacheKind.F32: 3e-5, CacheKind.BF16: 3e-2, CacheKind.INT8: 6e-2}


def close(found: np.ndarray, wanted: np.ndarray, cache: CacheKind = CacheKind.F32) -> None:
    np.testing.assert_allclose(found, wanted, atol=ERRORS[cache])


@pytest.mark.parametrize("isa", HERE)
@pytest.mark.parametrize(("heads", "kv_heads", "dim"), [(3, 3, 32), (9, 3, 64), (5, 1, 80), (14, 2, 64), (8, 1, 256)])
@pytest.mark.parametrize("cache", CacheKind, ids=lambda kind: kind.name)
def test_steps_of_any_size_give_the_bits_of_one(isa, heads, kv_heads, dim, cache):
    layer = Layer(executor(isa), heads, kv_heads, dim, cache=cache)
    a, b = inputs(1, 150, layer), inputs(2, 131, layer)
    whole = layer.step(a, [0], [0], [150])
    close(whole, layer.wanted(a), cache)

    again = Layer(executor(isa), heads, kv_heads, dim, cache=cache)
    cuts = [0, 1, 2, 17, 60, 127, 128, 129, 131]
    parts = []
    for i, (begin, end) in enumerate(itertools.pairwise(cuts)):  # beside it, another sequence of the same lengths
        beside = [b[begin:end], a[begin:end]] if i % 2 else [a[begin:end], b[begin:end]]
        y = again.step(np.concatenate(beside), [1, 0] if i % 2 else [0, 1], [begin] * 2, [end - begin] * 2)
        parts.append(y[end - begin :] if i % 2 else y[: end - begin])
    np.testing.assert_array_equal(np.concatenate(parts), whole[:131])


@pytest.mark.parametrize("isa", HERE)
@pytest.mark.parametrize("window", [1, 5, 16, 130, 300])
@pytest.mark.parametrize("cache", [CacheKind.F32, CacheKind.INT8], ids=lambda kind: kind.name)
def test_window(isa, window, cache):
    layer = Layer(executor(isa), 4, 2, 32, window=window, longest=320, cache=cache)
    x = inputs(3, 301, layer)
    wanted = layer.wanted(x)
    close(layer.step(x[:290], [0], [0], [290]), wanted[:290], cache)
    for at in range(290, 301):
        close(layer.step(x[at : at + 1], [0], [at], [1]), wanted[at : at + 1], cache)


@pytest.mark.parametrize("isa", HERE)
@pytest.mark.parametrize(("heads", "kv_heads"), [(1, 1), (3, 3), (5, 1), (7, 1), (8, 2)])
@pytest.mark.parametrize("dim", [32, 48, 64, 96, 128, 256])
def test_bytes_in_every_shape(isa, heads, kv_heads, dim):
    """Prompts, a few tokens and single ones: other numbers of rows, of tiles and of columns meet in each."""
    cache = CacheKind.INT8
    layer, parts = (Layer(executor(isa), heads, kv_heads, dim, rows=1, cache=cache) for _ in range(2))
    x = inputs(8, 150, layer)
    whole = layer.step(x, [0], [0], [150])
    close(whole, layer.wanted(x), cache)
    cuts = [0, 95, 96, 98, 102, 128, 149, 150]
    found = [parts.step(x[a:b], [0], [a], [b - a]) for a, b in itertools.pairwise(cuts)]
    np.testing.assert_array_equal(np.concatenate(found), whole)


@pytest.mark.parametrize("isa", HERE)
def test_bytes_hold_values_of_any_size(isa):
    """Each token and head has its own scale: a loud one beside silent ones costs these nothing."""
    layer = Layer(executor(isa), 3, 1, 64, rows=1, cache=CacheKind.INT8)
    x = inputs(9, 40, layer)
    x[:, 192:256] *= 1e-3  # nobody stands out, so all values count alike
    values = np.where(np.arange(40) % 8 == 0, 1e4, 1e-4).astype(np.float32)
    values[3] = 0
    x[:, 256:] *= values[:, None]
    found, wanted = layer.step(x, [0], [0], [40]), layer.wanted(x)
    assert np.abs(found - wanted).max() < 1e-2 * np.abs(wanted).max()


@pytest.mark.parametrize("isa", HERE[-1:])
@pytest.mark.parametrize("context", [1, 127, 128, 129, 4097])
@pytest.mark.parametrize("block_size", [16, 48])
@pytest.mark.parametrize("cache", [CacheKind.F32, CacheKind.INT8], ids=lambda kind: kind.name)
def test_long_contexts(isa, context, block_size, cache):
    layer = Layer(executor(isa), 9, 3, 64, rows=1, longest=4112, block_size=block_size, cache=cache)
    x = inputs(4, context, layer)
    y = layer.step(x, [0], [0], [context])[-1]
    q_only = layer.wanted(x[-200:])[-1] if context <= 200 else _last(layer, x)
    close(y, q_only, cache)


def _last(layer: Layer, x: np.ndarray) -> np.ndarray:
    """The last query of `wanted`, without the square of the context."""
    n, heads, kv, dim = len(x), layer.heads, layer.kv_heads, layer.dim
    t = x.astype(np.float64).reshape(n, heads + 2 * kv, dim)
    q, k, v = layer._rotated(t[:, :heads])[-1], layer._rotated(t[:, heads : heads + kv]), t[:, heads + kv :]
    scores = np.einsum("kgd,tkd->kgt", q.reshape(kv, heads // kv, dim), k) * dim**-0.5
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return np.einsum("kgt,tkd->kgd", weights / weights.sum(-1, keepdims=True), v).reshape(-1)


@pytest.mark.parametrize("isa", HERE)
@pytest.mark.parametrize("interleaved", [False, True])
def test_partial_rotation_and_norms(isa, interleaved):
    rng = np.random.default_rng(5)
    norms = tuple(rng.uniform(0.5, 1.5, 64).astype(np.float32) for _ in range(2))
    layer = Layer(executor(isa), 4, 2, 64, rotary=48, interleaved=interleaved, norms=norms)
    x = inputs(6, 70, layer)
    close(layer.step(x, [0], [0], [70]), layer.wanted(x))


@pytest.mark.parametrize("threads", [1, 3, 8])
def test_threads_change_no_bits(threads):
    several = Executor(threads, cores=2)
    layers = [Layer(run, 9, 3, 64, longest=512) for run in (executor(HERE[-1]), several)]
    x = inputs(7, 401, layers[0])
    first, second = (layer.step(x[:400], [0], [0], [400]) for layer in layers)
    np.testing.assert_array_equal(first, second)
    first, second = (layer.step(x[400:], [0], [400], [1]) for layer in layers)
    np.testing.assert_array_equal(first, second)
    several.close()
