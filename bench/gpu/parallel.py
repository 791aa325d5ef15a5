"""Two GPUs against one: are the tokens the same, what do sums cost, how much faster is llama3-8b, what if a rank dies.

    python bench/gpu/parallel.py [--sections sums,same-llama,...,kill-SIGKILL] [--ranks 2] [--out FOLDER] [--limit 420]

One JSON line a result, on standard output and in FOLDER/parallel.jsonl. Each section runs in a process of its own under
a limit of time. Where ranks do not give the tokens of one through memory that they share, what follows goes through
NCCL alone and says so. Workloads are those of `martlet bench gpu`.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from pathlib import Path

BEGAN = time.perf_counter()
ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "src"), str(ROOT / "tests" / "cuda")]

SECTIONS = {  # the most seconds each may take
    "sums": 45, "same-llama": 40, "same-gemma2": 40, "same-bf16": 60, "one": 80, "two": 80, "kill-SIGKILL": 60,
    "kill-SIGSTOP": 60, "large": 90,
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sections", default=",".join(SECTIONS))
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--model", default="llama3-8b")
    parser.add_argument("--out", help="folder for parallel.jsonl")
    parser.add_argument("--limit", type=float, default=420.0, help="seconds after which nothing goes on")
    parser.add_argument("--nccl", action="store_true", help="sums through NCCL alone")
    parser.add_argument("--section", help=argparse.SUPPRESS)
    parser.add_argument("--rank", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--store", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.section is None:
        drive(args)
        return
    import report

    if args.out:
        report.log = (Path(args.out) / "parallel.jsonl").open("a")
    began = time.perf_counter()
    try:
        name, _, detail = args.section.partition("-")
        call = {"sums": sums, "same": same, "one": one, "two": two, "large": large, "kill": kill, "victim": victim}[
            name
        ]
        call(args, detail) if detail else call(args)
    except BaseException:
        report.say(args.section, failed=traceback.format_exc()[-3000:])
        os._exit(1)  # a step that never ends must not hold the process
    if not args.rank and args.section != "victim":
        report.say(args.section, section_seconds=time.perf_counter() - began)
    sys.stdout.flush()
    os._exit(0)


def drive(args: argparse.Namespace) -> None:
    for name in args.sections.split(","):
        left = args.limit - (time.perf_counter() - BEGAN)
        if left < 10:
            print(json.dumps({"section": name, "left_out": "out of time"}), flush=True)
            continue
        well = run(name, args, min(SECTIONS[name], left))
        if name.startswith("same") and not well and not args.nccl:
            args.nccl = True
            print(json.dumps({"section": name, "again": "through NCCL alone"}), flush=True)
            run(name, args, min(SECTIONS[name], args.limit - (time.perf_counter() - BEGAN)))


def command(section: str, args: argparse.Namespace, *more: str) -> list[str]:
    flags = ["--section", section, "--ranks", str(args.ranks), "--model", args.model, *more]
    flags += ["--out", args.out] if args.out else []
    return [sys.executable, "-u", __file__, *flags, *(["--nccl"] if args.nccl else [])]


def run(name: str, args: argparse.Namespace, seconds: float) -> bool:
    """A section in a process of its own; whether it ended well in time."""
    process = subprocess.Popen(command(name, args))
    try:
        return process.wait(max(seconds, 1.0)) == 0
    except subprocess.TimeoutExpired:
        process.kill()  # its ranks end with it
        process.wait()
        print(json.dumps({"section": name, "stopped": f"after {seconds:.0f} s"}), flush=True)
        return False


def settings(args: argparse.Namespace, **more):
    from martlet.runners.base import LoadOptions

    return LoadOptions(device="cuda", symmetric_memory=not args.nccl, **more)


def sums(args: argparse.Namespace) -> None:
    """What a sum costs, by every way there is, in a graph of 20; `place` as in a step, width of llama3-8b."""
    with tempfile.TemporaryDirectory() as folder:
        others = [
            subprocess.Popen(command("sums", args, "--rank", str(rank), "--store", f"{folder}/store"))
            for rank in range(1, args.ranks if args.rank is None else 1)
        ]
        try:
            _sums(args, args.rank or 0, args.store or f"{folder}/store")
        finally:
            for other in others:
                other.kill()


def _sums(args: argparse.Namespace, rank: int, store: str) -> None:
    import torch
    import torch.distributed as dist
    from report import card, say

    from martlet.kernels.cuda import layers
    from martlet.model.shard import split
    from martlet.model.weights import read_spec
    from martlet.runners.cuda_runner.ranks import MLP, Ranks, shared_memory
    from martlet.runners.torch_runner.collectives import Nccl

    torch.cuda.set_device(rank)
    device = torch.device("cuda", rank)
    group = Nccl(rank, args.ranks, store)
    spec = split(read_spec(card("llama3-8b")), rank, args.ranks)
    width, dtype = spec.width, torch.bfloat16
    ranks = Ranks(group, spec, dtype, 8192, 272, lambda size: shared_memory(group, size, device))
    if rank == 0:
        peers = [torch.cuda.can_device_access_peer(0, other) for other in range(1, args.ranks)]
        say("sums", cards=torch.cuda.get_device_name(), peers=peers, shared=ranks.memory is not None)
    torch.manual_seed(rank)
    gain = torch.ones(width, dtype=dtype, device=device)
    ours = {}
    try:
        import torch.distributed._symmetric_memory as symmetric

        whole = symmetric.empty(8192 * width, dtype=dtype, device=device)
        symmetric.rendezvous(whole, dist.group.WORLD)
        name = dist.group.WORLD.group_name
        ours = {
            "one_shot": lambda x, share: torch.ops.symm_mem.one_shot_all_reduce(whole[: share.numel()], "sum", name),
            "two_shot": lambda x, share: torch.ops.symm_mem.two_shot_all_reduce_(whole[: share.numel()], "sum", name),
        }
    except Exception as error:
        say("sums", rank=rank, torch_symmetric_memory=repr(error)[:300])

    def timed(call) -> float:
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            for _ in range(3):
                call()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            for _ in range(20):
                call()
        group.least(0)
        found = []
        for _ in range(5):
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record()
            graph.replay()
            end.record()
            end.synchronize()
            found.append(begin.elapsed_time(end) * 50)
        return sorted(found)[2]

    for count in (1, 8, 64, 256, 1024, 4096, 8192):
        x = torch.randn(count, width, device=device).to(dtype)
        plain = torch.randn(count, width, device=device).to(dtype)
        ways = {
            "nccl": lambda x=x, plain=plain: dist.all_reduce(plain),
            "nccl, norm": lambda x=x, plain=plain: layers.add_rms_norm(x, group.all_reduce(plain), gain, 1e-5),
        }
        error = None
        if ranks.memory is not None:
            share = ranks.place(MLP, count, device)
            share.copy_(plain)
            want = group.all_reduce(plain.float().clone())
            error = float((ranks.total(share).float() - want).abs().max() / want.abs().max())
            ways["ours"] = lambda x=x, share=share: ranks.total(share)
            ways["ours, norm"] = lambda x=x, share=share: ranks.add_rms_norm(x, share, gain, 1e-5)
            if count == 1:
                ways["ours, added"] = lambda x=x, share=share: ranks.add(x, share)
        for way, call in ours.items():
            ways[way] = lambda call=call, x=x, plain=plain: call(x, plain)
        found = {}
        for way, call in ways.items():
            try:
                found[way] = timed(call)
            except Exception as problem:
                found[way] = repr(problem)[:200]
        if rank == 0:
            say("sums", rows=count, kib=count * width * 2 / 1024, us=found, error=error)
    if ranks.memory is not None:
        for count in (1, 64, 256):
            y = torch.randn(count, ranks.each, device=device)
            us = timed(lambda y=y: ranks.logits(y, spec))
            same = bool((ranks.logits(y, spec)[:, rank * ranks.each :][:, : ranks.each] == y).all())
            if rank == 0:
                say("sums", logits=count, us=us, same=same, nccl_us=timed_or_not(timed, group, y, spec))
            else:
                timed_or_not(timed, group, y, spec)


def timed_or_not(timed, group, y, spec):
    try:
        return timed(lambda: group.gather(y, spec))
    except Exception as problem:
        return repr(problem)[:200]


def same(args: argparse.Namespace, what: str) -> None:
    """Tokens in float32 of several ranks and of one, on a small model of a family; or log-probabilities in bfloat16."""
    from engines import answers, card, check, options
    from report import free, say

    from martlet.runners import load

    if what == "bf16":
        logprobs(args)
        return
    runner = load(card(what), options("cuda"))
    want = answers(runner)
    runner.close()
    free()
    began = time.perf_counter()
    runner = load(card(what), options("cuda", tensor_parallel_size=args.ranks, symmetric_memory=not args.nccl))
    loaded = time.perf_counter() - began
    for again in (False, True):  # the second time, prefills of known shapes are graphs
        check(answers(runner), want)
        say("same", family=what, dtype="float32", again=again, nccl=args.nccl, same=True, load_s=loaded)
    check(answers(runner, max_num_batched_tokens=7, enable_prefix_caching=False), want)
    runner.close()


def logprobs(args: argparse.Namespace) -> None:
    """In bfloat16 on the shape of qwen3-0.6b, of a prompt and of tokens after it: ranks may be no further from float32
    than one GPU is."""
    import numpy as np
    from report import card, free, say

    from martlet.engine.engine import Engine, drain
    from martlet.engine.request import Request
    from martlet.runners import load
    from martlet.sampling_params import SamplingParams

    prompt = np.random.default_rng(0).integers(0, 32000, 700).tolist()
    params = SamplingParams(temperature=0, max_tokens=1, logprobs=0, prompt_logprobs=0, ignore_eos=True)
    found = {}
    for dtype, size in (("float32", 1), ("bfloat16", 1), ("bfloat16", args.ranks)):
        options = settings(
            args, dtype=dtype, max_model_len=2048, max_num_seqs=8, kv_cache_tokens=16384, tensor_parallel_size=size
        )
        runner = load(card("qwen3-0.6b"), options)
        (output,) = drain(Engine(runner), [Request("0", prompt, params)])
        if output.error:
            raise output.error
        found[dtype, size] = np.array([e.logprob for e in output.prompt_logprobs[1:]])
        runner.close()
        free()
    want = found.pop(("float32", 1))
    apart = {size: np.abs(got - want) for (_, size), got in found.items()}
    say("same", model="qwen3-0.6b", dtype="bfloat16", nccl=args.nccl,
        from_float32={size: {"mean": float(gap.mean()), "most": float(gap.max())} for size, gap in apart.items()},
        from_each_other=float(np.abs(np.subtract(*found.values())).max()))  # fmt: skip
    if apart[args.ranks].mean() > 1.25 * apart[1].mean():
        raise AssertionError("in bfloat16, ranks are further from float32 than one GPU is")


def one(args: argparse.Namespace) -> None:
    workloads(args, 1)


def two(args: argparse.Namespace) -> None:
    workloads(args, args.ranks)


def workloads(args: argparse.Namespace, size: int) -> None:
    """G2, G3, G4 and G1, and the start, of `size` GPUs."""
    import logging

    import torch
    from report import card, say

    from martlet.engine.engine import Engine, drain
    from martlet.engine.options import EngineOptions
    from martlet.engine.request import Request
    from martlet.runners import load
    from martlet.sampling_params import SamplingParams

    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())
    logging.getLogger("martlet").addHandler(handler)
    logging.getLogger("martlet").setLevel(logging.INFO)
    options = settings(
        args, dtype="bfloat16", max_model_len=16384, max_num_seqs=256, memory_utilization=0.85,
        tensor_parallel_size=size,
    )  # fmt: skip
    runner = load(card(args.model), options)
    engine = Engine(runner, options=EngineOptions(enable_prefix_caching=False, seed=0))
    numbers = random.Random(0)

    def run(prompts, lengths) -> float:
        requests = [
            Request(str(i), p, SamplingParams(temperature=0, ignore_eos=True, max_tokens=n, detokenize=False))
            for i, (p, n) in enumerate(zip(prompts, lengths, strict=True))
        ]
        began = time.perf_counter()
        outputs = drain(engine, requests)
        took = time.perf_counter() - began
        if errors := [o.error for o in outputs if o.error]:
            raise errors[0]
        return took

    def ids(n):
        return [numbers.randint(0, 31999) for _ in range(n)]

    run([ids(512)], [1])
    about = {"model": args.model, "gpus": size, "nccl": args.nccl}
    say("start", **about, process_to_first_token_s=time.perf_counter() - BEGAN, card=torch.cuda.get_device_name(),
        kv_tokens=runner.memory.num_blocks * 16, log=lines)  # fmt: skip
    single, long, many = [ids(512)], [ids(8192)], [ids(128) for _ in range(64)]
    first, whole = min(run(single, [1]) for _ in range(4)), min(run(single, [257]) for _ in range(3))
    say("G2", **about, ttft_ms=first * 1e3, ms_per_token=(whole - first) / 256 * 1e3)
    say("G3", **about, tok_s=8192 / min(run(long, [1]) for _ in range(4)))
    a, b = (min(run(many, [n] * 64) for _ in range(2)) for n in (1, 257))
    say("G4", **about, tok_s=64 * 256 / (b - a), ms=(b - a) / 256 * 1e3)
    prompts = [ids(numbers.randint(100, 1024)) for _ in range(256)]
    lengths = [numbers.randint(100, 1024) for _ in range(256)]
    for _ in range(2):
        took = run(prompts, lengths)
        say("G1", **about, tok_s=sum(lengths) / took, seconds=took)
    engine.close()


def large(args: argparse.Namespace) -> None:
    """A shape of 70B, which one GPU cannot hold: does it serve, and how fast."""
    from report import MODELS, card, say

    from martlet.engine.engine import Engine, drain
    from martlet.engine.request import Request
    from martlet.runners import load
    from martlet.sampling_params import SamplingParams

    MODELS["llama3-70b"] = MODELS["llama3-8b"] | {
        "num_hidden_layers": 80, "hidden_size": 8192, "intermediate_size": 28672, "num_attention_heads": 64,
    }  # fmt: skip
    options = settings(
        args, dtype="bfloat16", max_model_len=8192, max_num_seqs=64, memory_utilization=0.9,
        tensor_parallel_size=args.ranks,
    )  # fmt: skip
    runner = load(card("llama3-70b"), options)
    engine = Engine(runner)
    numbers = random.Random(0)
    say(
        "large",
        gpus=args.ranks,
        process_to_ready_s=time.perf_counter() - BEGAN,
        kv_tokens=runner.memory.num_blocks * 16,
    )
    for streams in (1, 64):
        prompts = [[numbers.randint(0, 31999) for _ in range(128)] for _ in range(streams)]
        took = {}
        for new in (1, 65):
            params = SamplingParams(temperature=0, ignore_eos=True, max_tokens=new, detokenize=False)
            for turn in range(2):
                began = time.perf_counter()
                outputs = drain(
                    engine, [Request(f"{streams}-{new}-{turn}-{i}", p, params) for i, p in enumerate(prompts)]
                )
                took[new] = time.perf_counter() - began
                if errors := [output.error for output in outputs if output.error]:
                    raise errors[0]
        say("large", gpus=args.ranks, streams=streams, ms_a_token=(took[65] - took[1]) / 64 * 1e3)
    engine.close()


def victim(args: argparse.Namespace) -> None:
    """Ranks under load; says which processes they are, and how it ended."""
    from report import card, say

    from martlet.engine import AsyncEngine
    from martlet.engine.engine import Engine
    from martlet.engine.request import Request
    from martlet.runners import load
    from martlet.sampling_params import SamplingParams

    class Box:
        def __init__(self):
            self.outputs = []

        def put(self, outputs):
            self.outputs += outputs

    options = settings(args, dtype="bfloat16", max_model_len=8192, max_num_seqs=64, tensor_parallel_size=args.ranks)
    runner = load(card("qwen3-0.6b"), options)
    engine, box = AsyncEngine(Engine(runner)), Box()
    params = SamplingParams(temperature=0, max_tokens=8000, ignore_eos=True, detokenize=False)
    engine.submit([Request(str(i), list(range(5, 105 + i)), params, stream=True) for i in range(32)], box)
    while len(box.outputs) < 3200:
        time.sleep(0.01)
    print(json.dumps({"pids": [process.pid for process in runner._ranks._processes]}), flush=True)
    while not box.outputs[-1].last:
        time.sleep(0.01)
    ended = [output for output in list(box.outputs) if output.last]
    say("kill", failed_requests=len(ended), error=str(ended[-1].error), health=engine.stats().error)
    closing = threading.Thread(target=engine.close, daemon=True)
    closing.start()
    closing.join(3.0)
    os._exit(1)


def kill(args: argparse.Namespace, blow: str) -> None:
    """A signal to a rank under load: seconds until the other has left, and what is left on the GPUs."""
    from report import say

    def memory() -> list[int]:
        asked = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
        return [int(line) for line in subprocess.run(asked, capture_output=True, text=True).stdout.split()]

    before = memory()
    process = subprocess.Popen(command("victim", args), stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    for line in process.stdout:
        print(line, end="", flush=True)
        if "pids" in line:
            break
    pids = json.loads(line)["pids"]
    under_load = memory()
    began = time.perf_counter()
    os.kill(pids[0], signal.Signals[blow])
    rest = process.communicate(timeout=30)[0]
    took = time.perf_counter() - began
    print(rest, end="", flush=True)
    left = [pid for pid in pids if Path(f"/proc/{pid}").exists()]
    time.sleep(0.5)
    say("kill", blow=blow, seconds_to_exit=took, exit_code=process.returncode, processes_left=left,
        memory_mib={"before": before, "under_load": under_load, "after": memory()})  # fmt: skip


if __name__ == "__main__":
    main()
