"""dSFT, then dDPO, of one model on one device, measured on pairs held back: Zephyr's two steps at a size that runs.

    python bench/gpu/train.py --model smollm2-135m-instruct --sft ROWS.json --pairs PAIRS.json --out DIR

Both files are anything that `martlet sft --dataset` takes; without --sft only the second step runs. With several
--rate the second step runs once with each, from the same beginning. With --folds N the second step trains adapters, by
the settings of the CPU's record (bench/results/training.md), N times, each time on all but another part of PAIRS (json
or jsonl), so that every pair is held back once; it begins with the model, and with --sft also with the first step's.

It writes DIR/train.json (settings, versions, first loss, reward accuracy and margin on held-out pairs after, seconds,
peak memory) and DIR/{sft,dpo-RATE}_*.png, with --folds DIR/folds-*.png. Before the second step every margin is 0, since
the reference is the model as it begins.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import platform
import random
import shutil
import statistics
import time
from importlib import metadata
from pathlib import Path
from typing import Any

LIBRARIES = ("torch", "transformers", "trl", "peft", "accelerate", "datasets")
RATES = {"sft": {"full": 2e-5, "lora": 2e-4}, "dpo": {"full": 5e-7, "lora": 5e-6}}  # Zephyr's
MEASURED = ("loss", "rewards/accuracies", "rewards/margins")


def step(kind: str, name: str, model: str, data: str, rate: float, given: argparse.Namespace) -> dict[str, Any]:
    """One of the two steps: its settings are Zephyr's, but for the size of batches and what `given` says."""
    settings: dict[str, Any] = {
        "dataset": (data,),
        "dataset_test_ratio": given.held,
        "sft_type": given.sft_type,
        "dtype": given.dtype,
        "max_length": given.max_length,
        "batch_size": given.batch_size,
        "gradient_accumulation_steps": given.accumulate,
        "num_train_epochs": given.epochs if kind == "dpo" else 1.0,
        "learning_rate": rate,
        "evaluation_strategy": "epoch",
        "save_strategy": "epoch",
        "save_total_limit": 1,
        "save_only_model": True,
    }
    if given.sft_type == "lora":
        dropout = 0.0 if kind == "dpo" else 0.05
        settings |= {"target_modules": ("ALL",), "lora_rank": 16, "lora_alpha": 16, "lora_dropout": dropout}
    if kind == "dpo":
        settings |= {"beta": given.beta, "max_prompt_length": given.max_length // 2}
    report = run(kind, name, model, settings, given)
    for curve in MEASURED:
        picture = Path(report["run"], "images", f"{curve.replace('/', '_')}.png")
        if picture.exists():
            shutil.copy(picture, given.out / f"{name}_{picture.name}")
    return report


def folds(name: str, model: str, max_length: int, given: argparse.Namespace) -> dict[str, Any]:
    """DPO of adapters as the CPU's record has it, once for each part of the pairs held back; all parts together, and
    each. A batch is the record's two of 4 at once."""
    text = Path(given.pairs).read_text("utf-8")
    pairs = json.loads(text) if text.lstrip().startswith("[") else [json.loads(line) for line in text.splitlines()]
    random.Random(0).shuffle(pairs)
    parts = [pairs[i :: given.folds] for i in range(given.folds)]
    runs = []
    for i, held in enumerate(parts):
        files = []
        steps = math.ceil((len(pairs) - len(held)) / 8) if given.max_steps < 0 else given.max_steps
        for kind, rows in (("train", [p for part in parts if part is not held for p in part]), ("held", held)):
            files.append(given.out / f"{kind}-{i}.json")
            files[-1].write_text(json.dumps(rows, ensure_ascii=False), "utf-8")
        settings = {
            "dataset": (str(files[0]),),
            "val_dataset": (str(files[1]),),
            "sft_type": "lora",
            "dtype": given.dtype,
            "target_modules": ("ALL",),
            "lora_rank": 16,
            "lora_alpha": 32,
            "lora_dropout": 0.0,
            "beta": 0.1,
            "learning_rate": 2e-4,
            "max_prompt_length": max_length * 2 // 5,
            "max_length": max_length,
            "batch_size": 8,
            "eval_batch_size": next(n for n in range(20, 0, -1) if len(held) % n == 0),  # a mean of equal batches
            "gradient_accumulation_steps": 1,
            "evaluation_strategy": "steps",
            "eval_steps": math.ceil(steps / 3),
            "save_strategy": "no",
        }
        runs.append(run("dpo", f"{name}-{i}", model, settings, given))
    lasts = [one["held_out"][-1] for one in runs]
    found = {
        "max_length": max_length,
        "held_out_pairs": len(pairs),
        "first_loss": [one["first_loss"] for one in runs],
        "seconds": round(sum(one["seconds"] for one in runs), 1),
    }
    for measure in MEASURED:
        values = [last[measure] for last in lasts]
        weighted = sum(v * len(part) for v, part in zip(values, parts, strict=True)) / len(pairs)
        found[measure] = {"all": weighted, "each": values, "spread": statistics.pstdev(values)}
    draw_folds(runs, given.out / f"{name}.png", f"{name}: every pair held back once, {given.folds} runs")
    return found | {"runs": runs}


def draw_folds(runs: list[dict[str, Any]], target: Path, title: str) -> None:
    """Curves of training loss, and of accuracy and margin on held-out pairs: each run thin, their mean thick."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, every = pyplot.subplots(1, 3, figsize=(12, 3.6), layout="constrained")
    figure.suptitle(title)
    for axes, measure in zip(every, MEASURED, strict=True):
        if measure == "loss":
            curves = [list(enumerate(one["steps_seen"]["loss"], 1)) for one in runs]
            begin, label = math.log(2), "training loss"
        else:
            begin = 0.5 if measure == "rewards/accuracies" else 0.0
            curves = [[(0, begin), *((e["step"], e[measure]) for e in one["held_out"])] for one in runs]
            label = f"{measure}, held-out pairs"
        for curve in curves:
            axes.plot(*zip(*curve, strict=True), color="tab:blue", alpha=0.3, linewidth=1)
        mean = [(points[0][0], statistics.mean(value for _, value in points)) for points in zip(*curves, strict=False)]
        axes.plot(*zip(*mean, strict=True), color="tab:blue")
        axes.axhline(begin, color="grey", linestyle=":")
        axes.set(xlabel="step", title=label)
        axes.grid(alpha=0.3)
    figure.savefig(target, dpi=100)
    pyplot.close(figure)


def run(kind: str, name: str, model: str, settings: dict[str, Any], given: argparse.Namespace) -> dict[str, Any]:
    """Train with `settings`, and what all runs have in common."""
    import torch

    from martlet.train.arguments import RlhfArguments, SftArguments
    from martlet.train.run import train

    settings |= {
        "model": model,
        "truncation_strategy": "truncation_right",
        "max_steps": given.max_steps,
        "adam_beta2": 0.999,
        "weight_decay": 0.0,
        "warmup_ratio": 0.1,
        "gradient_checkpointing": False,
        "logging_steps": 1,
        "report_to": ("none",),
        "disable_tqdm": True,
        "output_dir": str(given.out / name),
        "device": given.device,
    }
    on_gpu = given.device != "cpu" and torch.cuda.is_available()
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    began = time.monotonic()
    result = train(RlhfArguments(**settings) if kind == "dpo" else SftArguments(**settings))
    assert result is not None
    steps = [line for line in result.log_history if "loss" in line]
    evaluations = [line for line in result.log_history if "eval_loss" in line]
    report = {
        "learning_rate": settings["learning_rate"],
        "steps": result.global_step,
        "first_loss": steps[0]["loss"],
        "last_loss": steps[-1]["loss"],
        "held_out": [
            {"step": e["step"], "epoch": e["epoch"]} | {n: e[f"eval_{n}"] for n in MEASURED if f"eval_{n}" in e}
            for e in evaluations
        ],
        "steps_seen": {n: [line[n] for line in steps] for n in MEASURED if n in steps[0]},
        "train_seconds": result.train_time,
        "seconds": round(time.monotonic() - began, 1),
        "run": result.output_dir,
        "checkpoint": result.last_model_checkpoint,
    }
    if on_gpu:
        report["peak_gib"] = round(torch.cuda.max_memory_allocated() / 2**30, 2)
    gc.collect()  # a trainer and its model are a cycle, and the next step needs the room
    torch.cuda.empty_cache()
    return report


def merged(checkpoint: str, target: Path) -> str:
    """A folder of the model with the adapter of the first step in its weights, for the second to begin from."""
    from martlet.export.arguments import ExportArguments
    from martlet.export.run import export

    return str(export(ExportArguments(ckpt_dir=checkpoint, merge_lora=True, output=str(target))))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2-135m-instruct", help="a name, a folder or a .gguf file")
    parser.add_argument("--sft", help="rows for the first step")
    parser.add_argument("--pairs", required=True, help="preference pairs for the second")
    parser.add_argument("--out", type=Path, default=Path("train-out"))
    parser.add_argument("--sft_type", choices=("full", "lora"), default="full")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--dtype", choices=("AUTO", "bf16", "fp16", "fp32"), default="AUTO")
    parser.add_argument("--held", type=float, default=0.2, help="part held back to measure on")
    parser.add_argument("--epochs", type=float, default=1.0, help="of the second step")
    parser.add_argument("--max_steps", type=int, default=-1)
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--accumulate", type=int, default=1)
    parser.add_argument("--max_length", type=int, default=1024)
    parser.add_argument("--beta", type=float, default=0.1)
    parser.add_argument("--rate", type=float, action="append", help="learning rate of the second step (Zephyr's)")
    parser.add_argument("--folds", type=int, default=0, help="the second step as adapters, every pair held back once")
    parser.add_argument("--fold_length", type=int, action="append", help="most tokens of its sequences (160)")
    given = parser.parse_args()

    import torch

    given.out.mkdir(parents=True, exist_ok=True)
    on_gpu = given.device != "cpu" and torch.cuda.is_available()
    report: dict[str, Any] = {
        "device": torch.cuda.get_device_name() if on_gpu else platform.processor() or platform.machine(),
        "versions": {name: metadata.version(name) for name in LIBRARIES},
        "settings": {name: str(value) for name, value in vars(given).items()},
        "ln2": math.log(2),
    }

    def keep() -> None:
        (given.out / "train.json").write_text(json.dumps(report, indent=1) + "\n")

    models = {"model": given.model}
    if given.sft:
        report["sft"] = step("sft", "sft", given.model, given.sft, RATES["sft"][given.sft_type], given)
        keep()
        models["sft"] = report["sft"]["checkpoint"]
        if given.sft_type == "lora":
            models["sft"] = merged(models["sft"], given.out / "sft-merged")
    if given.folds:
        for length in given.fold_length or [160]:
            for begins, model in models.items():
                name = f"folds-{begins}-{length}"
                report[name] = folds(name, model, length, given)
                keep()
    else:
        report["dpo"] = []
        for rate in given.rate or [RATES["dpo"][given.sft_type]]:
            report["dpo"].append(step("dpo", f"dpo-{rate:g}", models.get("sft", given.model), given.pairs, rate, given))
            keep()
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
