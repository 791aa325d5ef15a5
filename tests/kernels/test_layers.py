"""Linears, norms, activations, embedding and log-probabilities against float64 formulae."""

import math

import pytest
import torch

from martlet.kernels import ops_for
from martlet.model.spec import FeedForward

OPS = ops_for("cpu")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize(("rows", "width", "out"), [(1, 576, 960), (3, 33, 1), (17, 1, 5), (130, 48, 97)])
def test_linear(dtype, biased, rows, width, out):
    x, matrix = torch.randn(rows, width).to(dtype), (torch.randn(out, width) / math.sqrt(width)).to(dtype)
    bias = torch.randn(out).to(dtype) if biased else None
    found = OPS.linear(x, OPS.pack(matrix, bias))
    want = x.double() @ matrix.double().T + (0 if bias is None else bias.double())
    assert found.dtype == dtype and found.shape == (rows, out)
    close = {torch.float32: 1e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3}[dtype]
    torch.testing.assert_close(found.double(), want, atol=close, rtol=close)
    assert OPS.logits(x, OPS.pack(matrix, bias)).dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_norms(dtype):
    x, residual = (torch.randn(5, 96) * 3).to(dtype), torch.randn(5, 96).to(dtype)
    weight = (torch.rand(96) + 0.5).to(dtype)

    def oracle(y: torch.Tensor) -> torch.Tensor:
        y = y.double()
        return y / (y.square().mean(-1, keepdim=True) + 1e-3).sqrt() * weight.double()

    close = 1e-5 if dtype == torch.float32 else 3e-2
    torch.testing.assert_close(OPS.rms_norm(x, weight, 1e-3).double(), oracle(x), atol=close, rtol=close)
    total = x + residual
    normed, carried = OPS.add_rms_norm(x, residual, weight, 1e-3)
    torch.testing.assert_close(carried, total)
    torch.testing.assert_close(normed.double(), oracle(total), atol=close, rtol=close)


@pytest.mark.parametrize("kind", ["silu", "gelu_tanh", "gelu"])
@pytest.mark.parametrize("gated", [True, False])
def test_activation(kind, gated):
    x = torch.randn(4, 2 * 21)
    y = x.double()
    gate, up = (y[:, :21], y[:, 21:]) if gated else (y, 1.0)
    tanh = (2 / math.pi) ** 0.5 * (gate + 0.044715 * gate**3)
    acts = {
        "silu": gate / (1 + (-gate).exp()),
        "gelu_tanh": 0.5 * gate * (1 + tanh.tanh()),
        "gelu": 0.5 * gate * (1 + (gate / 2**0.5).erf()),
    }
    found = OPS.activation(x, FeedForward(21, kind, gated))
    torch.testing.assert_close(found.double(), acts[kind] * up, atol=1e-5, rtol=1e-5)


def test_embedding():
    table = torch.randn(11, 4)
    assert torch.equal(OPS.embedding(torch.tensor([3, 0, 3]), table), table[[3, 0, 3]])


def test_logprobs():
    logits = torch.tensor([[0.0, 2.0, 1.0, -1.0, 2.0], [5.0, 5.0, 5.0, 5.0, 5.0]])
    before = logits.clone()
    logprob, rank, ids, top = OPS.logprobs(logits, torch.tensor([2, 4]), 3)
    want = logits.double().log_softmax(-1)
    torch.testing.assert_close(logprob.double(), want[[0, 1], [2, 4]])
    assert rank.tolist() == [3, 1]
    assert sorted(ids[0, :2].tolist()) == [1, 4] and ids[0, 2] == 2
    torch.testing.assert_close(top.double(), want.gather(-1, ids))
    assert torch.equal(logits, before)
    assert [t.shape[-1] for t in OPS.logprobs(logits, torch.tensor([2, 4]), 0)[2:]] == [0, 0]
    assert OPS.logprobs(logits, torch.tensor([2, 4]), 20)[2].shape == (2, 5)
