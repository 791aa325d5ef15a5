"""Everything worth knowing about the CUDA path, in one call on a machine with a GPU: is it right, and how fast.

    python bench/gpu/check.py [--sections env,kernels,...] [--models qwen3-0.6b,llama3-8b] [--gguf FILE] [--out FOLDER]

One JSON line a result, on standard output and in FOLDER/check.jsonl. Each section runs in a process of its own, so one
that breaks the GPU's context takes none with it. Workloads G1-G4: random token ids below 32,000, random.Random(0),
greedy, EOS ignored, prefix caching off.
"""
# ruff: noqa: B023, C408  closures here are called before the loop goes on; configs read best as keywords

from __future__ import annotations

import argparse
import cProfile
import io
import json
import os
import pstats
import random
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path

START = time.perf_counter()
ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "src"), str(ROOT / "tests" / "cuda")]

MODELS = {
    "qwen3-0.6b": dict(
        model_type="qwen3", hidden_size=1024, intermediate_size=3072, num_hidden_layers=28, num_attention_heads=16,
        num_key_value_heads=8, head_dim=128, vocab_size=151936, max_position_embeddings=40960, rms_norm_eps=1e-6,
        rope_theta=1000000, tie_word_embeddings=True, hidden_act="silu", attention_bias=False,
    ),
    "llama3-8b": dict(
        model_type="llama", hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32,
        num_key_value_heads=8, vocab_size=128256, max_position_embeddings=16384, rms_norm_eps=1e-5, rope_theta=500000.0,
        tie_word_embeddings=False, hidden_act="silu", attention_bias=False, mlp_bias=False,
    ),
}  # fmt: skip
VLLM = {  # vLLM 0.24.0 on one H200
    "qwen3-0.6b": {"start_s": 95, "G1": 24441, "G2_ttft_ms": 6.92, "G2_ms": 1.65, "G3": 250401, "G4": 19715},
    "llama3-8b": {"start_s": 62, "G1": 10275, "G2_ttft_ms": 14.67, "G2_ms": 4.878, "G3": 40910, "G4": 10589},
}
LOG = None


def say(section: str, **result) -> None:
    line = json.dumps({"section": section, "at": round(time.perf_counter() - START, 1), **result})
    print(line, flush=True)
    if LOG is not None:
        LOG.write(line + "\n")
        LOG.flush()


def card(model: str):
    from martlet.hub.card import ModelCard

    config = MODELS[model]
    return ModelCard(model, Path("-"), "dummy", config["model_type"], config=config)


def runner_for(model: str, **more):
    from martlet.runners.base import LoadOptions
    from martlet.runners.cuda_runner import CudaRunner

    settings = {"max_model_len": 16384, "max_num_seqs": 256, "memory_utilization": 0.85} | more
    return CudaRunner(card(model), LoadOptions(device="cuda", dtype="bfloat16", **settings))


def free(*_) -> None:
    import gc

    import torch

    gc.collect()
    torch.cuda.empty_cache()


# --- timing


def graph_us(launches, replays: int = 20) -> float:
    """Microseconds a launch: `launches` is a list of calls captured as one graph, replayed."""
    import torch

    for call in launches[:3]:
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in launches:
            call()
    graph.replay()
    times = []
    for _ in range(replays):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) * 1e3 / len(launches))
    return sorted(times)[len(times) // 2]


# --- sections


def env(args) -> None:
    import numpy
    import torch
    import transformers
    import triton

    a = torch.empty(1 << 30, dtype=torch.bfloat16, device="cuda").normal_()
    b = torch.empty_like(a)
    copy = graph_us([lambda: b.copy_(a)] * 4)
    x, y = a[: 8192 * 8192].view(8192, 8192), a[8192 * 8192 : 2 * 8192 * 8192].view(8192, 8192)
    matmul = graph_us([lambda: x @ y] * 4)
    say(
        "env", gpu=torch.cuda.get_device_name(), torch=torch.__version__, triton=triton.__version__,
        numpy=numpy.__version__, transformers=transformers.__version__, cores=os.cpu_count(),
        copy_tb_s=round(4 * a.numel() / copy / 1e6, 3), matmul_tflops=round(2 * 8192**3 / matmul / 1e6, 1),
    )  # fmt: skip


def kernels(args) -> None:
    """Every kernel against the reference, in float32 and bfloat16, small odd shapes and real ones."""
    import torch
    from cases import ATTENTIONS, close, make_case, reference_attention

    from martlet.kernels.cuda import decode_attention, layers, linear, prefill_attention
    from martlet.kernels.reference import ReferenceOps
    from martlet.model.spec import Attention, FeedForward, Rope

    torch.manual_seed(0)
    ops, failed, count = ReferenceOps(), [], 0

    def expect(name, got, want):
        nonlocal count
        count += 1
        error = float((got.double() - want.double()).norm() / want.double().norm())
        if not close(got, want):
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
    }
    ATTENTIONS.update(attentions)
    for dtype in (torch.float32, torch.bfloat16):

        def attend(name, dtype=dtype):
            case = make_case(name, [0, 1, 33, 200, 15, 127], [1] * 6, dtype)
            case.fill()
            q = torch.randn(6, case.spec.heads, case.spec.head_dim, device="cuda").to(dtype)
            room = decode_attention.Scratch(
                torch.empty(1 << 23, device="cuda"),
                torch.empty(1 << 17, device="cuda"),
                torch.zeros(1 << 12, dtype=torch.int32, device="cuda"),
            )
            for tile in (None, decode_attention.Tile(64, 1, 4, 3), decode_attention.Tile(16, 3, 4, 2)):
                for _ in range(2):
                    got = decode_attention.decode_attention(
                        q,
                        case.cache,
                        case.block_table,
                        case.token_rows,
                        case.token_positions,
                        case.spec,
                        room,
                        tile=tile,
                    )
                    expect(f"decode {name} {dtype} {tile}", got, reference_attention(case, q))
            assert not room.counters.any()

        def prefill(name, dtype=dtype):
            case = make_case(name, [0, 40, 7, 0], [21, 5, 133, 150], dtype)
            case.fill()
            q = torch.randn(int(case.count.sum()), case.spec.heads, case.spec.head_dim, device="cuda").to(dtype)
            tiles = torch.from_numpy(
                prefill_attention.tiles(case.start, case.count, prefill_attention.queries_for(dtype))
            ).cuda()
            got = torch.empty(len(q), case.spec.q_size, device="cuda", dtype=dtype)
            prefill_attention.prefill_attention(
                q, case.cache, case.block_table, tiles, case.sequences(), case.spec, got
            )
            expect(f"prefill {name} {dtype}", got, reference_attention(case, q))

        def rotate(name, dtype=dtype):
            case = make_case(name, [3, 0, 17, 5], [1, 60, 1, 2], dtype)
            q, cache = case.rotate()
            want_q, want_cache = case.reference_rotate()
            expect(f"rotate {name} {dtype}", q, want_q)
            for row, length in zip(case.rows, case.start + case.count, strict=True):
                want = case.reference_keys_and_values(want_cache, row, length)
                expect(f"cache {name} {dtype}", case.keys_and_values(cache, row, length), want)

        def product(rows, k, n, gated, dtype=dtype):
            def randn(*shape):
                return torch.randn(*shape, device="cuda").to(dtype)

            x, gain, residual, size = randn(rows, k), randn(k), randn(rows, n), 2 * n if gated else n
            matrix, bias = (torch.randn(size, k, device="cuda") * k**-0.5).to(dtype), randn(size)
            want = ops.rms_norm(x.float(), gain.float(), 1e-5) @ matrix.float().T + bias.float()
            want = ops.activation(want, FeedForward(n, gated=gated)) + residual.float()
            weight = linear.Linear(matrix, bias)
            got = linear.linear(x, weight, gain=gain, eps=1e-5, activation="silu", gated=gated, residual=residual)
            expect(f"linear {rows}x{k}x{n} {gated} {dtype}", got, want)

        for name in attentions:
            for check in (attend, prefill, rotate):
                attempt(f"{check.__name__} {name} {dtype}", lambda check=check, name=name: check(name))
        for rows in (1, 2, 3, 8, 17, 33, 64):
            for k, n, gated in ((200, 37, False), (1024, 4096, False), (1024, 3072, True), (3072, 1024, False)):
                attempt(f"linear {rows} {k} {n}", lambda a=(rows, k, n, gated): product(*a))
        x, delta, gain = (torch.randn(5, 1024, device="cuda").to(dtype) for _ in range(3))
        want, total = ops.add_rms_norm(delta.clone(), x.clone(), gain[0], 1e-6)
        expect(f"norm {dtype}", layers.add_rms_norm(x, delta, gain[0], 1e-6), want)
        expect(f"sum {dtype}", x, total)
        h = torch.randn(5, 6144, device="cuda").to(dtype)
        expect(f"act {dtype}", layers.activation(h, "silu", True), ops.activation(h.clone(), FeedForward(3072)))
    attempt("sampling", lambda: _sampling(expect))
    say("kernels", checks=count, failed=len(failed), names=failed[:40])


def _sampling(expect) -> None:
    """Full-size vocabulary: the tokens of the reference sampler, row for row."""
    import numpy as np
    import torch

    from martlet.kernels.cuda import sampling
    from martlet.kernels.ops import Sampling
    from martlet.kernels.reference import ReferenceOps

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
    want = ReferenceOps.sample(logits.clone(), Sampling(t, k, p, m, seed, position))
    say("kernels", sampled_rows=count, equal=int((got == want).sum()))
    greedy = torch.from_numpy(np.flatnonzero(t == 0)).cuda()
    expect("greedy rows", got[greedy].float(), want[greedy].float())


def engine(args) -> None:
    """Tokens and log-probabilities of the engine on the GPU against the engine on the CPU reference, float32."""
    import engines

    from martlet.engine.engine import Engine, drain
    from martlet.engine.options import EngineOptions
    from martlet.runners.cuda_runner import CudaRunner
    from martlet.runners.torch_runner import TorchRunner

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
    if args.gguf:
        _smollm(args.gguf)


def _smollm(path: str) -> None:
    import numpy as np

    from martlet.engine.engine import Engine, drain
    from martlet.engine.request import Request
    from martlet.hub import resolve
    from martlet.runners.base import LoadOptions
    from martlet.runners.cuda_runner import CudaRunner
    from martlet.runners.torch_runner import TorchRunner
    from martlet.sampling_params import SamplingParams

    model = resolve(path)
    numbers = np.random.default_rng(0)
    prompts = [numbers.integers(100, 40000, n).tolist() for n in (1, 7, 33, 150, 700)]

    def run(runner, **settings):
        params = SamplingParams(temperature=0, max_tokens=64, ignore_eos=True, logprobs=2)
        outputs = drain(Engine(runner), [Request(str(i), p, params) for i, p in enumerate(prompts)])
        return {o.request_id: ([*o.token_ids], [e.logprob for e in o.logprobs]) for o in outputs if o.last}

    sizes = {"max_num_seqs": 8, "max_model_len": 1024, "kv_cache_tokens": 8192}
    want = run(TorchRunner(model, LoadOptions(device="cpu", dtype="float32", **sizes)))
    for dtype in ("float32", "bfloat16"):
        got = run(CudaRunner(model, LoadOptions(device="cuda", dtype=dtype, **sizes)))
        same = [i for i in want if got[i][0] == want[i][0]]
        first = {
            i: next((t for t, (a, b) in enumerate(zip(got[i][0], want[i][0], strict=False)) if a != b), -1)
            for i in want
        }
        worst = max(abs(got[i][1][0] - want[i][1][0]) for i in want)
        say("engine", model="smollm2", dtype=dtype, same=len(same), of=len(want), first_difference=first,
            worst_first_logprob=worst)  # fmt: skip


def linear(args) -> None:
    """The narrow products in each tile against cuBLAS, GB/s of weights, over enough copies to leave the cache."""
    import torch

    from martlet.kernels.cuda import linear as ours

    for model in args.models:
        c = MODELS[model]
        width, hidden, q = c["hidden_size"], c["intermediate_size"], c["num_attention_heads"] * 128
        kv = c["num_key_value_heads"] * 128
        shapes = {"qkv": (q + 2 * kv, width, False), "o": (width, q, False), "up": (hidden, width, True),
                  "down": (width, hidden, False), "head": (c["vocab_size"], width, False)}  # fmt: skip
        for name, (n, k, gated) in shapes.items():
            full = 2 * n if gated else n
            copies = max(2, min(24, (400 << 20) // (full * k * 2)))
            mats = [torch.randn(full, k, device="cuda").to(torch.bfloat16).mul_(k**-0.5) for _ in range(copies)]
            for rows in (1, 4, 16, 64):
                x, gain = (torch.randn(s, k, device="cuda").to(torch.bfloat16) for s in (rows, 1))
                residual = None if gated or name in ("qkv", "head") else torch.zeros(rows, n, device="cuda").bfloat16()
                norm = {"gain": gain[0], "eps": 1e-6} if name in ("qkv", "up") else {}
                extra = {"activation": "silu", "gated": True} if gated else {}
                if residual is not None:
                    extra = {"residual": residual, "out": residual}
                if name == "head":
                    extra = {"dtype": torch.float32}
                results = {}
                us = graph_us([lambda m=m: torch.nn.functional.linear(x, m) for m in mats])
                results["cublas"] = round(full * k * 2 / us / 1e3)
                tiles = _tiles(ours, rows, full if not gated else n, k)
                for tile in tiles:
                    try:
                        us = graph_us([
                            lambda m=m: ours.linear(x, ours.Linear(m), tile=tile, **norm, **extra) for m in mats
                        ])  # fmt: skip
                        results[f"{tile.block_n}x{tile.block_k} w{tile.warps} s{tile.stages}"] = round(
                            full * k * 2 / us / 1e3
                        )
                    except Exception as error:
                        results[f"{tile}"] = repr(error)[:80]
                chosen = ours.tile_for(rows, n, k, gated)
                say("linear", model=model, name=name, rows=rows, gb_s=results,
                    chosen=f"{chosen.block_n}x{chosen.block_k} w{chosen.warps} s{chosen.stages}")  # fmt: skip
            del mats
            free()


def _tiles(ours, rows: int, n: int, k: int) -> list:
    default = ours.tile_for(rows, n, k, False)
    if rows == 1:
        some = [(1, 1024, 4), (2, 1024, 4), (4, 512, 4), (4, 1024, 8), (8, 512, 4), (4, 1024, 4), (2, 2048, 4)]
        tiles = [ours.Tile(a, b, w) for a, b, w in some if b <= 2 * k]
    elif rows <= 16:
        some = [(8, 256, 4, 4), (16, 128, 4, 4), (16, 256, 4, 4), (16, 512, 4, 3), (32, 128, 4, 4), (32, 256, 4, 3),
                (64, 128, 4, 4), (16, 256, 2, 4)]  # fmt: skip
        tiles = [ours.Tile(*t) for t in some]
    else:
        some = [(16, 128, 4, 4), (16, 256, 4, 3), (32, 128, 4, 4), (32, 64, 4, 5), (64, 64, 4, 4), (64, 128, 4, 3)]
        tiles = [ours.Tile(*t) for t in some]
    return tiles if default in tiles else [default, *tiles]


def attention(args) -> None:
    """Decode attention, GB/s of keys and values; prefill attention, TFLOP/s of the causal half."""
    import numpy as np
    import torch

    from martlet.kernels.cuda import decode_attention as da
    from martlet.kernels.cuda import prefill_attention as pa
    from martlet.model.spec import Attention, Rope

    layers_ = 6  # caches to walk through, so that nothing stays in L2
    for heads in (16, 32):
        spec = Attention(heads, 8, 128, Rope(1e6, 128), 128**-0.5)
        for batch, low, high in ((256, 100, 1700), (64, 128, 384), (1, 512, 513), (1, 8192, 8193), (16, 2000, 2001)):
            lengths = np.random.default_rng(0).integers(low, high, batch)
            pages = -(-lengths // 16)
            total = int(pages.sum())
            table = np.zeros((batch, pages.max()), np.int32)
            ids, at = np.random.default_rng(1).permutation(total), 0
            for row, count in enumerate(pages):
                table[row, :count] = ids[at : at + count]
                at += count
            caches = [torch.randn(2, total, 8, 16, 128, device="cuda").bfloat16() for _ in range(layers_)]
            blocks, rows = torch.from_numpy(table).cuda(), torch.arange(batch, dtype=torch.int32, device="cuda")
            positions = torch.from_numpy(lengths - 1).int().cuda()
            q = torch.randn(batch, heads, 128, device="cuda").bfloat16()
            room = da.Scratch(torch.empty(1 << 24, device="cuda"), torch.empty(1 << 20, device="cuda"),
                              torch.zeros(1 << 16, dtype=torch.int32, device="cuda"))  # fmt: skip
            default = da.tile_for(batch, spec)
            if batch >= 64:
                some = [(32, 1, 4, 3), (64, 1, 4, 2), (64, 1, 4, 4), (64, 2, 4, 3), (64, 4, 4, 3), (128, 1, 4, 2),
                        (128, 1, 8, 3), (64, 1, 2, 3), (128, 2, 4, 3), (32, 1, 2, 4), (32, 2, 2, 4)]  # fmt: skip
            else:
                some = [(16, 64, 2, 3), (32, 32, 4, 3), (32, 64, 2, 3), (64, 32, 4, 3), (64, 64, 4, 3), (32, 16, 4, 3),
                        (128, 16, 4, 3)]  # fmt: skip
            results = {}
            for tile in dict.fromkeys([default, *(da.Tile(*t) for t in some)]):
                try:
                    us = graph_us([
                        lambda c=c: da.decode_attention(q, c, blocks, rows, positions, spec, room, tile=tile)
                        for c in caches * 2
                    ])  # fmt: skip
                    key = f"{tile.tokens}t {tile.parts}p w{tile.warps} s{tile.stages}"
                    results[key] = [round(us, 1), round(int(lengths.sum()) * 4096 / us / 1e3)]
                except Exception as error:
                    results[str(tile)] = repr(error)[:80]
            say("attention", kind="decode", heads=heads, batch=batch, context=[low, high], us_gb_s=results,
                chosen=f"{default.tokens}t {default.parts}p w{default.warps} s{default.stages}")  # fmt: skip
            del caches
            free()
        for length in (512, 2048, 8192):
            cache = torch.randn(2, length // 16, 8, 16, 128, device="cuda").bfloat16()
            blocks = torch.arange(length // 16, dtype=torch.int32, device="cuda").view(1, -1)
            q = torch.randn(length, heads, 128, device="cuda").bfloat16()
            out = torch.empty(length, heads * 128, device="cuda").bfloat16()
            sequences = torch.tensor([[0], [0], [length], [0]], dtype=torch.int32, device="cuda")
            results = {}
            flop = 2 * length * length * heads * 128
            for m, n, warps, stages in (
                (128, 64, 8, 3),
                (128, 64, 4, 3),
                (128, 128, 8, 2),
                (64, 64, 4, 3),
                (128, 32, 4, 4),
            ):
                tiles = torch.from_numpy(pa.tiles(np.array([0]), np.array([length]), m)).cuda()
                try:
                    us = graph_us([
                        lambda: pa.prefill_attention(q, cache, blocks, tiles, sequences, spec, out, block_m=m,
                                                     block_n=n, warps=warps, stages=stages)
                    ] * 2, 5)  # fmt: skip
                    results[f"{m}x{n} w{warps} s{stages}"] = [round(us, 1), round(flop / us / 1e6)]
                except Exception as error:
                    results[f"{m}x{n} w{warps} s{stages}"] = repr(error)[:80]
            reference = out.clone()
            try:
                pages = torch.arange(length // 16, device="cuda")
                began = time.perf_counter()
                pa.fresh_attention(q, cache, pages, spec, out)
                torch.cuda.synchronize()
                first = time.perf_counter() - began
                us = graph_us([lambda: pa.fresh_attention(q, cache, pages, spec, out)] * 2, 5)
                results["cudnn with copies"] = [round(us, 1), round(flop / us / 1e6)]
                results["cudnn first call ms"] = round(first * 1e3, 1)
                results["difference"] = float((out.float() - reference.float()).norm() / reference.float().norm())
            except Exception as error:
                results["cudnn"] = repr(error)[:200]
            say("attention", kind="prefill", heads=heads, length=length, us_tflops=results)


def small(args) -> None:
    """The light kernels, microseconds each inside a graph."""
    import torch

    from martlet.kernels.cuda import layers, rotary, sampling
    from martlet.model.spec import Attention, Rope

    for model in args.models:
        c = MODELS[model]
        width, hidden, heads, vocab = (
            c["hidden_size"],
            c["intermediate_size"],
            c["num_attention_heads"],
            c["vocab_size"],
        )
        spec = Attention(heads, 8, 128, Rope(1e6, 128), 128**-0.5, qk_norm=model.startswith("qwen3"))
        table = torch.randn(vocab, width, device="cuda").bfloat16()
        cos = torch.randn(4096, 128, device="cuda")
        cache = torch.zeros(2, 1024, 8, 16, 128, device="cuda").bfloat16()
        tokens = torch.zeros(256, 1024, dtype=torch.int32, device="cuda")
        for rows in (1, 64, 256, 8192):
            x, delta = (torch.randn(rows, width, device="cuda").bfloat16() for _ in range(2))
            h = torch.randn(rows, 2 * hidden, device="cuda").bfloat16()
            qkv = torch.randn(rows, (heads + 16) * 128, device="cuda").bfloat16()
            row = (torch.arange(rows, device="cuda") % 256).int()
            position = (torch.arange(rows, device="cuda") % 64).int()
            blocks = (torch.arange(256 * 4, device="cuda")).view(256, 4).int()
            norms = torch.ones(heads + 8, 128, device="cuda") if spec.qk_norm else None
            settings = torch.zeros(256, sampling.SETTINGS, dtype=torch.int32, device="cuda")
            calls = {
                "embed": lambda: layers.embed(tokens, row, position, table),
                "add_norm": lambda: layers.add_rms_norm(x, delta, delta[0], 1e-6),
                "activation": lambda: layers.activation(h, "silu", True),
                "rotate": lambda: rotary.rotate_and_write(qkv, norms, 1e-6, cos, row, position, blocks, cache, spec),
            }
            if rows <= 256:
                logits = torch.randn(rows, vocab, device="cuda")
                drawn = settings.clone()
                drawn[:, 0] = torch.tensor(0.8).view(torch.int32)
                drawn[:, 2] = torch.tensor(1.0).view(torch.int32)
                cut = drawn.clone()
                cut[:, 1], cut[:, 2] = 50, torch.tensor(0.9).view(torch.int32)
                calls["sample greedy"] = lambda: sampling.sample(logits, row, position, settings, tokens, greedy=True)
                calls["sample draw"] = lambda: sampling.sample(logits, row, position, drawn, tokens, cut=False)
                calls["sample cut"] = lambda: sampling.sample(logits, row, position, cut, tokens)
            say(
                "small",
                model=model,
                rows=rows,
                us={name: round(graph_us([call] * 10, 5), 2) for name, call in calls.items()},
            )


def steps(args) -> None:
    """A whole decoding step as a graph: batch sizes, fused or cuBLAS, overlap on and off."""
    import torch

    from martlet.kernels.cuda import launch
    from martlet.runners.cuda_runner import decoder as module
    from martlet.runners.cuda_runner.graphs import Graphs

    for model in args.models:
        runner = runner_for(model, kv_cache_tokens=300_000)
        state, most = runner.state, module.MANY_ROWS
        shuffled = torch.randperm(runner.memory.num_blocks, device="cuda")
        repeats = -(-state.blocks.numel() // runner.memory.num_blocks)
        state.blocks.copy_(shuffled.repeat(repeats)[: state.blocks.numel()].view_as(state.blocks))
        for batch in (1, 2, 4, 8, 16, 32, 64, 128, 256):
            results = {}
            for name, narrow, overlap in (("fused", 64, True), ("fused, no overlap", 64, False), ("cublas", 0, True)):
                if narrow < batch and narrow:
                    continue
                module.MANY_ROWS, launch.overlap = narrow, overlap
                try:
                    graphs = Graphs(runner.decoder, state, 256)
                    graphs._graph(batch, "greedy")
                    graph = graphs.captured[batch, "greedy"][0]
                    graphs.inbox[:batch] = torch.arange(batch, device="cuda")
                    graphs.inbox[batch : 2 * batch] = 512
                    times = []
                    for _ in range(15):
                        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
                        begin.record()
                        graph.replay()
                        end.record()
                        end.synchronize()
                        times.append(begin.elapsed_time(end))
                    results[name] = round(sorted(times)[7], 4)
                except Exception:
                    results[name] = traceback.format_exc()[-300:]
                module.MANY_ROWS, launch.overlap = most, True
            say("steps", model=model, batch=batch, context=512, ms=results)
        runner.close()
        del runner, state, graphs, graph
        free()


def g(args) -> None:
    """G1-G4 on the native engine, prompts and lengths as in the vLLM run."""
    from martlet.engine.engine import Engine, drain
    from martlet.engine.options import EngineOptions
    from martlet.engine.request import Request
    from martlet.sampling_params import SamplingParams

    for model in args.models:
        began = time.perf_counter()
        runner = runner_for(model)
        load = time.perf_counter() - began
        running = Engine(runner, options=EngineOptions(enable_prefix_caching=False, seed=0))
        numbers = random.Random(0)

        def run(prompts, lengths, running=running):
            requests = [
                Request(str(i), p, SamplingParams(temperature=0, ignore_eos=True, max_tokens=n, detokenize=False))
                for i, (p, n) in enumerate(zip(prompts, lengths, strict=True))
            ]
            began = time.perf_counter()
            outputs = drain(running, requests)
            took = time.perf_counter() - began
            errors = [o.error for o in outputs if o.error]
            if errors:
                raise errors[0]
            found = {o.request_id: len(o.token_ids) for o in outputs}
            assert all(found[str(i)] == n for i, n in enumerate(lengths)), "wrong lengths"
            return took

        def ids(n, numbers=numbers):
            return [numbers.randint(0, 31999) for _ in range(n)]

        run([ids(64) for _ in range(8)], [8] * 8)
        prompts = [ids(numbers.randint(100, 1024)) for _ in range(256)]
        lengths = [numbers.randint(100, 1024) for _ in range(256)]
        one, long, many = [ids(512)], [ids(8192)], [ids(128) for _ in range(64)]
        theirs = VLLM[model]

        def g2():
            first, whole = min(run(one, [1]) for _ in range(4)), min(run(one, [257]) for _ in range(3))
            ms = (whole - first) / 256 * 1e3
            say("G2", model=model, ttft_ms=first * 1e3, ms_per_token=ms, vllm=[theirs["G2_ttft_ms"], theirs["G2_ms"]],
                ratio=[first * 1e3 / theirs["G2_ttft_ms"], ms / theirs["G2_ms"]])  # fmt: skip

        def g3():
            rate = 8192 / min(run(long, [1]) for _ in range(4))
            say("G3", model=model, tok_s=rate, vllm=theirs["G3"], ratio=rate / theirs["G3"])

        def g4():
            a, b = (min(run(many, [n] * 64) for _ in range(3)) for n in (1, 257))
            rate = 64 * 256 / (b - a)
            say("G4", model=model, tok_s=rate, vllm=theirs["G4"], ratio=rate / theirs["G4"], ms=(b - a) / 256 * 1e3)

        def g1():
            times = [run(prompts, lengths) for _ in range(2)]
            rate = sum(lengths) / min(times)
            say("G1", model=model, tok_s=rate, seconds=times, vllm=theirs["G1"], ratio=rate / theirs["G1"])

        say("load", model=model, seconds=load)
        for part in (g2, g3, g4, g1):
            try:
                part()
            except Exception:
                say(part.__name__, model=model, traceback=traceback.format_exc()[-1500:])
        if args.profile:
            _profile(f"{model} G4", lambda: run(many, [100] * 64))
            _profile(f"{model} G2", lambda: run(one, [200]))
            _trace(f"{model} prefill 8192", lambda: run(long, [1]))
            _trace(f"{model} prefill 512", lambda: run(one, [1]))
            _trace(f"{model} decode 1", lambda: run(one, [40]))
            _trace(f"{model} decode 64", lambda: run(many, [40] * 64))
        running.close()
        del runner, running
        free()


def _profile(name: str, call) -> None:
    profile = cProfile.Profile()
    profile.runcall(call)
    text = io.StringIO()
    pstats.Stats(profile, stream=text).sort_stats("tottime").print_stats(14)
    say("profile", name=name, top=[" ".join(line.split()) for line in text.getvalue().splitlines() if "(" in line][:15])


def _trace(name: str, call) -> None:
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as trace:
        call()
    rows = sorted(trace.key_averages(), key=lambda e: -e.device_time_total)[:14]
    say("trace", name=name, kernels=[[e.key[:60], e.count, round(e.device_time_total / 1e3, 3)] for e in rows])


def start(args) -> None:
    """Process start to first token in a fresh process with cold kernel caches."""
    for model in args.models:
        with tempfile.TemporaryDirectory() as cache:
            environment = os.environ | {"TRITON_CACHE_DIR": cache, "PYTHONPATH": str(ROOT / "src")}
            for again in (False, True):
                began = time.time()
                done = subprocess.run(
                    [sys.executable, __file__, "--first-token", model], env=environment, capture_output=True, text=True
                )
                found = [line for line in done.stdout.splitlines() if line.startswith("{")]
                say("start", model=model, warm_cache=again, seconds=time.time() - began,
                    phases=json.loads(found[-1]) if found else (done.stdout + done.stderr)[-1500:])  # fmt: skip


def first_token(model: str) -> None:
    import logging

    began = time.perf_counter()
    lines = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())
    logging.getLogger("martlet").addHandler(handler)
    logging.getLogger("martlet").setLevel(logging.INFO)
    from martlet.engine.engine import Engine, drain
    from martlet.engine.request import Request
    from martlet.sampling_params import SamplingParams

    runner = runner_for(model)
    loaded = time.perf_counter()
    params = SamplingParams(temperature=0, max_tokens=1, ignore_eos=True)
    drain(Engine(runner), [Request("0", list(range(100, 612)), params)])
    print(json.dumps({"load": loaded - began, "first_token": time.perf_counter() - loaded, "log": lines}))
    os._exit(0)


SECTIONS = {"env": env, "kernels": kernels, "engine": engine, "G": g, "steps": steps, "start": start, "small": small,
            "attention": attention, "linear": linear}  # fmt: skip
UNTIMED = ("kernels", "engine")  # may share the GPU


def main() -> None:
    global LOG
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sections", default=",".join(SECTIONS))
    parser.add_argument("--models", default=",".join(MODELS))
    parser.add_argument("--gguf", help="a SmolLM2 GGUF file to compare with the CPU reference")
    parser.add_argument("--out", help="folder for check.jsonl")
    parser.add_argument("--profile", action="store_true", help="after G: where Python and the GPU spend their time")
    parser.add_argument("--limit", type=float, default=540.0, help="seconds after which nothing goes on")
    parser.add_argument("--first-token", help=argparse.SUPPRESS)
    args = parser.parse_args()
    names = args.sections.split(",")
    if args.first_token:
        first_token(args.first_token)
    elif len(names) == 1:
        args.models = args.models.split(",")
        if args.out:
            LOG = (Path(args.out) / "check.jsonl").open("a")
        import torch

        try:
            with torch.inference_mode():
                SECTIONS[names[0]](args)
        except Exception:
            say(names[0], failed=traceback.format_exc()[-3000:])
        say(names[0], section_seconds=round(time.perf_counter() - START, 1))
    else:
        groups = [[n for n in names if n in UNTIMED], *([n] for n in names if n not in UNTIMED)]
        groups.sort(key=lambda group: group != ["env"])
        for group in filter(None, groups):
            _run(group, args)


def _run(group: list[str], args) -> None:
    """The sections of a group at once, each in its own process."""
    common = ["--models", args.models, *(["--gguf", args.gguf] if args.gguf else []),
              *(["--out", args.out] if args.out else []), *(["--profile"] if args.profile else [])]  # fmt: skip
    running = {name: subprocess.Popen([sys.executable, "-u", __file__, "--sections", name, *common]) for name in group}
    for name, process in running.items():
        try:
            code = process.wait(max(1.0, args.limit - (time.perf_counter() - START)))
            if code:
                say(name, exit_code=code)
        except subprocess.TimeoutExpired:
            process.kill()
            say(name, stopped="out of time")


if __name__ == "__main__":
    main()
