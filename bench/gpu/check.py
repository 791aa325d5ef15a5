"""Everything worth knowing about the CUDA path, in one call on a machine with a GPU: is it right, and where time goes.

    python bench/gpu/check.py [--sections kernels,steps,...] [--models qwen3-0.6b,llama3-8b] [--out FOLDER]

One JSON line a result, on standard output (rounded) and in FOLDER/check.jsonl. Each section runs in a process of its
own, so one that breaks the GPU's context takes none with it. "env", "tiles", "attention", "prefill" and "traces" can be
asked for. How fast the engine is as a whole is measured by `martlet bench gpu`, whether it holds by bench/gpu/soak.py,
and what it makes of a real model by bench/gpu/smollm2.py.
"""

from __future__ import annotations

import argparse
import importlib
import subprocess
import sys
import time
import traceback
from pathlib import Path

BEGAN = time.perf_counter()
ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "src"), str(ROOT / "tests" / "cuda")]

SECTIONS = {  # name: module, function, the most seconds it may take
    "kernels": ("correctness", "kernels", 150),
    "engine": ("correctness", "engine", 120),
    "quality": ("correctness", "quality", 60),
    "steps": ("micro", "steps", 50),
    "small": ("micro", "small", 25),
    "env": ("micro", "env", 30),
    "tiles": ("micro", "tiles", 120),
    "attention": ("micro", "attention", 90),
    "prefill": ("micro", "prefill", 45),
    "traces": ("traces", "traces", 60),
}
USUAL = ("kernels", "engine", "quality", "steps", "small")
UNTIMED = ("kernels", "engine")  # may share the GPU


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sections", default=",".join(USUAL), help=f"of {', '.join(SECTIONS)}")
    parser.add_argument("--models", default="qwen3-0.6b,llama3-8b")
    parser.add_argument("--text-model", help="a model whose log-probabilities on text FP8 is to be measured by")
    parser.add_argument("--out", help="folder for check.jsonl")
    parser.add_argument("--limit", type=float, default=540.0, help="seconds after which nothing goes on")
    parser.add_argument("--section", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.section:
        section(args)
    else:
        names = args.sections.split(",")
        if unknown := set(names) - set(SECTIONS):
            parser.error(f"no section is called {', '.join(sorted(unknown))}; there are {', '.join(SECTIONS)}")
        for group in ([name for name in names if name in UNTIMED], *([n] for n in names if n not in UNTIMED)):
            if group:
                run(group, args)


def section(args: argparse.Namespace) -> None:
    """One section, in this process."""
    began = time.perf_counter()
    import report
    import torch

    module, function, _ = SECTIONS[args.section]
    args.models = args.models.split(",")
    if args.out:
        report.log = (Path(args.out) / "check.jsonl").open("a")
    try:
        with torch.inference_mode():
            getattr(importlib.import_module(module), function)(args)
    except Exception:
        report.say(args.section, failed=traceback.format_exc()[-3000:])
    report.say(args.section, section_seconds=time.perf_counter() - began)


def run(group: list[str], args: argparse.Namespace) -> None:
    """The sections of a group at once, each in its own process."""
    flags = [
        flag
        for name in ("models", "text_model", "out")
        if (value := getattr(args, name))
        for flag in (f"--{name.replace('_', '-')}", value)
    ]
    running = {name: subprocess.Popen([sys.executable, "-u", __file__, "--section", name, *flags]) for name in group}
    began = time.perf_counter()
    for name, process in running.items():
        allowed = min(SECTIONS[name][2] + began, args.limit + BEGAN) - time.perf_counter()
        try:
            code = process.wait(max(1.0, allowed))
            if code:
                print(f'{{"section": "{name}", "exit_code": {code}}}', flush=True)
        except subprocess.TimeoutExpired:
            process.kill()
            print(f'{{"section": "{name}", "stopped": "out of time"}}', flush=True)


if __name__ == "__main__":
    main()
