"""Where Python and the GPU spend their time: prompts of 8,192 and 512 tokens, one stream, 64 streams."""

from __future__ import annotations

import cProfile
import io
import pstats
from collections.abc import Callable

from report import free, runner_for, say
from torch.profiler import ProfilerActivity, profile

from martlet.bench.gpu.shapes import Prompts
from martlet.engine.engine import Engine, drain
from martlet.engine.options import EngineOptions
from martlet.engine.request import Request
from martlet.sampling_params import SamplingParams


def traces(args) -> None:
    for model in args.models:
        runner = runner_for(model)
        engine = Engine(runner, options=EngineOptions(enable_prefix_caching=False, seed=0))
        prompts = Prompts()
        one, long, many = [prompts.ids(512)], [prompts.ids(8192)], [prompts.ids(128) for _ in range(64)]

        def run(texts: list[list[int]], length: int, engine=engine) -> None:
            params = SamplingParams(temperature=0, ignore_eos=True, max_tokens=length, detokenize=False)
            drain(engine, [Request(str(i), text, params) for i, text in enumerate(texts)])

        for name, texts, length in (
            ("prefill 8192", long, 1),
            ("prefill 512", one, 1),
            ("decode 1", one, 40),
            ("decode 64", many, 40),
        ):
            for _ in range(2):  # graphs are captured when they are wanted again
                run(texts, length)
            _profile(f"{model} {name}", lambda texts=texts, length=length, run=run: run(texts, length))
            _trace(f"{model} {name}", lambda texts=texts, length=length, run=run: run(texts, length))
        engine.close()
        del runner, engine, run
        free()


def _profile(name: str, call: Callable[[], None]) -> None:
    profile = cProfile.Profile()
    profile.runcall(call)
    text = io.StringIO()
    pstats.Stats(profile, stream=text).sort_stats("tottime").print_stats(14)
    say("profile", name=name, top=[" ".join(line.split()) for line in text.getvalue().splitlines() if "(" in line][:15])


def _trace(name: str, call: Callable[[], None]) -> None:
    with profile(activities=[ProfilerActivity.CUDA]) as trace:
        call()
    rows = sorted(trace.key_averages(), key=lambda e: -e.device_time_total)[:14]
    say("trace", name=name, kernels=[[e.key[:60], e.count, round(e.device_time_total / 1e3, 3)] for e in rows])
