"""The head's screen: the same tokens as without it, whatever the weights and inputs, from much less of the head."""

from __future__ import annotations

import functools

import gguf
import numpy as np
import pytest
from cpu_oracle import HERE, Rows
from hypothesis import given, settings
from hypothesis import strategies as st

from martlet.hub.checkpoint import PackedTensor
from martlet.kernels.cpu import program as c
from martlet.kernels.cpu.library import Executor, panel_bytes
from martlet.kernels.cpu.program import PANEL, Format
from martlet.runners.cpu_runner import packing
from martlet.runners.cpu_runner.packing import Packer, Screen

ROWS = 4
FORMATS = (Format.F32, Format.BF16, Format.INT8, Format.Q8_0)


@functools.cache
def executor(isa: str) -> Executor:
    return Executor(2, isa=isa)


def pack(run: Executor, weights: np.ndarray, form: Format) -> c.Matrix:
    if form == Format.Q8_0:
        blocks = gguf.quants.quantize(weights, gguf.GGMLQuantizationType.Q8_0)
        weights = PackedTensor("q8_0", weights.shape, blocks, lambda raw: raw)
    return Packer(run).stack([weights], form)


def screen_of(run: Executor, head: c.Matrix) -> np.ndarray:
    out = np.zeros(-(-head.n // PANEL) * panel_bytes(Format.SCREEN, head.k), np.uint8)
    run.screen(head, out)
    return out


def likeliest(run: Executor, head: c.Matrix, x: np.ndarray, screen: np.ndarray | None = None, masks=None) -> list[int]:
    """The greedy token of each row of x [R, K]. masks: uint32 [R, panels], bits of what each chooses among."""
    n = len(x)
    sampling = np.zeros(n, c.SAMPLING)
    sampling["top_p"] = sampling["repetition"] = 1
    if masks is not None:
        sampling["mask"] = masks.ctypes.data + np.arange(n) * masks.strides[0]
    rows = Rows(np.zeros((n, 2), np.int32), np.zeros((n, 64), np.int32), sampling)
    op = c.HeadOp(head, x.ctypes.data, None, x.shape[1])
    if screen is not None:
        op.screen_rows, op.screen = ROWS, screen.ctypes.data
    batch, answers, *_ = rows.batch(np.arange(n), [0] * n, [1] * n, [(i, i, -1, -1) for i in range(n)])
    run.run(c.Program([op]), batch)
    return answers["token"].tolist()


def hadamard() -> np.ndarray:
    matrix = np.ones((1, 1))
    while len(matrix) < 32:
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    return matrix


def mixed(rows: np.ndarray) -> np.ndarray:
    """Every 32 columns, up to a multiple of 32 with zeros, times the Hadamard matrix."""
    padded = np.pad(rows.astype(np.float64), ((0, 0), (0, -rows.shape[1] % 32)))
    return (padded.reshape(len(rows), -1, 32) @ hadamard()).reshape(len(rows), -1)


def opened(screen: np.ndarray, head: c.Matrix) -> tuple[np.ndarray, np.ndarray]:
    """What a screen holds for each output: its weights, float64 [n, k up to a multiple of 32], and its slack."""
    panels, blocks = -(-head.n // PANEL), -(-head.k // 32)
    raw = screen.reshape(panels, -1)
    slack = raw[:, -4 * PANEL :].copy().view(np.float32).reshape(-1)
    raw = raw[:, : -4 * PANEL].reshape(panels, blocks, 704)
    scale = raw[..., :64].copy().view(np.float16).astype(np.float64)
    steps = raw[..., 64:].reshape(panels, blocks, 5, PANEL, 4).transpose(0, 1, 3, 2, 4)  # [..., lane, step, byte]
    j = np.arange(8)[:, None]
    q = (steps[..., j[:, 0] & 3, :] >> (j & 4) & 15) + ((steps[..., 4:5, :] >> j & 1) << 4)
    weights = (q.reshape(panels, blocks, PANEL, 32) - 16.0) * scale[..., None]
    return weights.swapaxes(1, 2).reshape(panels * PANEL, -1)[: head.n], slack[: head.n]


@st.composite
def heads(draw) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    """Weights, rows of inputs and masks with all that could mislead a bound."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    vocab = draw(st.sampled_from([1, 31, 32, 33, 97, 700]))
    k = draw(st.sampled_from([1, 31, 32, 64, 72, 160, 288]))
    w, x = rng.standard_normal((vocab, k)), rng.standard_normal((draw(st.integers(1, ROWS)), k))
    some = rng.random(vocab) < 0.3
    match draw(st.sampled_from(["plain", "near", "ties", "zeros", "outliers", "sparse"])):
        case "near":  # all outputs nearly alike
            w = w[:1] + w * 10.0 ** draw(st.integers(-7, -1))
        case "ties":
            w[some] = w[rng.integers(0, vocab)]
        case "zeros":
            w[some] = 0
        case "outliers":
            w[:, rng.integers(0, k)] *= 100
            x[:, rng.integers(0, k)] *= 1000
        case "sparse":
            w *= rng.random(w.shape) < 0.05
    w *= 10.0 ** draw(st.sampled_from([-30, -9, -4, -1, 0, 0, 0, 2, 6]))
    x *= 10.0 ** draw(st.sampled_from([-30, -12, -2, 0, 0, 0, 3, 12]))
    if draw(st.booleans()):  # towards what an output lost in the screen
        e = w[rng.integers(0, vocab)]
        x[0] = np.sign(e) * np.abs(x[0]) if draw(st.booleans()) else e * (np.abs(x).max() / max(np.abs(e).max(), 1e-30))
    w, x = w.astype(np.float32), x.astype(np.float32)
    odd = draw(st.sampled_from([None, None, None, np.nan, np.inf, -np.inf]))
    if odd is not None:
        if draw(st.booleans()):
            x[rng.integers(0, len(x)), rng.integers(0, k)] = odd
        else:
            w[rng.integers(0, vocab), rng.integers(0, k)] = odd
    masks = None
    if draw(st.booleans()):
        masks = rng.integers(0, 2**32, (len(x), -(-vocab // 32)), np.uint32)
        masks[rng.random(masks.shape) < 0.3] = 0
    return w, x, masks


@pytest.mark.parametrize("isa", HERE)
@pytest.mark.parametrize("form", FORMATS)
@settings(max_examples=120, deadline=None)
@given(case=heads())
def test_a_screen_changes_no_token(isa, form, case):
    weights, x, masks = case
    if form in (Format.INT8, Format.Q8_0):  # neither is quantised to what is no number
        weights = np.nan_to_num(weights, posinf=0, neginf=0)
    if form == Format.Q8_0:
        k = weights.shape[1] // 32 * 32
        if not k:
            return
        weights, x = np.clip(weights[:, :k], -1e5, 1e5), np.ascontiguousarray(x[:, :k])
    run = executor(isa)
    head = pack(run, np.ascontiguousarray(weights), form)
    whole = likeliest(run, head, x, masks=masks)
    assert likeliest(run, head, x, screen_of(run, head), masks) == whole


@pytest.mark.parametrize("isa", HERE)
@pytest.mark.parametrize("k", [40, 576])
def test_the_slack_is_what_a_screen_lost_and_little_more(isa, k):
    rng = np.random.default_rng(2)
    weights = (rng.standard_normal((100, k)) * 10.0 ** rng.uniform(-3, 3, (100, 1))).astype(np.float32)
    weights[7], weights[8, 3], weights[9], weights[10] = 0, np.nan, weights[9] * 1e6, weights[10] * 1e-20
    run = executor(isa)
    head = pack(run, weights, Format.F32)
    q, slack = opened(screen_of(run, head), head)
    assert np.isinf(slack).nonzero()[0].tolist() == [8, 9][: 1 + int(np.linalg.norm(weights[9]) > 65536)]
    assert not q[8].any() and not q[7].any() and slack[7] < 1e-14
    fine = np.isfinite(slack)
    lost = np.linalg.norm(mixed(weights[fine]) - q[fine], axis=1) / 32**0.5
    norm = np.linalg.norm(weights[fine].astype(np.float64), axis=1)
    assert (slack[fine] >= lost + 1.82e-4 * norm).all()
    assert (slack[fine] <= 1.01 * lost + 5e-4 * norm + 1e-14).all()
    assert np.median(lost - 0.05 * norm) < 0


@pytest.mark.parametrize("isa", HERE)
@pytest.mark.parametrize("form", FORMATS)
def test_what_a_screen_rules_out_is_not_read(isa, form):
    """A head spoilt wherever the screen rules a panel out gives the same tokens."""
    rng = np.random.default_rng(3)
    weights = rng.standard_normal((3200, 576)).astype(np.float32)
    chosen = np.array([5, 1234, 3199])
    weights[chosen[:2]] = np.abs(weights[chosen[:2]]) * [[1], [-1]]  # what spoils all alike suits one
    x = weights[chosen] + rng.standard_normal((3, 576)).astype(np.float32)
    run = executor(isa)
    head = pack(run, weights, form)
    screen = screen_of(run, head)
    assert likeliest(run, head, x, screen) == chosen.tolist()
    panels = head.memory.reshape(100, -1)
    panels[np.isin(np.arange(100), chosen // PANEL, invert=True)] = 0x41
    assert likeliest(run, head, x, screen) == chosen.tolist()
    assert likeliest(run, head, x) != chosen.tolist()


def test_more_rows_than_pay_go_without():
    rng = np.random.default_rng(4)
    run = executor(HERE[-1])
    head = pack(run, rng.standard_normal((100, 64)).astype(np.float32), Format.F32)
    x = rng.standard_normal((ROWS + 1, 64)).astype(np.float32)
    spoilt = np.full_like(screen_of(run, head), 0x3F)
    assert likeliest(run, head, x, spoilt) == likeliest(run, head, x)


def test_a_screen_is_made_where_it_saves_enough(monkeypatch):
    """Of weights in many bytes that are a good part of all, by processors that multiply fast enough."""
    run = Executor(1, isa=HERE[-1])
    packer = Packer(run)
    head = packer.stack([np.ones((2048, 512), np.float32)], Format.F32)
    rows = run.screen_rows(Format.F32)
    made = packer.screen(head)
    assert made.rows == (made.matrix.k == 512 and rows) if rows else made == Screen()
    assert packer.screen(packer.stack([np.ones((2048, 512), np.float32)], Format.Q4_1)) == Screen()
    assert packer.screen(packer.stack([np.ones((64, 512), np.float32)], Format.F32)) == Screen()
    monkeypatch.setattr(packing, "SCREEN_SHARE", 0.9)
    assert packer.screen(head) == Screen()
