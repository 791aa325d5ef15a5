"""Every Triton kernel against the reference, on odd shapes: on the GPU if there is one, else under the interpreter."""

from __future__ import annotations

import functools

import numpy as np
import pytest
import torch
from cases import ATTENTIONS, DEVICE, TOLERANCE, Case, close, from_fp8, in_fp8, make_case, reference_attention

from martlet.kernels.cuda import (
    decode_attention,
    decode_hopper,
    few_rows,
    few_rows_lora,
    launch,
    layers,
    linear,
    prefill_attention,
    sampling,
)
from martlet.kernels.ops import Sampling
from martlet.kernels.philox import gumbel
from martlet.kernels.reference import ReferenceOps
from martlet.model.spec import Attention, FeedForward, Rope

OPS = ReferenceOps()
DTYPES = [torch.float32, torch.float16]  # the interpreter multiplies no bfloat16


def randn(*shape, dtype=torch.float32, scale=1.0):
    return (torch.randn(*shape) * scale).to(DEVICE, dtype)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("count", "width"), [(1, 72), (3, 576)])
def test_norm_with_residual(dtype, count, width):
    x, delta, gain = randn(count, width, dtype=dtype), randn(count, width, dtype=dtype), randn(width, dtype=dtype)
    want, total = OPS.add_rms_norm(delta.clone(), x.clone(), gain, 1e-5)
    picks = torch.tensor([count - 1, 0], dtype=torch.int32, device=DEVICE)
    assert close(layers.add_rms_norm(x.clone(), delta, gain, 1e-5, picks), want[[count - 1, 0]])
    assert close(layers.add_rms_norm(x, delta, gain, 1e-5), want)
    assert close(x, total)
    assert close(layers.add_rms_norm(x, None, gain, 1e-5), OPS.rms_norm(x, gain, 1e-5))


def test_a_float32_residual_loses_nothing_to_what_stands_around_products():
    half = torch.float16
    x, delta, gain = randn(3, 200), randn(3, 200), randn(200, dtype=half)
    want, total = OPS.add_rms_norm(delta.clone(), x.clone(), gain.float(), 1e-5)
    got = layers.add_rms_norm(x, delta, gain, 1e-5)
    assert got.dtype == half and close(got, want)
    assert x.dtype == torch.float32 and close(x, total)
    wide = layers.add_rms_norm(x, None, gain, 1e-5, dtype=x.dtype)
    assert wide.dtype == torch.float32 and close(wide, OPS.rms_norm(x, gain.float(), 1e-5))
    act = layers.activation(x, "silu", True, dtype=half)
    assert act.dtype == half and close(act, OPS.activation(x.clone(), FeedForward(100)))

    matrix, bias, y = randn(37, 200, dtype=half, scale=200**-0.5), randn(37, dtype=half), x.to(half)
    want = y.float() @ matrix.float().T
    out = torch.empty(3, 37, device=DEVICE)
    assert linear.product(y, linear.Linear(matrix), torch.float32, out=out) is out and close(out, want)
    assert close(linear.product(y, linear.Linear(matrix, bias), torch.float32), want + bias.float())

    residual = randn(1, 37)
    want = residual + OPS.rms_norm(x[:1], gain.float(), 1e-5) @ matrix.float().T
    linear.linear(x[:1], linear.Linear(matrix), gain=gain, eps=1e-5, residual=residual, out=residual)
    assert close(residual, want)


def test_norm_adds_up_parts():
    x, parts, gain = randn(3, 576, dtype=torch.float16), randn(4, 3, 576), randn(576, dtype=torch.float16)
    want = x.float() + parts.sum(0)
    picks = torch.tensor([2, 0], dtype=torch.int32, device=DEVICE)
    some = layers.add_rms_norm(x.clone(), parts, gain, 1e-5, picks)
    all_ = layers.add_rms_norm(x, parts, gain, 1e-5)
    assert close(x, want)
    assert close(all_, OPS.rms_norm(want, gain.float(), 1e-5), x.dtype)
    assert torch.equal(some, all_[[2, 0]])


@pytest.mark.parametrize(
    ("outputs", "gated", "split"), [(14336, True, 1), (6144, False, 1), (4096, False, 2), (128256, False, 1)]
)
def test_tiles_of_few_rows_fit_a_hopper(outputs, gated, split):
    """What they compute only a Hopper can tell: bench/gpu/correctness.py."""
    tile = few_rows._tile(outputs, gated, 132)
    programs = -(-outputs // tile.outputs) * tile.split
    step = ((2 if gated else 1) * tile.outputs + few_rows.ROWS.value) * 2 * few_rows.HALF.value * 2
    assert tile.split == split
    assert 88 <= programs <= 132 or programs > 4 * 132
    assert tile.stages * step <= 227 << 10
    assert few_rows._tile(64, gated, 132) is None


@pytest.mark.parametrize(
    ("outputs", "inputs", "gated", "ends"),
    [(14336, 4096, True, ()), (6144, 4096, False, (4096, 5120)), (4096, 14336, False, ()), (4096, 264, False, ())],
)
@pytest.mark.parametrize(("slots", "rank"), [(1, 16), (16, 16), (16, 32), (8, 64)])
def test_adapters_of_few_rows_fit_in(outputs, inputs, gated, ends, slots, rank):
    """All of A is in some program's steps, all programs run at once, and shared memory has room for what they read."""
    tile, parts = few_rows._tile(outputs, gated, 132), 2 if gated else 1 + len(ends)
    steps, blocks = -(-inputs // 128), -(-outputs // tile.outputs)
    plan = few_rows_lora._plan(tile, outputs, steps, (slots, parts, rank), gated, ends, 132)
    if plan.makers:
        assert slots * parts * rank <= plan.makers // plan.shares * tile.outputs * (2 if gated else 1)
        assert plan.makers % plan.shares == 0 and steps >= plan.shares
    else:
        assert slots * parts * rank <= blocks // plan.shares * plan.ranks
        assert rank % plan.ranks == 0 and steps // tile.split >= plan.shares
    assert plan.makers + blocks * tile.split <= 132
    assert plan.shares * tile.split * 64 * parts * rank <= few_rows_lora.room(parts, rank)
    rows = (2 if gated else 1) * tile.outputs + few_rows.ROWS.value + plan.ranks
    moved = 64 * 2 * max(rank, 64) if gated else 0  # between layouts, on the way to B's products
    assert tile.stages * rows * 256 + moved + 1024 <= 227 << 10
    assert few_rows_lora._plan(tile, outputs, steps, (slots, parts, 48), gated, ends, 132) is None
    assert gated or few_rows_lora._plan(tile, outputs, steps, (slots, parts, rank), gated, (100,), 132) is None


@pytest.mark.parametrize(("heads", "kv_heads", "dim"), [(32, 8, 128), (16, 8, 128), (64, 4, 64), (8, 4, 256)])
@pytest.mark.parametrize("batch", [10, 17, 34, 64, 67, 256])
@pytest.mark.parametrize("fp8", [False, True])
def test_programs_of_a_decoding_step_fit_a_hopper_side_by_side(heads, kv_heads, dim, batch, fp8, monkeypatch):
    """What they compute only a Hopper can tell: bench/gpu/correctness.py."""
    monkeypatch.setattr(launch, "num_sms", lambda: 132)
    slots = decode_hopper.slots_for(batch, Attention(heads, kv_heads, dim, Rope(1e4, dim), 0.1), fp8=fp8)
    columns = max(8, 2 * heads // kv_heads)
    ring = 64 * slots * (dim + 4 if fp8 else 2 * dim)  # a scale is four bytes
    each = 1024 + ring + 2 * columns * (dim + 64) + 512  # reserved; queries, weights; sums
    assert 3 <= slots <= 8
    assert not (fp8 and slots % 2)
    assert each * min(2 if dim == 256 else 4, -(-batch * kv_heads // 132)) <= 228 << 10


def test_each_ring_of_a_decoding_step_is_compiled_ahead(monkeypatch):
    monkeypatch.setattr(launch, "num_sms", lambda: 132)
    monkeypatch.setattr(launch, "has_wgmma", lambda: True)
    spec, batches = Attention(32, 8, 128, Rope(1e4, 128), 0.1), [1, 8, 16, 24, 32, 40, 48, 56, 64]
    assert decode_hopper.sizes(batches, spec, fp8=False) == [16, 32, 48, 64]
    for fp8 in (False, True):
        ahead = decode_hopper.sizes(batches, spec, fp8=fp8)
        assert {decode_hopper.slots_for(size, spec, fp8=fp8) for size in ahead} == {
            decode_hopper.slots_for(batch, spec, fp8=fp8) for batch in batches
        }


@pytest.mark.parametrize("kind", ["silu", "gelu_tanh", "gelu"])
@pytest.mark.parametrize("gated", [True, False])
def test_activation(kind, gated):
    x = randn(3, 2 * 70 if gated else 70)
    want = OPS.activation(x.clone(), FeedForward(70, activation=kind, gated=gated))
    assert close(layers.activation(x, kind, gated), want)


def test_embedding_reads_the_rows_and_writes_changes():
    tokens = torch.randint(0, 50, (4, 9), dtype=torch.int32, device=DEVICE)
    table = randn(50, 72)
    rows = torch.tensor([2, -1, 0], dtype=torch.int32, device=DEVICE)
    positions = torch.tensor([3, 0, 8], dtype=torch.int32, device=DEVICE)
    state = torch.zeros(20, dtype=torch.int32, device=DEVICE)
    changes = torch.tensor([[13, -1, 1], [4, 5, 2]], dtype=torch.int32, device=DEVICE)
    got = layers.embed(tokens, rows, positions, table, changes=changes, state=state)
    assert torch.equal(got[0], table[tokens[2, 3]]) and torch.equal(got[2], table[tokens[0, 8]])
    assert state.nonzero().flatten().tolist() == [1, 13] and state[[13, 1]].tolist() == [4, 2]
    table, here = table.half(), tokens[[2, 0], [3, 8]]
    got = layers.embed(tokens, rows, positions, table, scale=0.3, dtype=torch.float32)
    assert torch.allclose(got[[0, 2]], table[here].float() * 0.3) and got.dtype == torch.float32


def test_scatter():
    state = torch.zeros(5000, dtype=torch.int32, device=DEVICE)
    places = torch.randperm(5000, device=DEVICE)[:3000].int()
    layers.scatter(state, torch.stack([places, places + 1]))
    assert state.sum() == (places + 1).sum() and torch.equal(state[places.long()], places + 1)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("programs", "stages"), [(None, 0), (1, 0), (None, 3)])
@pytest.mark.parametrize("gated", [True, False])
def test_linear_with_all_around_it(dtype, programs, stages, gated):
    k, n, rows, tile = 200, 37, 1, linear.Tile(4, 128, 4, programs, stages)
    x, gain, residual = randn(rows, k, dtype=dtype), randn(k, dtype=dtype), randn(rows, n, dtype=dtype)
    matrix, bias = (
        randn(2 * n if gated else n, k, dtype=dtype, scale=k**-0.5),
        randn(2 * n if gated else n, dtype=dtype),
    )
    normed = OPS.rms_norm(x.float(), gain.float(), 1e-5)
    want = normed @ matrix.float().T + bias.float()
    want = OPS.activation(want, FeedForward(n, gated=gated)) + residual.float()
    weight = linear.Linear(matrix, bias)
    got = linear.linear(x, weight, gain=gain, eps=1e-5, activation="silu", gated=gated, residual=residual, tile=tile)
    assert close(got, want, dtype)
    plain = linear.linear(x, linear.Linear(matrix), dtype=torch.float32)  # in the tile for its shape
    assert plain.dtype == torch.float32 and close(plain, x.float() @ matrix.float().T, dtype)
    out = residual.clone()
    linear.linear(x, linear.Linear(matrix[:n].contiguous()), residual=out, out=out)
    assert close(out, residual.float() + x.float() @ matrix[:n].float().T, dtype)


def test_fp8_rows_out_of_norm_and_activation():
    x, delta, gain = randn(3, 200), randn(3, 200), randn(200)
    want = OPS.rms_norm(x + delta, gain, 1e-5)
    for got, plain in (
        (layers.add_rms_norm(x.clone(), delta, gain, 1e-5, fp8=True), want),
        (layers.activation(x, "silu", True, fp8=True), OPS.activation(x.clone(), FeedForward(100))),
        (layers.in_fp8(x), x),
    ):
        values, scales = in_fp8(plain)
        assert torch.allclose(got.scales, scales, rtol=1e-5)
        assert (got.values.float() - values.float()).abs().max() <= 32  # a step at the top, where sums round otherwise
        assert ((from_fp8(got.values, got.scales) - plain).norm() / plain.norm()) < 0.04


def fp8_linear(n: int, k: int, bias: bool = True) -> tuple[linear.Linear, torch.Tensor]:
    """(weights, their matrix as it is multiplied)."""
    values, scales = in_fp8(randn(n, k, scale=k**-0.5) * torch.rand(n, 1, device=DEVICE))
    return linear.Linear(values, randn(n) if bias else None, scales), from_fp8(values, scales)


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("tile", [None, linear.Tile(8, 32, 4, stages=3)])
def test_linear_of_one_row_with_fp8_weights(gated, tile):
    k, n = 200, 37
    x, gain, residual = randn(1, k), randn(k), randn(1, n)
    weight, matrix = fp8_linear(2 * n if gated else n, k)
    want = OPS.rms_norm(x, gain, 1e-5) @ matrix.T + weight.bias
    want = OPS.activation(want, FeedForward(n, gated=gated)) + residual
    got = linear.linear(x, weight, gain=gain, eps=1e-5, activation="silu", gated=gated, residual=residual, tile=tile)
    assert close(got, want)


@pytest.mark.parametrize(("n", "k"), [(32, 48), (37, 40)])  # sizes that torch's product takes, and others
def test_product_with_fp8_weights(n, k):
    x = randn(3, k)
    weight, matrix = fp8_linear(n, k)
    rows = layers.in_fp8(x)
    want = from_fp8(rows.values, rows.scales) @ matrix.T + weight.bias
    out = torch.empty(3, n, device=DEVICE)
    assert close(linear.product(x, weight, torch.float32), want, torch.bfloat16)
    assert close(linear.product(rows, weight, torch.float32, out=out), want, torch.bfloat16) and out.any()


@pytest.mark.parametrize("name", ATTENTIONS)
def test_rotation_norm_and_cache_write(name):
    case = make_case(name, start=[3, 0, 17, 5], count=[1, 6, 1, 2])
    q, cache = case.rotate()
    want_q, want_cache = case.reference_rotate()
    assert close(q, want_q)
    for row, length in zip(case.rows, case.start + case.count, strict=True):
        assert close(case.keys_and_values(cache, row, length), case.reference_keys_and_values(want_cache, row, length))


@pytest.mark.parametrize("name", ATTENTIONS)
def test_rotation_of_float32_rounds_once(name):
    case = make_case(name, start=[3, 0, 17, 5], count=[1, 6, 1, 2])
    values, before = case.qkv[:, -case.spec.kv_size :], case.qkv.clone()
    out = torch.full_like(case.qkv, float("nan"), dtype=torch.float16)
    q, cache = case.rotate(case.cache.half(), out=out)
    want_q, want_cache = case.rotate()
    assert torch.equal(q, want_q.half()) and torch.equal(cache, want_cache.half())
    assert torch.equal(out[:, -case.spec.kv_size :], values.half()) and torch.equal(case.qkv, before)


@pytest.mark.parametrize("name", ATTENTIONS)
def test_rotation_adds_up_parts(name):
    case = make_case(name, start=[3, 0, 17, 5], count=[1, 6, 1, 2])
    want_q, want_cache = case.rotate()
    whole = case.qkv
    some = torch.randn(2, *whole.shape, device=DEVICE)
    case.qkv = torch.stack([*some, whole - some.sum(0)])
    q, cache = case.rotate(out=torch.empty_like(whole))
    assert close(q, want_q)
    assert close(cache, want_cache)


@pytest.mark.parametrize("name", ATTENTIONS)
def test_rotation_leaves_fp8_keys_and_values_with_scales(name):
    case = make_case(name, start=[3, 0, 17], count=[1, 6, 1])
    values, scales = in_fp8(case.cache)
    q, values = case.rotate(values, scales.zero_())
    want_q, want_cache = case.reference_rotate()
    assert close(q, want_q)
    for row, length in zip(case.rows, case.start + case.count, strict=True):
        got = case.keys_and_values(from_fp8(values, scales), row, length)
        want = case.reference_keys_and_values(want_cache, row, length)
        largest = want.abs().amax(-1, keepdim=True)
        assert ((got - want).abs() <= want.abs() / 16 + largest / 448 / 64).all()  # half a step of 3 bits, or the least
        assert want.abs().max() > 1


@pytest.mark.parametrize("name", ATTENTIONS)
@pytest.mark.parametrize(("parts", "fp8"), [(1, False), (3, False), (3, True)])
def test_decode_attention(name, parts, fp8):
    case = make_case(name, start=[0, 1, 33, 70, 15], count=[1] * 5)
    case.fill()
    cache, scales = case.cache, None
    if fp8:
        case.cache[1] *= 10 ** (4 * torch.rand_like(case.cache[1, ..., :1]) - 2)  # values whose scales differ
        cache, scales = in_fp8(case.cache)
        case.cache = from_fp8(cache, scales)
    q = randn(5, case.spec.heads, case.spec.head_dim)
    room = decode_attention.Scratch(
        torch.empty(parts * 5 * case.spec.q_size, device=DEVICE),
        torch.empty(parts * 5 * case.spec.heads * 2, device=DEVICE),
        torch.zeros(5 * case.spec.kv_heads, dtype=torch.int32, device=DEVICE),
    )
    tile = decode_attention.Tile(tokens=16, parts=parts, warps=4, stages=2)
    rows, positions = case.token_rows.clone(), case.token_positions
    rows[1] = -1  # padding
    for _ in range(2):  # the counters are back at zero after the first
        got = decode_attention.decode_attention(
            q, cache, case.block_table, rows, positions, case.spec, room, tile=tile, scales=scales
        )
        keep = [0, 2, 3, 4]
        assert close(got[keep], reference_attention(case, q)[keep])
    assert not room.counters.any()


@pytest.mark.parametrize("name", ATTENTIONS)
@pytest.mark.parametrize("fp8", [False, True])
def test_prefill_attention(name, fp8):
    case = make_case(name, start=[0, 40, 7], count=[21, 5, 33])
    case.fill()
    cache, scales = case.cache, None
    if fp8:
        cache, scales = in_fp8(case.cache)
        case.cache = from_fp8(cache, scales)
    q = randn(int(case.count.sum()), case.spec.heads, case.spec.head_dim)
    tiles = torch.from_numpy(prefill_attention.tiles(case.start, case.count, 16)).to(DEVICE)
    got = torch.empty(len(q), case.spec.q_size, device=DEVICE)
    prefill_attention.prefill_attention(
        q, cache, case.block_table, tiles, case.sequences(), case.spec, got, block_m=16, block_n=16, stages=2,
        scales=scales,
    )  # fmt: skip
    assert close(got, reference_attention(case, q))


def settings_of(rows: list[dict]) -> torch.Tensor:
    table = np.zeros((len(rows), sampling.SETTINGS), np.int32)
    for line, row in zip(table, rows, strict=True):
        floats = np.array([row.get("t", 1.0), row.get("top_p", 1.0), row.get("min_p", 0.0)], np.float32).view(np.int32)
        line[[sampling.TEMPERATURE, sampling.TOP_P, sampling.MIN_P]] = floats
        line[sampling.TOP_K] = row.get("top_k", 0)
        line[sampling.SEED_LOW : sampling.SEED_HIGH + 1] = np.array([row.get("seed", 7)], np.uint64).view(np.int32)
    return torch.from_numpy(table).to(DEVICE)


def test_sampling_follows_the_rule_of_the_reference():
    wants = [
        {"t": 0.0},
        {"t": 0.7, "seed": 2**63 + 5},
        {"t": 1.3, "top_k": 3},
        {"t": 1.0, "top_p": 0.4},
        {"t": 0.9, "min_p": 0.2, "top_k": 40, "top_p": 0.8, "seed": 2**33},
        {"t": 1.1, "top_p": 0.999},
    ]
    vocab, count = 5003, len(wants)
    logits = randn(count, vocab, scale=3.0)
    logits[:, 5::3] = float("-inf")
    position = np.array([4, 0, 9, 3, 100, 8])
    tokens = torch.full((count, 128), -1, dtype=torch.int32, device=DEVICE)
    rows = torch.arange(count, dtype=torch.int32, device=DEVICE).flip(0)
    got = sampling.sample(
        logits, rows, torch.from_numpy(position - 1).int().to(DEVICE), settings_of(wants[::-1]), tokens
    )
    host = logits.cpu().numpy()
    for i, want in enumerate(wants):
        line, t = host[i].astype(np.float64), want["t"]
        keep = np.isfinite(line)
        if t:
            rank = np.argsort(-line, kind="stable")
            keep &= line / t >= line.max() / t + np.log(max(want.get("min_p", 0.0), 1e-30))
            if k := want.get("top_k"):
                keep[rank[k:]] = False
            mass = np.where(keep, np.exp((line - line.max()) / t), 0.0)[rank]
            keep[rank[np.cumsum(mass) - mass >= want.get("top_p", 1.0) * mass.sum()]] = False
            line = line / t + gumbel(want.get("seed", 7), int(position[i]), np.arange(vocab))
        assert int(got[i]) == int(np.where(keep, line, -np.inf).argmax()), want
        assert int(tokens[count - 1 - i, position[i]]) == int(got[i])


def test_cuts_on_flat_and_steep_logits():
    random = np.random.default_rng(5)
    count, vocab = 10, 9001
    logits = randn(count, vocab) * torch.linspace(0.2, 12, count, device=DEVICE)[:, None]
    logits[3] = 1.0  # all are equal, so all stay
    logits[4, 7:] = float("-inf")
    t, m = np.float32(random.choice([0.3, 1.0, 2.0], count)), np.float32(random.choice([0.0, 0.01], count))
    k, p = random.choice([0, 2, 40, 4000], count), np.float32(random.choice([1.0, 0.95, 0.3, 1e-6], count))
    seed, position = random.integers(0, 2**64, count, dtype=np.uint64), random.integers(1, 100, count)
    k[3], p[3], k[4], p[4] = 40, 1.0, 40, 0.999
    wants = [{"t": t[i], "top_k": k[i], "top_p": p[i], "min_p": m[i], "seed": seed[i]} for i in range(count)]
    rows = torch.arange(count, dtype=torch.int32, device=DEVICE)
    tokens = torch.zeros(count, 128, dtype=torch.int32, device=DEVICE)
    at = torch.from_numpy(position - 1).int().to(DEVICE)
    got = sampling.sample(logits, rows, at, settings_of(wants), tokens)
    k[3] = 0
    want = OPS.sample(logits.clone(), Sampling(t, k, p, m, seed, position))
    assert got.tolist() == want.tolist()


@pytest.mark.parametrize(("p", "k"), [(0.9, 0), (0.999, 300)])
def test_cuts_keep_what_the_definition_keeps_and_search_among_few(p, k, monkeypatch):
    spreads = [0.05, 0.5, 2, 6, 20]
    count, vocab, t = len(spreads), 9001, np.float32(0.8)
    logits = randn(count, vocab) * torch.tensor(spreads, device=DEVICE)[:, None]
    rows = torch.arange(count, dtype=torch.int32, device=DEVICE)
    made, run = {}, launch.run

    def noted(kernel, grid, *arguments, **options):
        run(kernel, grid, *arguments, **options)
        made[kernel.__name__] = arguments

    monkeypatch.setattr(launch, "run", noted)
    settings = settings_of([{"t": t, "top_p": p, "top_k": k}] * count)
    cuts = sampling._find_cuts(logits, rows, settings, functools.partial(new_tensor, DEVICE)).cpu().numpy()
    x = logits.cpu().numpy()
    keys = np.where(x.view(np.int32) >= 0, x.view(np.int32), x.view(np.int32) ^ 0x7FFFFFFF)
    for line, key, cut in zip(x, keys, cuts, strict=True):
        ordered = np.sort(line.astype(np.float64))[::-1][: k or vocab] / t
        mass = np.exp(ordered - ordered[0])
        want = (np.cumsum(mass) - mass < p * mass.sum()).sum()
        assert (key >= cut).sum() == want
    sizes = made["_gather"][8]
    assert k or sizes.sum(1).max() < 100


def new_tensor(device: str, *shape: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device=device)


def test_greedy_sampling_takes_the_first_of_equals_and_skips_padding():
    logits = torch.zeros(3, 9001, device=DEVICE)
    logits[0, [8000, 4500]] = 2.0
    logits[2, 77] = 1.0
    tokens = torch.full((3, 4), -1, dtype=torch.int32, device=DEVICE)
    rows = torch.tensor([1, -1, 0], dtype=torch.int32, device=DEVICE)
    positions = torch.tensor([2, 0, 0], dtype=torch.int32, device=DEVICE)
    got = sampling.sample(logits, rows, positions, settings_of([{}] * 3), tokens, greedy=True)
    assert got.tolist() == [4500, -1, 77]
    assert tokens.tolist() == [[-1, 77, -1, -1], [-1, -1, -1, 4500], [-1] * 4]


def test_the_tolerances_can_fail():
    x = randn(3, 40)
    assert not close(x * (1 + 10 * TOLERANCE[torch.float32]), x)
    assert isinstance(make_case(next(iter(ATTENTIONS)), start=[0], count=[1]), Case)
