"""How fast the parts are: whole decoding steps, and kernels in each tile beside cuBLAS and cuDNN."""
# ruff: noqa: B023  closures here are called before the loop goes on

from __future__ import annotations

import os
import traceback
from collections.abc import Callable
from contextlib import contextmanager
from importlib.metadata import version

import numpy as np
import torch
import triton
from report import MODELS, free, graph_us, median_us, runner_for, say

from martlet.kernels.cuda import (
    decode_attention,
    decode_hopper,
    few_rows,
    launch,
    layers,
    linear,
    prefill_attention,
    rotary,
    sampling,
)
from martlet.model.spec import Attention, Rope
from martlet.runners.cuda_runner.graphs import Graphs
from martlet.runners.cuda_runner.mailbox import Mailbox

NOTHING = np.empty((2, 0), np.int32)


def env(args) -> None:
    a = torch.empty(1 << 30, dtype=torch.bfloat16, device="cuda").normal_()
    b = torch.empty_like(a)
    copy = graph_us([lambda: b.copy_(a)] * 4)
    x, y = a[: 8192 * 8192].view(8192, 8192), a[8192 * 8192 : 2 * 8192 * 8192].view(8192, 8192)
    matmul = graph_us([lambda: x @ y] * 4)
    say(
        "env", gpu=torch.cuda.get_device_name(), torch=torch.__version__, triton=triton.__version__,
        numpy=np.__version__, transformers=version("transformers"), cores=os.cpu_count(),
        copy_tb_s=round(4 * a.numel() / copy / 1e6, 3), matmul_tflops=round(2 * 8192**3 / matmul / 1e6, 1),
    )  # fmt: skip


def timed(cases: dict[str, list[Callable]], rate: Callable[[float], float] = lambda us: round(us, 2)) -> dict:
    """rate(microseconds) of each case's launches; compiled together first, so that compiling costs little."""
    with launch.compiled_together():
        for name, launches in cases.items():
            try:
                launches[0]()
            except Exception as error:
                cases[name] = [lambda error=error: _again(error)]
    found = {}
    for name, launches in cases.items():
        try:
            found[name] = rate(graph_us(launches, 9))
        except Exception as error:
            found[name] = repr(error)[:120]
    return found


def _again(error: Exception) -> None:
    raise error


@contextmanager
def changed(owner, name: str, value):
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


def steps(args) -> None:
    """A whole decoding step as a graph, in the ways that a step could be done."""
    tile_for = linear.tile_for

    def tiles(programs: int):
        def persistent(n, k, *kind):
            tile = tile_for(n, k, *kind)
            return linear.Tile(tile.block_n, tile.block_k, tile.warps, programs) if n * k >= 1 << 24 else tile

        return persistent

    def piped(block_n: int, block_k: int, warps: int, stages: int):
        """Large matrices through shared memory, small ones as they are."""

        def tile(n, k, *kind):
            return linear.Tile(block_n, block_k, warps, stages=stages) if n * k >= 1 << 24 else tile_for(n, k, *kind)

        return tile

    one_row = {
        "as is": [],
        "no overlap": [(launch, "overlap_allowed", False)],
        "overlap all": [(linear, "OVERLAP_BYTES", 1 << 40)],
        "overlap no product": [(linear, "OVERLAP_BYTES", 0)],
        "4 programs": [(linear, "tile_for", tiles(4))],
        "8 programs": [(linear, "tile_for", tiles(8))],
        "8x512": [(linear, "tile_for", lambda *shape: linear.Tile(8, 512, 4))],
        "8x512 4 programs": [(linear, "tile_for", lambda *shape: linear.Tile(8, 512, 4, 4))],
        "4x1024 w8": [(linear, "tile_for", lambda *shape: linear.Tile(4, 1024, 8))],
        "piped 4x512 s4": [(linear, "tile_for", piped(4, 512, 4, 4))],
        "piped 8x512 s4": [(linear, "tile_for", piped(8, 512, 4, 4))],
        "piped 8x512 s3, overlap all": [(linear, "tile_for", piped(8, 512, 4, 3)), (linear, "OVERLAP_BYTES", 1 << 40)],
        "piped 4x1024 s3": [(linear, "tile_for", piped(4, 1024, 4, 3))],
        "piped 4x512 s6": [(linear, "tile_for", piped(4, 512, 4, 6))],
        "8 programs, overlap all": [(linear, "tile_for", tiles(8)), (linear, "OVERLAP_BYTES", 1 << 40)],
        "piped 4x512 s4, overlap all": [(linear, "tile_for", piped(4, 512, 4, 4)), (linear, "OVERLAP_BYTES", 1 << 40)],
        "piped 4x512 s4 everywhere": [(linear, "tile_for", lambda *shape: linear.Tile(4, 512, 4, stages=4))],
    }
    many_rows = {
        "as is": [],
        "no overlap": [(launch, "overlap_allowed", False)],
        "cuBLAS alone": [(few_rows, "allowed", False)],
    }
    for model in args.models:
        runner = runner_for(model, kv_cache_tokens=300_000)
        blocks = runner.state.blocks
        shuffled = torch.randperm(runner.memory.num_blocks, device="cuda")
        blocks.copy_(shuffled.repeat(-(-blocks.numel() // len(shuffled)))[: blocks.numel()].view_as(blocks))
        for batch, context in ((1, 512), (8, 512), (32, 300), (64, 256), (128, 512), (256, 800)):
            found = {}
            for name, changes in (one_row if batch == 1 else many_rows).items():
                try:
                    found[name] = _step_ms(runner, batch, context, changes)
                except Exception:
                    found[name] = traceback.format_exc()[-200:]
            say("steps", model=model, batch=batch, context=context, ms=found)
        runner.close()
        del runner, blocks
        free()


def _step_ms(runner, batch: int, context: int, changes: list) -> float:
    if changes:
        with changed(*changes[0]):
            return _step_ms(runner, batch, context, changes[1:])
    graphs = Graphs(runner.decoder, runner.state, 256)
    with launch.compiled_together():
        graphs._decode(batch, "greedy")
    graphs.run(np.arange(batch), np.full(batch, context), NOTHING, "greedy", Mailbox(runner.device))
    return round(median_us(graphs.captured[batch, "greedy", False][0].replay, 15) / 1e3, 4)


def small(args) -> None:
    """The light kernels, microseconds each inside a graph."""
    for model in args.models:
        c = MODELS[model]
        width, hidden, heads, vocab = (
            c[key] for key in ("hidden_size", "intermediate_size", "num_attention_heads", "vocab_size")
        )
        spec = Attention(heads, 8, 128, Rope(1e6, 128), 128**-0.5, qk_norm=model.startswith("qwen3"))
        table = torch.randn(vocab, width, device="cuda").bfloat16()
        cos = torch.randn(4096, 128, device="cuda")
        cache = torch.zeros(2, 1024, 8, 16, 128, device="cuda").bfloat16()
        tokens = torch.zeros(256, 1024, dtype=torch.int32, device="cuda")
        blocks = torch.arange(256 * 4, device="cuda").view(256, 4).int()
        norms = torch.ones(heads + 8, 128, device="cuda") if spec.qk_norm else None
        for rows in (1, 64, 256, 8192):
            x, delta = (torch.randn(rows, width, device="cuda").bfloat16() for _ in range(2))
            h = torch.randn(rows, 2 * hidden, device="cuda").bfloat16()
            qkv = torch.randn(rows, (heads + 16) * 128, device="cuda").bfloat16()
            row = (torch.arange(rows, device="cuda") % 256).int()
            position = (torch.arange(rows, device="cuda") % 64).int()
            calls: dict[str, list[Callable]] = {
                "embed": [lambda: layers.embed(tokens, row, position, table)],
                "add_norm": [lambda: layers.add_rms_norm(x, delta, delta[0], 1e-6)],
                "activation": [lambda: layers.activation(h, "silu", True)],
                "rotate": [lambda: rotary.rotate_and_write(qkv, norms, 1e-6, cos, row, position, blocks, cache, spec)],
            }
            if rows <= 256:
                calls |= _sampling(torch.randn(rows, vocab, device="cuda"), row, position, tokens)
            say("small", model=model, rows=rows, us=timed({name: call * 10 for name, call in calls.items()}))
        free()


def _sampling(logits, rows, positions, tokens) -> dict[str, list[Callable]]:
    def settings(temperature: float = 0.8, top_k: int = 0, top_p: float = 1.0) -> torch.Tensor:
        floats = torch.tensor([temperature, top_p, 0.0]).view(torch.int32)
        line = torch.tensor([floats[0], top_k, floats[1], floats[2], 1, 2], dtype=torch.int32)
        return line.repeat(256, 1).cuda()

    def call(settings: torch.Tensor, logits=logits, **how) -> list[Callable]:
        return [lambda: sampling.sample(logits, rows, positions, settings, tokens, **how)]

    return {
        "greedy": call(settings(0.0), greedy=True),
        "draw": call(settings(), cut=False),
        "top 50, 0.9": call(settings(top_k=50, top_p=0.9)),
        "0.9 flat": call(settings(top_p=0.9)),
        "0.9 peaked": call(settings(top_p=0.9), logits * 3),
    }


def prefill(args) -> None:
    """Where a prefill of 8,192 tokens goes: its products, in one step and in pieces."""
    for model in args.models:
        c = MODELS[model]
        width, hidden, q = c["hidden_size"], c["intermediate_size"], c["num_attention_heads"] * 128
        shapes = {"qkv": (q + 2048, width), "o": (width, q), "up": (2 * hidden, width), "down": (width, hidden)}
        total = 0.0
        for name, (n, k) in shapes.items():
            found = {}
            matrix = torch.randn(n, k, device="cuda").bfloat16()
            values, scales = matrix.to(torch.float8_e4m3fn), torch.rand(n, device="cuda")
            for rows in (1024, 2048, 4096, 8192):
                x = torch.randn(rows, k, device="cuda").bfloat16()
                small = layers.in_fp8(x)
                us = timed({
                    "bf16": [lambda: torch.nn.functional.linear(x, matrix)] * 6,
                    "bf16, weights left": [lambda: torch.mm(matrix, x.T)] * 6,
                    "fp8": [lambda: linear.product(small, linear.Linear(values, None, scales), torch.bfloat16)] * 6,
                    "in fp8": [lambda: layers.in_fp8(x)] * 6,
                })  # fmt: skip
                found[rows] = {key: [round(t, 1), round(2e-6 * rows * n * k / t)] if isinstance(t, float) else t
                               for key, t in us.items()}  # fmt: skip
            total += found[8192]["bf16"][0]
            say("prefill", model=model, name=name, us_tflops=found)
        say("prefill", model=model, products_ms=round(total * c["num_hidden_layers"] / 1e3, 1),
            note="the light kernels at 8,192 rows are in section small, attention in section attention")  # fmt: skip


def tiles(args) -> None:
    """The one-row product in some tiles beside cuBLAS, GB/s of weights, over enough copies to leave the cache."""
    for model in args.models:
        c = MODELS[model]
        width, hidden, q = c["hidden_size"], c["intermediate_size"], c["num_attention_heads"] * 128
        shapes = {"qkv": (q + 2048, width, False), "o": (width, q, False), "up": (hidden, width, True),
                  "down": (width, hidden, False), "head": (c["vocab_size"], width, False)}  # fmt: skip
        for name, (n, k, gated) in shapes.items():
            matrix_bytes = (2 if gated else 1) * n * k * 2
            copies = max(2, min(24, (400 << 20) // matrix_bytes))
            matrices = [
                torch.randn((2 if gated else 1) * n, k, device="cuda").bfloat16().mul_(k**-0.5) for _ in range(copies)
            ]
            x, gain = (torch.randn(1, k, device="cuda").bfloat16() for _ in range(2))
            extra = {"gain": gain[0], "eps": 1e-6} if name in ("qkv", "up") else {}
            extra |= {"activation": "silu", "gated": True} if gated else {}
            extra |= {"dtype": torch.float32} if name == "head" else {}
            cases = {"cuBLAS": [lambda m=m: torch.nn.functional.linear(x, m) for m in matrices]}
            some = [(4, 512, 4, None), (4, 512, 4, 4), (4, 512, 4, 8), (8, 512, 4, None), (8, 512, 4, 4),
                    (8, 512, 8, 2), (4, 1024, 8, None), (4, 1024, 8, 4), (2, 2048, 4, None), (16, 256, 4, 4),
                    (16, 256, 8, None), (4, 512, 4, None, 3), (4, 512, 4, None, 4), (4, 512, 4, None, 6),
                    (8, 512, 4, None, 3), (8, 512, 4, None, 4), (8, 512, 8, None, 4), (2, 1024, 4, None, 4),
                    (4, 1024, 8, None, 4), (16, 256, 4, None, 4)]  # fmt: skip
            for tile in (linear.Tile(*numbers) for numbers in some):
                cases[f"{tile.block_n}x{tile.block_k} w{tile.warps} p{tile.programs} s{tile.stages}"] = [
                    lambda m=m, tile=tile: linear.linear(x, linear.Linear(m), tile=tile, **extra) for m in matrices
                ]
            say("tiles", model=model, name=name, gb_s=timed(cases, lambda us: round(matrix_bytes / us / 1e3)))
            del matrices, cases
            free()
            if name == "head":
                continue
            small = [
                torch.randn((2 if gated else 1) * n, k, device="cuda").mul_(k**-0.5).to(torch.float8_e4m3fn)
                for _ in range(2 * copies)
            ]
            scales = torch.rand(len(small[0]), device="cuda")
            cases = {
                f"{tile.block_n}x{tile.block_k} w{tile.warps} p{tile.programs} s{tile.stages}": [
                    lambda m=m, tile=tile: linear.linear(x, linear.Linear(m, None, scales), tile=tile, **extra)
                    for m in small
                ]
                for tile in (linear.Tile(*numbers) for numbers in [*some, (4, 256, 4, None), (8, 256, 4, None)])
            }
            for rows in (8, 64):
                many = torch.randn(rows, k, device="cuda").bfloat16()
                for kind, weights in (
                    ("fp8", [linear.Linear(m, None, scales) for m in small]),
                    ("bf16", [linear.Linear(torch.randn(m.shape, device="cuda").bfloat16()) for m in small[::2]]),
                ):
                    cases[f"{rows} rows {kind}"] = [
                        lambda w=w, many=many: linear.product(many, w, torch.bfloat16) for w in weights
                    ]
            say("tiles", model=model, name=f"{name} fp8, us", us=timed(cases))
            del small, cases, weights
            free()


def attention(args) -> None:
    for model in args.models:
        spec = Attention(MODELS[model]["num_attention_heads"], 8, 128, Rope(1e6, 128), 128**-0.5)
        for batch, low, high in ((256, 100, 1700), (138, 100, 1900), (64, 256, 257), (24, 100, 1900), (16, 2000, 2001),
                                 (1, 512, 513), (1, 8192, 8193)):  # fmt: skip
            lengths = np.sort(np.random.default_rng(0).integers(low, high, batch))[::-1].copy()  # as in a step
            for fp8 in (False, True):
                found = _decode_attention(spec, lengths, fp8)
                say("attention", model=model, kind="decode", fp8=fp8, batch=batch, context=[low, high], us_gb_s=found)
        for length, before in ((512, 0), (2048, 0), (8192, 0), (2048, 6144)):
            for fp8 in (False, True):
                found = _prefill_attention(spec, length, before, fp8)
                say("attention", model=model, kind="prefill", fp8=fp8, length=length, before=before, us_tflops=found)


def _pages(lengths: np.ndarray) -> tuple[torch.Tensor, int]:
    """(block table of sequences whose pages lie anywhere, number of pages)."""
    pages = -(-lengths // 16)
    table = np.zeros((len(lengths), pages.max()), np.int32)
    ids = np.random.default_rng(1).permutation(pages.sum())
    for row, (count, end) in enumerate(zip(pages, np.cumsum(pages), strict=True)):
        table[row, :count] = ids[end - count : end]
    return torch.from_numpy(table).cuda(), len(ids)


def _cache(pages: int, fp8: bool) -> tuple[torch.Tensor, torch.Tensor | None]:
    cache = torch.randn(2, pages, 8, 16, 128, device="cuda").bfloat16()
    return (cache.to(torch.float8_e4m3fn), torch.rand(cache.shape[:-1], device="cuda")) if fp8 else (cache, None)


def _decode_attention(spec: Attention, lengths: np.ndarray, fp8: bool) -> dict:
    """Microseconds, and GB/s of keys and values: of attention alone, of rotation and attention, of both in one."""
    batch, heads, walk = len(lengths), spec.heads, 5  # caches to walk through, so that nothing stays in L2
    blocks, pages = _pages(lengths)
    caches = [_cache(pages, fp8) for _ in range(walk)] * 2
    rows = torch.arange(batch, dtype=torch.int32, device="cuda")
    positions = torch.from_numpy(lengths - 1).int().cuda()
    qkv = torch.randn(batch, (heads + 16) * 128, device="cuda").bfloat16()
    q, cos = qkv[:, : heads * 128].view(batch, heads, 128), torch.randn(8193, 128, device="cuda")
    room = decode_attention.Scratch(
        torch.empty(1 << 24, device="cuda"),
        torch.empty(1 << 20, device="cuda"),
        torch.zeros(1 << 16, dtype=torch.int32, device="cuda"),
    )

    def attend(cache, scales, tile=None):
        decode_attention.decode_attention(q, cache, blocks, rows, positions, spec, room, scales=scales, tile=tile)

    def rotate(cache, scales):
        rotary.rotate_and_write(qkv, None, 1e-6, cos, rows, positions, blocks, cache, spec, scales)

    def in_one(cache, scales, slots=None):
        decode_hopper.attend(qkv, None, 1e-6, cos, rows, positions, blocks, cache, spec, scales, slots)

    chosen = decode_attention.tile_for(batch, spec, fp8=fp8)
    others = [(64, chosen.parts, 4, 3), (64, chosen.parts, 2, 4), (128, chosen.parts, 4, 3),
              (64, max(1, chosen.parts // 2), 4, 3), (64, min(64, 2 * chosen.parts), 4, 3)]  # fmt: skip
    cases = {
        f"{tile.tokens}t {tile.parts}p w{tile.warps} s{tile.stages}": [
            lambda c=c, tile=tile: attend(*c, tile) for c in caches
        ]
        for tile in dict.fromkeys([chosen, *(decode_attention.Tile(*numbers) for numbers in others)])
    }
    cases["rotation and attention"] = [lambda c=c: (rotate(*c), attend(*c)) for c in caches]
    if decode_hopper.able(batch, spec, torch.bfloat16, caches[0][0]):
        for slots in dict.fromkeys([None, 4, 6, 8] if fp8 else [None, 3, 4]):
            cases[f"both in one, {slots or 'chosen'} slots"] = [
                lambda c=c, slots=slots: in_one(*c, slots) for c in caches
            ]
    size = int(lengths.sum()) * 16 * (132 if fp8 else 256)
    found = timed(cases, lambda us: [round(us, 1), round(size / us / 1e3)])
    del caches, cases
    free()
    return found


def _prefill_attention(spec: Attention, length: int, before: int, fp8: bool) -> dict:
    """Microseconds, and TFLOP/s of the part below the diagonal, for a prompt's last `length` tokens."""
    heads = spec.heads
    blocks, pages = _pages(np.array([before + length]))
    cache, kept = _cache(pages, fp8)
    qkv = torch.randn(-(-length // 1024) * 1024, (heads + 16) * 128, device="cuda").bfloat16()
    q = qkv[:length, : heads * 128].view(length, heads, 128)
    out = torch.empty(length, heads * 128, device="cuda").bfloat16()
    sequences = torch.tensor([[0], [before], [length], [0]], dtype=torch.int32, device="cuda")
    flop = 2 * length * (length + 2 * before) * heads * 128
    cases: dict[str, list[Callable]] = {}
    if not before:
        cases["cuDNN"] = [lambda: prefill_attention.fresh_attention(qkv, length, spec)] * 2
    for m, n, warps, stages in ((64, 64, 4, 3), (64, 64, 4, 1), (64, 128, 4, 2), (64, 128, 4, 1), (128, 64, 8, 3)):
        tiles_ = torch.from_numpy(prefill_attention.tiles(np.array([before]), np.array([length]), m)).cuda()
        cases[f"{m}x{n} w{warps} s{stages}"] = [
            lambda m=m, n=n, warps=warps, stages=stages, tiles_=tiles_: prefill_attention.prefill_attention(
                q, cache, blocks, tiles_, sequences, spec, out,
                scales=kept, block_m=m, block_n=n, warps=warps, stages=stages,
            )
        ] * 2  # fmt: skip
    return timed(cases, lambda us: [round(us, 1), round(flop / us / 1e6)])
