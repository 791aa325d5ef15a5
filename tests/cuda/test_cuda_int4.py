"""Products with four-bit weights against unpacked ones, for odd shapes and every size of group."""

import numpy as np
import pytest
import torch
from cases import DEVICE, OPS, close

from martlet.kernels.cuda import int4, linear
from martlet.model.spec import FeedForward


def made(n: int, k: int, size: int, bias: bool = False) -> tuple[linear.Linear, torch.Tensor]:
    """(int4 weights, the matrix they stand for)"""
    rng = np.random.default_rng(n + k)
    quants = rng.integers(0, 16, (n, k))
    scales, zeros = rng.uniform(0.5, 1.5, (n, k // size)).astype(np.float16), rng.integers(0, 17, (n, k // size))
    words = (quants.reshape(n, -1, 8) << (4 * np.arange(8))).sum(-1).astype(np.uint32).view(np.int32)
    values = (quants - zeros.repeat(size, 1)) * scales.repeat(size, 1).astype(np.float32)
    small = (torch.from_numpy(array).to(DEVICE) for array in (scales, zeros.astype(np.uint8)))
    groups = int4.Groups(size, *small)
    held = torch.randn(n, device=DEVICE) if bias else None
    return linear.Linear(torch.from_numpy(words).to(DEVICE), held, int4=groups), torch.from_numpy(
        values.astype(np.float32)
    ).to(DEVICE)


@pytest.mark.parametrize("size", [32, 64, 128])
@pytest.mark.parametrize("gated", [False, True])
def test_one_row(gated, size):
    n, k = 21, 640
    weight, matrix = made(2 * n if gated else n, k, size, bias=True)
    torch.manual_seed(0)
    x, gain, residual = (torch.randn(*shape, device=DEVICE) for shape in ((1, k), (k,), (1, n)))
    got = linear.linear(
        x, weight, gain=gain, eps=1e-5, activation="silu" if gated else "", gated=gated, residual=residual
    )
    want = OPS.rms_norm(x, gain, 1e-5) @ matrix.T + weight.bias
    want = residual + (OPS.activation(want, FeedForward(n)) if gated else want)
    assert close(got, want)


@pytest.mark.parametrize(("rows", "n", "k", "size"), [(2, 40, 64, 32), (17, 70, 256, 128), (70, 33, 192, 64)])
@pytest.mark.parametrize("bias", [False, True])
def test_rows(rows, n, k, size, bias):
    weight, matrix = made(n, k, size, bias)
    torch.manual_seed(0)
    x = torch.randn(rows, k, device=DEVICE)
    want = x @ matrix.T + (weight.bias if bias else 0)
    assert close(linear.product(x, weight, x.dtype), want)
    out = torch.empty(rows, n, device=DEVICE)
    assert linear.product(x, weight, x.dtype, out=out) is out and close(out, want)


def test_unpacked():
    weight, matrix = made(37, 192, 32)
    assert torch.equal(int4.unpacked(weight.matrix, weight.int4, torch.float32), matrix)
