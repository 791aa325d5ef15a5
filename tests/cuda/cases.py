"""Attention problems of odd shapes, held in our layout and in the reference's, for the kernel tests and bench/gpu."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from martlet.kernels.cuda import rotary
from martlet.kernels.ops import Layout
from martlet.kernels.reference import ReferenceOps
from martlet.model.rope import rotation_table
from martlet.model.spec import Attention, Rope, RopeScaling

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
OPS = ReferenceOps()
TOLERANCE = {torch.float32: 3e-6, torch.float16: 2e-3, torch.bfloat16: 1e-2}
BLOCK = 16
EPS = 1e-6

ATTENTIONS = {
    "plain": Attention(4, 4, 64, Rope(1e4, 64), 64**-0.5),
    "grouped, normed": Attention(6, 2, 32, Rope(1e4, 32), 0.2, qk_norm=True),
    "odd head, partly rotated": Attention(5, 1, 40, Rope(1e4, 24, scaling=RopeScaling("linear", 2.0)), 0.2),
    "window, interleaved": Attention(4, 2, 16, Rope(1e4, 16, style="interleaved"), 0.25, window=20),
    "capped, not rotated": Attention(4, 2, 16, Rope(1e4, 0), 1.0, softcap=2.0),
}


def close(got: torch.Tensor, want: torch.Tensor, dtype: torch.dtype | None = None) -> bool:
    """Norm of the error over norm of the reference, within what sums in the dtype (by default got's) may differ by."""
    dtype = dtype or got.dtype
    got, want = got.double().cpu(), want.double().cpu()
    error = (got - want).norm() / want.norm()
    return got.shape == want.shape and bool(error <= TOLERANCE[dtype])


@dataclass
class Case:
    """Sequences with some tokens computed and some to compute, in rows dealt out of order."""

    spec: Attention
    rows: np.ndarray
    start: np.ndarray
    count: np.ndarray
    cache: torch.Tensor  # ours: [2, blocks, K, block_size, D]
    block_table: torch.Tensor
    token_rows: torch.Tensor
    token_positions: torch.Tensor
    qkv: torch.Tensor
    norms: torch.Tensor | None

    def layout(self) -> Layout:
        blocks = self.block_table.cpu().numpy()
        positions = self.token_positions.cpu().numpy().astype(np.int64)
        rows = self.token_rows.cpu().numpy()
        slots = blocks[rows, positions // BLOCK].astype(np.int64) * BLOCK + positions % BLOCK
        return Layout(self.start, self.count, blocks[self.rows], positions, slots, BLOCK)

    def reference_cache(self) -> torch.Tensor:
        """[blocks, block_size, 2, K, D]."""
        return self.cache.permute(1, 3, 0, 2, 4).contiguous()

    def plan(self):
        table = OPS.rotation(self.spec.rope, 256, DEVICE)
        return OPS.plan(self.layout(), self.spec, table, self.cache.dtype)

    def rotate(
        self,
        cache: torch.Tensor | None = None,
        scales: torch.Tensor | None = None,
        out: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(q, cache after the step); `cache` is the case's own unless given."""
        cos, sin = rotation_table(self.spec.rope, 256)
        table = torch.from_numpy(np.concatenate([cos, sin], 1)).to(DEVICE)
        cache = self.cache.clone() if cache is None else cache
        q = rotary.rotate_and_write(
            self.qkv.clone(),
            self.norms,
            EPS,
            table,
            self.token_rows,
            self.token_positions,
            self.block_table,
            cache,
            self.spec,
            scales,
            out,
        )
        return q, cache

    def reference_rotate(self) -> tuple[torch.Tensor, torch.Tensor]:
        cache = self.reference_cache()
        return OPS.rotate_and_write(self.qkv.clone(), self.norms, EPS, cache, self.plan()), cache

    def keys_and_values(self, cache: torch.Tensor, row: int, length: int) -> torch.Tensor:
        """[length, 2, K, D] of a row."""
        pages = cache[:, self.block_table[row].long()]  # [2, P, K, block, D]
        return pages.permute(1, 3, 0, 2, 4).flatten(0, 1)[:length]

    def reference_keys_and_values(self, cache: torch.Tensor, row: int, length: int) -> torch.Tensor:
        return cache[self.block_table[row].long()].flatten(0, 1)[:length]

    def fill(self) -> None:
        self.cache.normal_()

    def sequences(self) -> torch.Tensor:
        offset = np.cumsum(self.count) - self.count
        return torch.from_numpy(np.stack([self.rows, self.start, self.count, offset]).astype(np.int32)).to(DEVICE)


def make_case(name: str, start: list[int], count: list[int], dtype: torch.dtype = torch.float32) -> Case:
    spec = ATTENTIONS[name]
    random = np.random.default_rng(1)
    start, count = np.array(start, np.int64), np.array(count, np.int64)
    size = len(start)
    rows = random.permutation(size).astype(np.int32)
    pages = -(-int((start + count).max()) // BLOCK)
    table = random.permutation(size * pages + 3)[: size * pages].reshape(size, pages).astype(np.int32)
    token_rows = np.repeat(rows, count)
    positions = np.concatenate([np.arange(s, s + c) for s, c in zip(start, count, strict=True)]).astype(np.int32)
    heads = spec.heads + 2 * spec.kv_heads
    norms = torch.randn(spec.heads + spec.kv_heads, spec.head_dim, device=DEVICE) if spec.qk_norm else None
    return Case(
        spec,
        rows,
        start,
        count,
        torch.zeros(2, size * pages + 3, spec.kv_heads, BLOCK, spec.head_dim, dtype=dtype, device=DEVICE),
        torch.from_numpy(table).to(DEVICE),
        torch.from_numpy(token_rows).to(DEVICE),
        torch.from_numpy(positions).to(DEVICE),
        torch.randn(len(positions), heads * spec.head_dim, device=DEVICE).to(dtype),
        norms,
    )


def in_fp8(cache: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(values, scales) of a cache as the FP8 cache keeps it: e4m3, the largest of a token and head at 448."""
    scales = cache.float().abs().amax(-1).clamp(min=1e-30) / 448
    return (cache.float() / scales[..., None]).to(torch.float8_e4m3fn), scales


def from_fp8(values: torch.Tensor, scales: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return (values.float() * scales[..., None]).to(dtype)


def reference_attention(case: Case, q: torch.Tensor) -> torch.Tensor:
    return OPS.paged_attention(q, case.reference_cache(), case.plan())
