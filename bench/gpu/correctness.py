"""Is the CUDA path right: every kernel against the reference, the engine on the GPU against the engine on the CPU."""

from __future__ import annotations

import functools
import traceback
from collections.abc import Callable
from pathlib import Path

import engines
import numpy as np
import torch
from cases import ATTENTIONS, EPS, close, from_fp8, in_fp8, make_case, reference_attention
from report import ROOT, card, free, say

from martlet.engine.engine import Engine, drain
from martlet.engine.options import EngineOptions
from martlet.engine.request import Request
from martlet.hub import load_tokenizer, resolve
from martlet.hub.card import ModelCard
from martlet.kernels.cuda import (
    decode_attention,
    decode_hopper,
    few_rows,
    few_rows_lora,
    launch,
    layers,
    linear,
    lora,
    prefill_attention,
    sampling,
)
from martlet.kernels.ops import Sampling
from martlet.kernels.reference import ReferenceOps
from martlet.model.rope import rotation_table
from martlet.model.spec import Attention, FeedForward, Rope
from martlet.runners.base import LoadOptions
from martlet.runners.cuda_runner import CudaRunner
from martlet.runners.torch_runner import TorchRunner
from martlet.sampling_params import SamplingParams


def kernels(args) -> None:
    """Every kernel against the reference, in float32 and bfloat16, small odd shapes and real ones."""
    torch.manual_seed(0)
    ops, failed, count = ReferenceOps(), [], 0

    def expect(name, got, want, most=None):
        nonlocal count
        if launch.compiling:
            return
        count += 1
        error = float((got.double() - want.double()).norm() / want.double().norm())
        if not (close(got, want) if most is None else error <= most):
            failed.append(name)
            say("kernels", wrong=name, error=error)

    def attempt(name, function):
        try:
            function()
        except Exception:
            failed.append(name)
            say("kernels", wrong=name, traceback=traceback.format_exc()[-1500:])

    attentions = {
        **ATTENTIONS,
        "qwen3-0.6b": Attention(16, 8, 128, Rope(1e6, 128), 128**-0.5, qk_norm=True),
        "llama3-8b": Attention(32, 8, 128, Rope(5e5, 128), 128**-0.5),
        "head 80": Attention(32, 32, 80, Rope(1e4, 80), 80**-0.5),
        "head 96, many queries a key": Attention(24, 1, 96, Rope(1e4, 96), 96**-0.5),
        "head 256": Attention(8, 1, 256, Rope(1e4, 256), 256**-0.5, window=100),
        "head 64, window, capped": Attention(12, 2, 64, Rope(1e4, 64), 0.125, window=40, softcap=2.0),
        "window, capped": Attention(12, 2, 128, Rope(1e4, 128), 0.125, window=40, softcap=2.0),
    }
    ATTENTIONS.update(attentions)
    tasks: dict[str, Callable[[], None]] = {}
    for dtype in (torch.float32, torch.bfloat16):

        def filled(case, fp8):
            """(cache, scales) as the kernels take them; the case keeps what they stand for."""
            case.fill()
            if not fp8:
                return case.cache, None
            cache, scales = in_fp8(case.cache)
            case.cache = from_fp8(cache, scales, case.cache.dtype)
            return cache, scales

        def attend(name, fp8, dtype=dtype, filled=filled):
            case = make_case(name, [0, 1, 33, 200, 15, 127], [1] * 6, dtype)
            cache, scales = filled(case, fp8)
            q = torch.randn(6, case.spec.heads, case.spec.head_dim, device="cuda").to(dtype)
            room = decode_attention.Scratch(
                torch.empty(1 << 23, device="cuda"),
                torch.empty(1 << 17, device="cuda"),
                torch.zeros(1 << 12, dtype=torch.int32, device="cuda"),
            )
            tiles = [None, decode_attention.Tile(64, 1, 4, 3), decode_attention.Tile(16, 3, 4, 2)]
            tiles += [decode_attention.Tile(128, 1, 4, 3)] if fp8 else []
            for tile in tiles:
                for _ in range(2):
                    got = decode_attention.decode_attention(
                        q,
                        cache,
                        case.block_table,
                        case.token_rows,
                        case.token_positions,
                        case.spec,
                        room,
                        scales=scales,
                        tile=tile,
                    )
                    expect(f"decode {name} {dtype} {fp8} {tile}", got, reference_attention(case, q))
            assert launch.compiling or not room.counters.any()

        def prefill(name, fp8, dtype=dtype, filled=filled):
            case = make_case(name, [0, 40, 7, 0], [21, 5, 133, 150], dtype)
            cache, scales = filled(case, fp8)
            q = torch.randn(int(case.count.sum()), case.spec.heads, case.spec.head_dim, device="cuda").to(dtype)
            tiles = torch.from_numpy(
                prefill_attention.tiles(case.start, case.count, prefill_attention.queries_for(dtype))
            ).cuda()
            got = torch.empty(len(q), case.spec.q_size, device="cuda", dtype=dtype)
            prefill_attention.prefill_attention(
                q, cache, case.block_table, tiles, case.sequences(), case.spec, got, scales=scales
            )
            expect(f"prefill {name} {dtype} {fp8}", got, reference_attention(case, q))

        def rotate(name, fp8, dtype=dtype):
            case = make_case(name, [3, 0, 17, 5], [1, 60, 1, 2], dtype)
            scales = None
            if fp8:
                cache, scales = in_fp8(case.cache)
                q, cache = case.rotate(cache, scales)
                cache = from_fp8(cache, scales)
            else:
                q, cache = case.rotate()
            want_q, want_cache = case.reference_rotate()
            expect(f"rotate {name} {dtype}", q, want_q)
            for row, length in zip(case.rows, case.start + case.count, strict=True):
                want = case.reference_keys_and_values(want_cache, row, length)
                got = case.keys_and_values(cache, row, length)
                expect(f"cache {name} {dtype} {fp8}", got, want, 0.04 if fp8 else None)  # half a step is 1/16 at most

        def product(tile, k, n, gated, fp8, dtype=dtype):
            rows = 1

            def randn(*sizes):
                return torch.randn(*sizes, device="cuda").to(dtype)

            x, gain, residual, size = randn(rows, k), randn(k), randn(rows, n), 2 * n if gated else n
            matrix, bias = (torch.randn(size, k, device="cuda") * k**-0.5).to(dtype), randn(size)
            weight = linear.Linear(matrix, bias)
            if fp8:
                values, scales = in_fp8(matrix)
                weight, matrix = linear.Linear(values, bias, scales), from_fp8(values, scales)
            want = ops.rms_norm(x.float(), gain.float(), 1e-5) @ matrix.float().T + bias.float()
            want = ops.activation(want, FeedForward(n, gated=gated)) + residual.float()
            got = linear.linear(x, weight, gain=gain, eps=1e-5, activation="silu", gated=gated, residual=residual,
                                tile=tile)  # fmt: skip
            expect(f"linear {tile} {k}x{n} {gated} {dtype} {fp8}", got, want)

        def wide(k, n, dtype=dtype):
            """FP8 by FP8, and plain numbers with float32 sums, against the same numbers multiplied in float32."""
            x, bias = (torch.randn(*size, device="cuda").to(dtype) for size in ((65, k), (n,)))
            values, scales = in_fp8(torch.randn(n, k, device="cuda") * k**-0.5)
            rows = layers.in_fp8(x)
            expect(f"in fp8 {dtype}", from_fp8(rows.values, rows.scales), x.float(), 0.04)
            want = from_fp8(rows.values, rows.scales) @ from_fp8(values, scales).T + bias.float()
            weight = linear.Linear(values, bias, scales)
            if not launch.compiling:
                expect(f"fp8 product {k}x{n} {dtype}", linear.product(rows, weight, dtype), want, 1e-2)
                matrix = (torch.randn(n, k, device="cuda") * k**-0.5).to(dtype)
                got = linear.product(x, linear.Linear(matrix, bias), torch.float32)
                expect(f"float32 product {k}x{n} {dtype}", got, x.float() @ matrix.float().T + bias.float(), 1e-5)

        def light(dtype=dtype):
            x, delta, gain = (torch.randn(5, 1024, device="cuda").to(dtype) for _ in range(3))
            want, total = ops.add_rms_norm(delta.clone(), x.clone(), gain[0], 1e-6)
            expect(f"norm {dtype}", layers.add_rms_norm(x, delta, gain[0], 1e-6), want)
            expect(f"sum {dtype}", x, total)
            h = torch.randn(5, 6144, device="cuda").to(dtype)
            expect(f"act {dtype}", layers.activation(h, "silu", True), ops.activation(h.clone(), FeedForward(3072)))
            small = layers.activation(h, "silu", True, fp8=True)
            act = ops.activation(h.float(), FeedForward(3072))
            expect(f"act in fp8 {dtype}", from_fp8(small.values, small.scales), act, 0.04)
            want = ops.rms_norm(x.float(), gain[0].float(), 1e-6)
            small = layers.add_rms_norm(x, None, gain[0], 1e-6, fp8=True)
            expect(f"norm in fp8 {dtype}", from_fp8(small.values, small.scales), want, 0.04)

        for name in attentions:
            for check in (attend, prefill, rotate):
                for fp8 in (False, True):
                    tasks[f"{check.__name__} {name} {dtype} {fp8}"] = functools.partial(check, name, fp8)
        for k, n in ((1024, 4096), (4096, 1024), (200, 37)):
            tasks[f"wide {k}x{n} {dtype}"] = functools.partial(wide, k, n)
        for tile in (None, linear.Tile(4, 512, 4, 4), linear.Tile(4, 512, 4, stages=4)):
            for shape in ((200, 37, False), (1024, 4096, False), (1024, 3072, True), (3072, 1024, False)):
                for fp8 in (False, True):
                    tasks[f"linear {tile} {shape} {dtype} {fp8}"] = functools.partial(product, tile, *shape, fp8)
        tasks[f"light {dtype}"] = light
    tasks["sampling"] = lambda: _sampling(expect)
    for name in ("plain", "qwen3-0.6b", "llama3-8b", "head 256", "head 64, window, capped", "window, capped"):
        for fp8 in (False, True):
            tasks[f"decoding {name} {fp8}"] = functools.partial(_decoding, expect, name, fp8)
    for n, k, gated in ((6144, 4096, False), (4096, 4104, False), (4096, 14336, False), (14300, 4096, True),
                        (128256, 4096, False)):  # fmt: skip
        tasks[f"few rows {k}x{n}"] = functools.partial(_few_rows, expect, n, k, gated)
    for k, sizes, gated, slots, rank in (
        (4096, (4096, 1024, 1024), False, 16, 16), (1032, (4096, 1024, 1024), False, 4, 64),
        (520, (4096, 1024, 1024), False, 3, 32), (14336, (4096,), False, 16, 16), (4104, (4096,), False, 8, 64),
        (264, (4096,), False, 4, 16), (4096, (14336, 14336), True, 16, 16), (1032, (12800, 12800), True, 1, 16),
        (2056, (14300, 14300), True, 8, 64),
    ):  # fmt: skip
        name = f"few rows {k}x{sizes} {slots} adapters of {rank}"
        tasks[name] = functools.partial(_adapted_rows, expect, name, k, sizes, gated, slots, rank)
    try:
        with launch.compiled_together():
            for task in tasks.values():
                task()
    except Exception:
        say("kernels", compiling=traceback.format_exc()[-1500:])
    for name in ("qwen3-0.6b", "llama3-8b"):
        tasks[f"fresh {name}"] = lambda name=name: expect(f"fresh {name}", *_fresh(attentions[name]))
    for name, task in tasks.items():
        attempt(name, task)
    say("kernels", checks=count, failed=len(failed), names=failed[:40])


def _fresh(spec: Attention) -> tuple[torch.Tensor, torch.Tensor]:
    """A prompt of odd length by cuDNN, and by plain float32."""
    count, length = 1501, 2048
    qkv = torch.randn(length, (spec.heads + 2 * spec.kv_heads) * spec.head_dim, device="cuda").bfloat16()
    heads = qkv[:count].float().view(count, -1, spec.head_dim).transpose(0, 1)
    q, k, v = heads.split([spec.heads, spec.kv_heads, spec.kv_heads])
    k, v = (part.repeat_interleave(spec.heads // spec.kv_heads, 0) for part in (k, v))
    unseen = torch.full((count, count), float("-inf"), device="cuda").triu(1)
    want = torch.softmax(q @ k.transpose(1, 2) * spec.scale + unseen, -1) @ v
    return prefill_attention.fresh_attention(qkv, count, spec), want.transpose(0, 1).reshape(count, -1)


def _decoding(expect, name: str, fp8: bool) -> None:
    """Rotation, writing and attention in one, which only a Hopper has; the same bit for bit in a graph."""
    if not launch.has_wgmma() or (fp8 and ATTENTIONS[name].head_dim < 128):
        return
    case = make_case(name, [0, 1, 33, 200, 15, 127, 63, 64, 239] * 4, [1] * 36, torch.bfloat16)
    case.fill()
    before, before_scales = in_fp8(case.cache) if fp8 else (case.cache, None)
    table = torch.from_numpy(np.concatenate(rotation_table(case.spec.rope, 256), 1)).cuda()
    rows, where = case.token_rows, case.token_positions
    scales = before_scales.clone() if fp8 else None
    q, case.cache = case.rotate(before.clone(), scales)
    case.cache = from_fp8(case.cache, scales, torch.bfloat16) if fp8 else case.cache
    want = reference_attention(case, q)
    rows_and_padding = torch.where(torch.arange(36, device="cuda") % 12 == 5, -1, rows)
    half = case.qkv.float() / 2
    for slots in (4, 6, 8) if fp8 else (3, 4, 7):
        if slots * case.spec.head_dim > 1024:
            continue
        for parts in (case.qkv, torch.stack([half, half])):
            for some in (rows, rows_and_padding):
                cache, scales = before.clone(), before_scales.clone() if fp8 else None

                def made(some=some, cache=cache, scales=scales, parts=parts, slots=slots):
                    return decode_hopper.attend(
                        parts, case.norms, EPS, table, some, where, case.block_table, cache, case.spec, scales, slots
                    )

                got, here = made(), some >= 0
                expect(f"decoding {name} {fp8} {slots} {len(parts)}", got[here], want[here])
                if launch.compiling:
                    continue
                if some is rows:
                    kept = from_fp8(cache, scales, torch.bfloat16) if fp8 else cache
                    expect(f"decoding {name} {fp8} {slots} {len(parts)}, cache", kept, case.cache)
                graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(graph):
                    found = [made() for _ in range(8)]
                for _ in range(5):
                    graph.replay()
                same = all(torch.equal(each[here], got[here]) for each in found)
                expect(f"decoding {name} {fp8} {slots} in a graph", torch.tensor(float(same)), torch.ones(()))


def _few_rows(expect, n: int, k: int, gated: bool) -> None:
    """Products of few rows, which only a Hopper has; what a row gives is the same bit for bit among other rows."""
    if not launch.has_wgmma():
        return
    weight = linear.Linear(torch.randn(2 * n if gated else n, k, device="cuda").bfloat16().mul_(k**-0.5))
    x = torch.randn(64, k, device="cuda").bfloat16()
    want = x.float() @ weight.matrix.float().T
    if gated:
        want = torch.nn.functional.silu(want[:, :n]) * want[:, n:]
    tile = few_rows.tile_for(x, weight, gated=gated)
    assert tile is not None
    whole = few_rows.product(x, weight.matrix, tile, gated=gated, activation="silu" if gated else "")
    for rows in (64, 40, 7):
        got = few_rows.product(x[-rows:], weight.matrix, tile, gated=gated, activation="silu" if gated else "")
        expect(f"few rows {k}x{n} {rows}", got if gated else got.sum(0), want[-rows:], 5e-3 if gated else 2e-5)
        if not launch.compiling:
            same = torch.equal(got, whole[..., -rows:, :])
            expect(f"few rows {k}x{n} {rows} as among 64", torch.tensor(float(same)), torch.ones(()))


def _adapted_rows(expect, name: str, k: int, sizes: tuple[int, ...], gated: bool, slots: int, rank: int) -> None:
    """Products of few rows with adapters against sums in float32, the same bit for bit in a graph and among others."""
    if not launch.has_wgmma():
        return
    n, parts = sum(sizes), len(sizes)
    wide = torch.randn(n + slots * parts * rank, k, device="cuda").mul_(k**-0.5).bfloat16()
    matrix = wide[:n]
    stack = lora.Stack(
        wide[n:].view(slots, parts, rank, k),
        torch.randn(n, slots, rank, device="cuda").mul_(rank**-0.5).bfloat16(),
        torch.full((slots,), rank, dtype=torch.int32, device="cuda"),
        tuple(np.cumsum(sizes[:-1]).tolist()),
    )
    outputs = n // 2 if gated else n
    tile, steps = few_rows._tile(outputs, gated, launch.num_sms()), -(-k // 128)
    assert tile is not None
    plan = few_rows_lora._plan(tile, outputs, steps, (slots, parts, rank), gated, stack.ends, launch.num_sms())
    assert plan is not None
    x = torch.randn(64, k, device="cuda").bfloat16()
    low = torch.empty(few_rows_lora.room(parts, rank), dtype=torch.int32, device="cuda")
    adapters = torch.randint(slots + 1, (64,), dtype=torch.int32, device="cuda")  # 0 for none
    rows = torch.where(torch.arange(64, device="cuda") % 9 == 0, -1, torch.arange(64, device="cuda")).int()

    def made(count: int) -> torch.Tensor:
        groups = lora.group(rows[-count:], adapters, stack.ranks, rank, low)
        return few_rows_lora.product(
            x[-count:], wide, plan, stack, groups, low, gated=gated, activation="silu" if gated else ""
        )

    whole, graph = made(64), torch.cuda.CUDAGraph()
    want = x.float() @ matrix.float().T
    values = (x.float() @ stack.a.view(-1, k).float().T).view(64, slots, parts, rank).bfloat16().float()
    for row, slot in enumerate(torch.where(rows < 0, 0, adapters).tolist()):
        for part, (begin, size) in enumerate(zip(np.cumsum(sizes) - sizes, sizes, strict=True)):
            if slot:
                here = slice(begin, begin + size)
                want[row, here] += stack.b[here, slot - 1].float() @ values[row, slot - 1, part]
    if gated:
        want = torch.nn.functional.silu(want[:, :outputs]) * want[:, outputs:]
    for count in (64, 40, 7, 1):
        got = made(count)
        expect(f"{name}, {count} rows", got if gated else got.sum(0), want[-count:], 5e-3 if gated else 1e-3)
        if not launch.compiling:
            same = torch.equal(got, whole[..., -count:, :])
            expect(f"{name}, {count} rows as among 64", torch.tensor(float(same)), torch.ones(()))
    if launch.compiling:
        return
    with torch.cuda.graph(graph):
        found = [made(64) for _ in range(8)]
    for _ in range(20):
        graph.replay()
    expect(f"{name} in a graph", torch.tensor(float(all(torch.equal(got, whole) for got in found))), torch.ones(()))


def _sampling(expect) -> None:
    """Full-size vocabulary: the tokens of the reference sampler, row for row."""
    count, vocab = 64, 151936
    random_ = np.random.default_rng(0)
    logits = torch.randn(count, vocab, device="cuda") * 2.5
    t = random_.choice([0.0, 0.6, 1.0, 1.5], count).astype(np.float32)
    k = random_.choice([0, 1, 20, 5000], count)
    p = random_.choice([1.0, 0.9, 0.3], count).astype(np.float32)
    m = random_.choice([0.0, 0.05], count).astype(np.float32)
    seed = random_.integers(0, 2**64, count, dtype=np.uint64)
    position = random_.integers(1, 1000, count)
    table = np.zeros((count, sampling.SETTINGS), np.int32)
    table[:, 0], table[:, 1] = t.view(np.int32), k
    table[:, 2], table[:, 3], table[:, 4:6] = p.view(np.int32), m.view(np.int32), seed.view(np.int32).reshape(-1, 2)
    rows = torch.arange(count, dtype=torch.int32, device="cuda")
    at = torch.from_numpy(position - 1).int().cuda()
    tokens = torch.zeros(count, 1024, dtype=torch.int32, device="cuda")
    got = sampling.sample(logits, rows, at, torch.from_numpy(table).cuda(), tokens)
    if launch.compiling:
        return
    want = ReferenceOps.sample(logits.clone(), Sampling(t, k, p, m, seed, position))
    say("kernels", sampled_rows=count, equal=int((got == want).sum()))
    greedy = torch.from_numpy(np.flatnonzero(t == 0)).cuda()
    expect("greedy rows", got[greedy].float(), want[greedy].float())


def engine(args) -> None:
    """Tokens and log-probabilities of the engine on the GPU against the engine on the CPU reference, float32."""
    for family in engines.CONFIGS:
        want = engines.answers(TorchRunner(engines.card(family), engines.options("cpu")))
        for graphs in (True, False):
            runner = CudaRunner(engines.card(family), engines.options("cuda"), graphs=graphs, step_tokens=64)
            for name, settings in {
                "whole": {},
                "again": {},
                "chunks of 7": {"max_num_batched_tokens": 7, "enable_prefix_caching": False},
            }.items():
                verdict = "same"
                try:
                    engines.check(engines.answers(runner, **settings), want)
                except Exception:
                    verdict = traceback.format_exc()[-1200:]
                say("engine", family=family, graphs=graphs, run=name, verdict=verdict)
        tight = CudaRunner(engines.card(family), engines.options("cuda", kv_cache_tokens=84))
        running = Engine(tight, options=EngineOptions(seed=0))
        tokens: dict = {}
        for output in drain(running, engines.requests()):
            tokens.setdefault((output.request_id, output.index), []).extend(output.token_ids)
        same = tokens == {key: entry[0] for key, entry in want.items()}
        say("engine", family=family, preemptions=running.stats().preemptions, same=same)
    for width in (256, 1024):  # sums in float32 and in bfloat16
        _long_prompts(width)
    for kv_dtype in ("auto", "fp8"):
        _beside_prompts(kv_dtype)
    _fp8()


def _long_prompts(width: int) -> None:
    """Long prompts together, in bfloat16: by cuDNN and by our own kernel, which float32 has checked."""
    config = {"model_type": "llama", "hidden_size": width, "num_hidden_layers": 2, "max_position_embeddings": 4096,
              "vocab_size": 1000, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64,
              "intermediate_size": 512}  # fmt: skip
    numbers = np.random.default_rng(0)
    params = SamplingParams(temperature=0, max_tokens=3, ignore_eos=True, logprobs=1)
    requests = [Request(str(n), numbers.integers(0, 1000, n).tolist(), params) for n in (2100, 30, 2500, 2048)]
    found = []
    fresh = prefill_attention.FRESH
    for least in (fresh, 1 << 30):
        prefill_attention.FRESH = least
        runner = CudaRunner(
            ModelCard("long", Path("-"), "dummy", "llama", config=config),
            LoadOptions(device="cuda", dtype="bfloat16", max_num_seqs=8, kv_cache_tokens=16384),
        )
        outputs = drain(Engine(runner), requests)
        found.append({o.request_id: o.logprobs[0] for o in outputs if o.last})
        runner.close()
    prefill_attention.FRESH = fresh
    worst = max(abs(found[0][i].logprob - found[1][i].logprob) for i in found[0])
    say("engine", long_prompts=len(found[0]), width=width, worst_logprob=worst, ok=worst < 2e-2)


def _beside_prompts(kv_dtype: str) -> None:
    """Short prompts that come while others decode, in graphs: with rotation and attention in one kernel, and apart."""
    config = {"model_type": "llama", "hidden_size": 1024, "num_hidden_layers": 3, "max_position_embeddings": 512,
              "vocab_size": 1000, "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128,
              "intermediate_size": 512}  # fmt: skip
    numbers = np.random.default_rng(0)
    params = SamplingParams(temperature=0, max_tokens=40, ignore_eos=True, logprobs=0)
    requests = [
        Request(str(i), numbers.integers(0, 1000, int(numbers.integers(2, 30))).tolist(), params) for i in range(90)
    ]
    able, found, full = decode_hopper.able, [], 0
    for allowed in (True, False):
        decode_hopper.able = able if allowed else lambda *_: False
        runner = CudaRunner(
            ModelCard("short", Path("-"), "dummy", "llama", config=config),
            LoadOptions(device="cuda", dtype="bfloat16", max_num_seqs=64, kv_cache_tokens=16384, kv_dtype=kv_dtype),
        )
        while runner.get_ready():
            pass
        assert runner.graphs is not None
        run_mixed = runner.graphs.run_mixed

        def counted(mixed, *rest, run_mixed=run_mixed):
            nonlocal full
            full += mixed.decodes == mixed.tokens
            return run_mixed(mixed, *rest)

        runner.graphs.run_mixed = counted
        running, waiting, logprobs = Engine(runner), requests[::-1], {}
        while waiting or running.has_work:
            for _ in range(min(2, len(waiting))):
                running.add(waiting.pop())
            for output in running.step():
                logprobs.setdefault(output.request_id, []).extend(output.logprobs)
        found.append(logprobs)
        running.close()
    decode_hopper.able = able
    apart = []
    for one, two in ((found[0][i], found[1][i]) for i in found[0]):
        for a, b in zip(one, two, strict=True):
            apart.append(abs(a.logprob - b.logprob))
            if a.token != b.token:
                break
    say("engine", beside_prompts=len(requests), kv_dtype=kv_dtype, full_graphs=full, tokens=len(apart),
        mean_logprob=float(np.mean(apart)), worst=max(apart), ok=bool(full > 0 and np.mean(apart) < 1e-2))  # fmt: skip


FP8 = {"fp8 kv": {"kv_dtype": "fp8"}, "fp8 weights": {"quant": "fp8"}, "both": {"kv_dtype": "fp8", "quant": "fp8"}}


def _fp8() -> None:
    """FP8 on a small model: with graphs and without the same tokens, chunked or not; near the float32 reference."""
    for family in engines.CONFIGS:
        want = engines.answers(TorchRunner(engines.card(family), engines.options("cpu")))
        scored = [key for key in want if want[key][2]]
        for name, options in FP8.items():
            runs = {}
            for graphs in (True, False):
                runner = CudaRunner(
                    engines.card(family), engines.options("cuda", **options), graphs=graphs, step_tokens=64
                )
                for again in range(2):
                    runs[graphs, again] = engines.answers(runner)
                runner.close()
            first = runs[True, 0]
            same = sum([first[key][0] == run[key][0] for key in first] == [True] * len(first) for run in runs.values())
            apart = [
                abs(a.logprob - b.logprob) for key in scored for a, b in zip(first[key][2], want[key][2], strict=True)
            ]
            say("engine", family=family, fp8=name, runs=len(runs), same=same, mean_logprob=float(np.mean(apart)))


def quality(args) -> None:
    """Mean |difference of log-probability| to bf16, of each prompt token; on text with --text-model, else on ids."""
    text = (ROOT / "README.md").read_text() + (ROOT / "docs" / "architecture.md").read_text()
    models = [(card(name), None) for name in args.models]
    if args.text_model:
        models = [(resolve(args.text_model), text)]
    for model, words in models:
        tokens = np.random.default_rng(0).integers(0, 32000, 1024).tolist()
        if words is not None:
            tokens = load_tokenizer(model).encode(words)[:2048]
        found = {}
        for name, options in {"bf16": {}, **FP8}.items():
            sizes = {"max_num_seqs": 4, "max_model_len": 2048, "kv_cache_tokens": 16384}
            runner = CudaRunner(model, LoadOptions(device="cuda", dtype="bfloat16", **sizes, **options))
            params = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0, ignore_eos=True)
            engine = Engine(runner, options=EngineOptions(max_num_batched_tokens=256))  # later chunks read the cache
            outputs = drain(engine, [Request("0", tokens[:2000], params)])
            found[name] = np.array([e.logprob for o in outputs for e in (o.prompt_logprobs or [None])[1:]])
            engine.close()
            del engine, runner
            free()
        say("quality", model=model.name, text=words is not None, tokens=len(found["bf16"]),
            mean_logprob=float(found["bf16"].mean()),
            mean_difference={k: float(np.abs(v - found["bf16"]).mean()) for k, v in found.items() if k != "bf16"},
            bias={k: float((v - found["bf16"]).mean()) for k, v in found.items() if k != "bf16"})  # fmt: skip
