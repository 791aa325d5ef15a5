"""Linears of every weight format against dequantise-then-multiply, on odd shapes and every instruction set."""

from __future__ import annotations

import functools
from dataclasses import replace

import numpy as np
import pytest
from cpu_oracle import BLOCK_TYPES, HERE, INT4_SIZES, as_prepared, bf16, random_blocks, random_int4, run_linear

from martlet.hub.quantised.blocks import rows_with_scale
from martlet.kernels.cpu.library import Executor
from martlet.kernels.cpu.program import Format
from martlet.runners.cpu_runner.packing import Packer

ROWS = (1, 2, 3, 5, 6, 7, 12, 13, 16, 41, 300)


@functools.cache
def executor(isa: str) -> Executor:
    return Executor(2, isa=isa)


def weights(rng, form: Format, n: int, k: int):
    """(tensor to pack, the values it stands for as float32)."""
    if form in BLOCK_TYPES:
        blocks = random_blocks(rng, form, n, k)
        return blocks, blocks.dequantise()
    if form in INT4_SIZES:
        blocks = random_int4(rng, form, n, k)
        return blocks, blocks.dequantise()
    w = rng.normal(0, 0.05, (n, k)).astype(np.float32)
    if form == Format.BF16:
        return w, bf16(w)
    if form == Format.INT8:
        scale = np.abs(w).max(1, keepdims=True) / np.float32(127)
        return w, np.rint(w / scale) * scale
    return w, w


def close(found: np.ndarray, wanted: np.ndarray, *, scale: float = 1.0) -> None:
    # one of the 15-bit activations may round either way
    assert np.abs(found - wanted).max() <= 2e-5 * scale * max(1.0, np.abs(wanted).max())


@pytest.mark.parametrize("isa", HERE)
@pytest.mark.parametrize("form", [f for f in Format if f not in (Format.F16, Format.SCREEN)], ids=lambda f: f.name)
def test_product(isa, form):
    rng = np.random.default_rng(form)
    run = executor(isa)
    super_blocks = form in (Format.Q4_K, Format.Q5_K, Format.Q6_K, Format.INT4_64, Format.INT4_128)
    shapes = ((32, 256), (70, 768)) if super_blocks else ((32, 64), (70, 160), (33, 576))
    for n, k in (*shapes, (40, 2100)) if form == Format.INT8 else shapes:  # three groups of activations, the last odd
        if form in (Format.F32, Format.BF16, Format.INT8) and n == 70:
            k = 151  # no multiple of any pack
        tensor, values = weights(rng, form, n, k)
        matrix = Packer(run).stack([tensor], form)
        x = rng.normal(0, 1, (300, k)).astype(np.float32)
        wanted = as_prepared(x, form, isa).astype(np.float64) @ values.astype(np.float64).T
        whole = run_linear(run, matrix, x, n)
        size = np.abs(values).max() * k**0.5
        close(whole, wanted, scale=max(1.0, size))
        for m in ROWS:
            part = run_linear(run, matrix, x[:m], n)
            np.testing.assert_array_equal(part, whole[:m], err_msg=f"{form.name} {m} rows differ from 300")


@pytest.mark.parametrize("isa", HERE)
def test_int8_rows_keep_their_scale(isa):
    """A file's own bytes and scale, -128 included: no rounding again."""
    rng = np.random.default_rng(0)
    quants, scale = rng.integers(-128, 128, (40, 96)).astype(np.int8), rng.uniform(0.001, 0.003, 40).astype(np.float32)
    matrix = Packer(executor(isa)).stack([rows_with_scale("int8_row", quants, scale)], Format.INT8)
    x = rng.normal(0, 1, (13, 96)).astype(np.float32)
    close(run_linear(executor(isa), matrix, x, 40), as_prepared(x, Format.INT8, isa) @ (quants * scale[:, None]).T)


@pytest.mark.parametrize("isa", HERE)
@pytest.mark.parametrize("rows", [1, 2, 5, 40])
def test_the_largest_products_of_int8_fit(isa, rows):
    """Equal activations of either sign against the largest weights: two such products nearly fill 16 bits."""
    quants = np.full((40, 128), 127, np.int8)
    quants[1], quants[2] = -127, -128
    x = np.ones((rows, 128), np.float32)
    x[1::3], x[2::3, ::2] = -1, -1
    matrix = Packer(executor(isa)).stack([rows_with_scale("int8_row", quants, np.ones(40, np.float32))], Format.INT8)
    close(run_linear(executor(isa), matrix, x, 40), as_prepared(x, Format.INT8, isa) @ quants.T.astype(np.float64))


@pytest.mark.parametrize("isa", HERE)
def test_inputs_in_another_order(isa):
    rng = np.random.default_rng(0)
    run, order = executor(isa), rng.permutation(256).astype(np.int32)
    blocks = random_int4(rng, Format.INT4_64, 48, 256)
    sorted_by_group = replace(blocks, order=order)
    matrix = Packer(run).stack([sorted_by_group], Format.INT4_64)
    x, norm = rng.normal(0, 1, (300, 256)).astype(np.float32), rng.normal(1, 0.3, 256).astype(np.float32)
    for rows in (1, 5, 300):
        found = run_linear(run, matrix, x[:rows], 48, norm=norm, eps=1e-5, order=order)
        normed = x[:rows] / np.sqrt((x[:rows] ** 2).mean(1, keepdims=True) + 1e-5) * norm
        prepared, values = as_prepared(normed[:, order], Format.INT4_64, isa), sorted_by_group.dequantise()
        close(found, prepared @ values[:, order].T, scale=3)


@pytest.mark.parametrize("form", [Format.INT8, *BLOCK_TYPES], ids=lambda f: f.name)
def test_instruction_sets_agree_to_the_bit(form):
    """Sums of integers are exact and what follows is the same, wherever a multiply and an add are one operation.

    With tiles, int8 weights meet longer activations, and on AVX2 pairs.
    """
    rng = np.random.default_rng(form)
    tensor, _ = weights(rng, form, 70, 768)
    x = rng.normal(0, 1, (45, 768)).astype(np.float32)
    other = ("generic", "avx2", "amx") if form == Format.INT8 else ("generic",)
    fused = [isa for isa in HERE if isa not in other] or HERE[-1:]
    found = [run_linear(executor(isa), Packer(executor(isa)).stack([tensor], form), x, 70) for isa in fused]
    for isa, y in zip(fused, found, strict=True):
        np.testing.assert_array_equal(y, found[0], err_msg=f"{isa} differs from {fused[0]}")
