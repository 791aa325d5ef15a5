"""How fast the engine is: workloads G1-G4 and a cold start, prompts and lengths as in the run of vLLM."""

from __future__ import annotations

import cProfile
import io
import json
import logging
import os
import pstats
import random
import subprocess
import sys
import tempfile
import time
import traceback

from report import ROOT, VLLM, free, runner_for, say
from torch.profiler import ProfilerActivity, profile

from martlet.engine.engine import Engine, drain
from martlet.engine.options import EngineOptions
from martlet.engine.request import Request
from martlet.sampling_params import SamplingParams

VARIANTS = {"": {}, "fp8 kv": {"kv_dtype": "fp8"}, "fp8 weights and kv": {"kv_dtype": "fp8", "quant": "fp8"}}


def g(args) -> None:
    """G1-G4 on the native engine, prompts and lengths as in the vLLM run; then again in FP8."""
    for model in args.models:
        bf16: dict[str, float] = {}
        for name, options in VARIANTS.items():
            try:
                _g(model, name, options, bf16, args)
            except Exception:
                say("G", model=model, variant=name, traceback=traceback.format_exc()[-1500:])
            free()


def _g(model: str, variant: str, options: dict, bf16: dict[str, float], args) -> None:
    """One model in one number type. bf16: milliseconds or rates of the first variant, which the others are beside."""
    began = time.perf_counter()
    runner = runner_for(model, **options)

    def tell(section: str, figure: float, **more) -> None:
        beside = {} if not variant else {"variant": variant, "to_bf16": figure / bf16[section]}
        bf16.setdefault(section, figure)
        say(section, model=model, **beside, **more)

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
        tell("G2", ms, ttft_ms=first * 1e3, ms_per_token=ms, vllm=[theirs["G2_ttft_ms"], theirs["G2_ms"]],
            ratio=[first * 1e3 / theirs["G2_ttft_ms"], ms / theirs["G2_ms"]])  # fmt: skip

    def g3():
        rate = 8192 / min(run(long, [1]) for _ in range(4))
        tell("G3", rate, tok_s=rate, vllm=theirs["G3"], ratio=rate / theirs["G3"])

    def g4():
        a, b = (min(run(many, [n] * 64) for _ in range(3)) for n in (1, 257))
        rate = 64 * 256 / (b - a)
        tell("G4", rate, tok_s=rate, vllm=theirs["G4"], ratio=rate / theirs["G4"], ms=(b - a) / 256 * 1e3)

    def g1():
        times = [run(prompts, lengths) for _ in range(2)]
        rate = sum(lengths) / min(times)
        tell("G1", rate, tok_s=rate, seconds=times, vllm=theirs["G1"], ratio=rate / theirs["G1"])

    say("load", model=model, variant=variant, seconds=load, kv_tokens=runner.memory.num_blocks * 16)
    for part in (g2, g3, g4, g1):
        try:
            part()
        except Exception:
            say(part.__name__, model=model, traceback=traceback.format_exc()[-1500:])
    if args.profile and not variant:
        _profile(f"{model} G4", lambda: run(many, [100] * 64))
        _profile(f"{model} G2", lambda: run(one, [200]))
        _trace(f"{model} prefill 8192", lambda: run(long, [1]))
        _trace(f"{model} prefill 512", lambda: run(one, [1]))
        _trace(f"{model} decode 1", lambda: run(one, [40]))
        _trace(f"{model} decode 64", lambda: run(many, [40] * 64))
    say("graphs", model=model, captured=len(runner.graphs.captured))
    running.close()
    del runner, running


def _profile(name: str, call) -> None:
    profile = cProfile.Profile()
    profile.runcall(call)
    text = io.StringIO()
    pstats.Stats(profile, stream=text).sort_stats("tottime").print_stats(14)
    say("profile", name=name, top=[" ".join(line.split()) for line in text.getvalue().splitlines() if "(" in line][:15])


def _trace(name: str, call) -> None:
    with profile(activities=[ProfilerActivity.CUDA]) as trace:
        call()
    rows = sorted(trace.key_averages(), key=lambda e: -e.device_time_total)[:14]
    say("trace", name=name, kernels=[[e.key[:60], e.count, round(e.device_time_total / 1e3, 3)] for e in rows])


def start(args) -> None:
    """Process start to first token in a fresh process with cold kernel caches."""
    for model in args.models:
        with tempfile.TemporaryDirectory() as cache:
            environment = os.environ | {"TRITON_CACHE_DIR": cache, "PYTHONPATH": str(ROOT / "src")}
            for again in (False, True) if args.warm else (False,):
                began = time.time()
                done = subprocess.run(
                    [sys.executable, str(ROOT / "bench" / "gpu" / "check.py"), "--first-token", model],
                    env=environment,
                    capture_output=True,
                    text=True,
                )
                found = [line for line in done.stdout.splitlines() if line.startswith("{")]
                say("start", model=model, warm_cache=again, seconds=time.time() - began,
                    phases=json.loads(found[-1]) if found else (done.stdout + done.stderr)[-1500:])  # fmt: skip


def first_token(model: str, process_began: float) -> None:
    began = time.perf_counter()
    lines = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())
    logging.getLogger("martlet").addHandler(handler)
    logging.getLogger("martlet").setLevel(logging.INFO)
    runner = runner_for(model)
    loaded = time.perf_counter()
    params = SamplingParams(temperature=0, max_tokens=1, ignore_eos=True)
    drain(Engine(runner), [Request("0", list(range(100, 612)), params)])
    print(
        json.dumps(
            {
                "imports": began - process_began,
                "load": loaded - began,
                "first_token": time.perf_counter() - loaded,
                "log": lines,
            }
        )
    )
    os._exit(0)
