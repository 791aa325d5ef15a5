"""All engines on all workloads of `martlet bench gpu`, one process after the other, since a GPU is measured alone."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from martlet.bench import load
from martlet.bench.engines import missing
from martlet.bench.gpu import shapes
from martlet.bench.made_up import model_folder
from martlet.bench.offline import Result
from martlet.bench.serving import serving
from martlet.bench.timeline import figures
from martlet.errors import MartletError, UsageError, did_you_mean

ENGINES = ("native", "vllm", "transformers")
VARIANTS: dict[str, dict[str, Any]] = {  # of the native engine
    "": {},
    "fp8_kv": {"kv_dtype": "fp8"},
    "fp8": {"kv_dtype": "fp8", "quant": "fp8"},
}


@dataclass(frozen=True, slots=True)
class Entry:
    """One word of --engines: NAME[:VARIANT][@G1+G2]. only: the workloads it is for, all when empty."""

    name: str
    variant: str
    only: tuple[str, ...] = ()

    @property
    def label(self) -> str:
        return f"{self.name}:{self.variant}" if self.variant else self.name


@dataclass(frozen=True, slots=True)
class Plan:
    """seconds: the most that one process of an engine may take; what it has measured by then counts."""

    models: tuple[str, ...]
    workloads: tuple[str, ...]
    clients: tuple[int, ...]
    seconds: float
    device: str = "cuda"


def parse(word: str) -> Entry:
    word, _, only = word.partition("@")
    name, _, variant = word.partition(":")
    if name not in ENGINES:
        known = f"there are {', '.join(ENGINES)}.{did_you_mean(name, ENGINES)}"
        raise UsageError(f"no engine {name!r} is measured on a GPU; {known}", param="engines")
    if variant not in (VARIANTS if name == "native" else ("",)):
        said = f"variants are of the native engine: {', '.join(f'native:{v}' for v in VARIANTS if v)}"
        raise UsageError(f"--engines {word!r}: {said}", param="engines")
    shapes.check("workload", tuple(only.split("+")) if only else (), shapes.WORKLOADS)
    return Entry(name, variant, tuple(only.split("+")) if only else ())


def installed(entries: Sequence[Entry], tell: Callable[[str], None]) -> list[Entry]:
    """Those that this Python has; the others are told of."""
    found = []
    for entry in entries:
        reason = missing(entry.name)
        if reason is None:
            found.append(entry)
        else:
            tell(f"{entry.label} is skipped: {reason}")
    return found


def measure_all(entries: Sequence[Entry], plan: Plan, tell: Callable[[Result], None]) -> list[Result]:
    """tell(result) is called as soon as there is one."""
    results = []
    for model in plan.models:
        for entry in entries:
            for result in _measure(entry, model, plan):
                tell(result)
                results.append(result)
    return results


def _measure(entry: Entry, model: str, plan: Plan) -> Iterator[Result]:
    config = shapes.SHAPES[model]
    with tempfile.TemporaryDirectory() as folder:
        names = [name for name in plan.workloads if not entry.only or name in entry.only]
        whole = model_folder(Path(folder) / "whole" / model, config)
        adapted = ["G6"] if "G6" in names and model == shapes.ADAPTED and entry.variant != "fp8" else []
        for group in ([name for name in names if name not in ("G5", "G6")], adapted):
            if group:
                yield from _offline(entry, model, whole, group, plan)
        if "G5" in names:
            served = config | {"vocab_size": shapes.SERVED_VOCABULARY, "max_position_embeddings": 8192}
            yield from _served(entry, model, model_folder(Path(folder) / "served" / model, served), plan)


def _result(entry: Entry, model: str, workload: str) -> Result:
    return Result(entry.label, model, workload, kind=entry.name, weights="fp8" if entry.variant == "fp8" else "bf16")


def _offline(entry: Entry, model: str, folder: Path, names: list[str], plan: Plan) -> Iterator[Result]:
    """One process, a result as each of its lines comes. Where its start is measured, caches of kernels are cold."""
    with tempfile.TemporaryDirectory() as scratch, tempfile.TemporaryFile() as log:
        cold = {"TRITON_CACHE_DIR": scratch, "VLLM_CACHE_ROOT": scratch} if "start" in names else {}
        order = {"device": plan.device, "backend": entry.name, "options": VARIANTS[entry.variant]}
        order |= {"folder": str(folder), "scratch": scratch, "workloads": names}
        command = [sys.executable, "-m", "martlet.bench.gpu.worker"]
        order["spawned"] = time.monotonic()
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, env=os.environ | cold
        )
        assert process.stdin is not None and process.stdout is not None
        stop = threading.Timer(plan.seconds, process.kill)
        stop.start()
        left = dict.fromkeys(names)
        try:
            process.stdin.write(json.dumps(order).encode())
            process.stdin.close()
            for line in process.stdout:
                answer = json.loads(line)
                left.pop(answer["workload"], None)
                result = _result(entry, model, answer["workload"])
                result.runs, result.error = [answer.get("figures", {})], answer.get("error")
                result.runs = [] if result.error else result.runs
                yield result
            process.wait()
        finally:
            stop.cancel()
            process.kill()
            process.wait()
        log.seek(0)
        tail = "\n".join(log.read().decode(errors="replace").splitlines()[-12:])
    for name in left:
        result = _result(entry, model, name)
        result.error = f"it did not come within {plan.seconds:g} s, or the process ended:\n{tail}"
        yield result


def _served(entry: Entry, model: str, folder: Path, plan: Plan) -> Iterator[Result]:
    prompts = shapes.served_prompts(4 * max(plan.clients))
    try:
        with serving(_command(entry, folder, plan.device)) as server:
            target = load.Target(server.port, "bench", 128)
            load.measure(load.Target(server.port, "bench", 8), prompts[:16], 8)
            time.sleep(shapes.SETTLES)
            load.measure(target, prompts[: max(plan.clients)], max(plan.clients))
            for clients in plan.clients:
                result = _result(entry, model, f"G5 x{clients}")
                found = load.measure(target, prompts[: max(4, 4 * clients)], clients)
                result.runs, result.load_seconds = [figures(found)], server.ready_seconds
                yield result
    except MartletError as error:
        result = _result(entry, model, "G5")
        result.error = str(error)
        yield result


def _command(entry: Entry, folder: Path, device: str) -> list[str]:
    """Words to start a server with, {port} left open."""
    if entry.name == "vllm":
        words = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder)]
        words += [
            "--load-format",
            "dummy",
            "--served-model-name",
            "bench",
            "--port",
            "{port}",
            "--max-model-len",
            "8192",
        ]
        return [*words, "--no-enable-prefix-caching", "--gpu-memory-utilization", "0.8"]
    words = [sys.executable, "-m", "martlet", "deploy", "--model", str(folder), "--load_format", "dummy"]
    words += ["--infer_backend", entry.name, "--device", device, "--dtype", "bfloat16", "--port", "{port}"]
    words += ["--max_model_len", "8192", "--max_num_seqs", str(shapes.MAX_SEQUENCES), "--served_model_name", "bench"]
    words += ["--enable_prefix_caching", "false", "--log_level", "warning", "--log_interval", "0"]
    options = VARIANTS[entry.variant]
    words += ["--kv_cache_dtype", options["kv_dtype"]] if "kv_dtype" in options else []
    return words + (["--quant", options["quant"]] if "quant" in options else [])
