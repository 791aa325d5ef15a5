"""dSFT, then dDPO, of one model on one device, measured on pairs held back: Zephyr's two steps at a size that runs.

    python bench/gpu/train.py --model smollm2-135m-instruct --sft ROWS.json --pairs PAIRS.json --out DIR

Both files are anything that `martlet sft --dataset` takes; without --sft only the second step runs. With several
--rate the second step runs once with each, from the same beginning. It writes DIR/train.json (settings, versions, first
loss, reward accuracy and margin on held-out pairs after, seconds, peak memory) and DIR/{sft,dpo-RATE}_*.png. Before the
second step every margin is 0, since the reference is the model as it begins.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import platform
import shutil
import time
from importlib import metadata
from pathlib import Path
from typing import Any

LIBRARIES = ("torch", "transformers", "trl", "peft", "accelerate", "datasets")
RATES = {"sft": {"full": 2e-5, "lora": 2e-4}, "dpo": {"full": 5e-7, "lora": 5e-6}}  # Zephyr's
MEASURED = ("loss", "rewards/accuracies", "rewards/margins")


def step(kind: str, name: str, model: str, data: str, rate: float, given: argparse.Namespace) -> dict[str, Any]:
    """One of the two steps: its settings are Zephyr's, but for the size of batches and what `given` says."""
    import torch

    from martlet.train.arguments import RlhfArguments, SftArguments
    from martlet.train.run import train

    settings: dict[str, Any] = {
        "model": model,
        "dataset": (data,),
        "dataset_test_ratio": given.held,
        "truncation_strategy": "truncation_right",
        "sft_type": given.sft_type,
        "dtype": given.dtype,
        "max_length": given.max_length,
        "batch_size": given.batch_size,
        "gradient_accumulation_steps": given.accumulate,
        "num_train_epochs": given.epochs if kind == "dpo" else 1.0,
        "max_steps": given.max_steps,
        "learning_rate": rate,
        "adam_beta2": 0.999,
        "weight_decay": 0.0,
        "warmup_ratio": 0.1,
        "gradient_checkpointing": False,
        "logging_steps": 1,
        "evaluation_strategy": "epoch",
        "save_strategy": "epoch",
        "save_total_limit": 1,
        "save_only_model": True,
        "report_to": ("none",),
        "disable_tqdm": True,
        "output_dir": str(given.out / name),
        "device": given.device,
    }
    if given.sft_type == "lora":
        dropout = 0.0 if kind == "dpo" else 0.05
        settings |= {"target_modules": ("ALL",), "lora_rank": 16, "lora_alpha": 16, "lora_dropout": dropout}
    if kind == "dpo":
        arguments = RlhfArguments(**settings, beta=given.beta, max_prompt_length=given.max_length // 2)
    else:
        arguments = SftArguments(**settings)
    on_gpu = given.device != "cpu" and torch.cuda.is_available()
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    began = time.monotonic()
    result = train(arguments)
    assert result is not None
    steps = [line for line in result.log_history if "loss" in line]
    evaluations = [line for line in result.log_history if "eval_loss" in line]
    for curve in MEASURED:
        picture = Path(result.output_dir, "images", f"{curve.replace('/', '_')}.png")
        if picture.exists():
            shutil.copy(picture, given.out / f"{name}_{picture.name}")
    report = {
        "learning_rate": rate,
        "steps": result.global_step,
        "first_loss": steps[0]["loss"],
        "last_loss": steps[-1]["loss"],
        "held_out": [
            {"epoch": e["epoch"]} | {n: e[f"eval_{n}"] for n in MEASURED if f"eval_{n}" in e} for e in evaluations
        ],
        "steps_seen": {n: [line[n] for line in steps] for n in MEASURED if n in steps[0]},
        "train_seconds": result.train_time,
        "seconds": round(time.monotonic() - began, 1),
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

    model = given.model
    if given.sft:
        report["sft"] = step("sft", "sft", model, given.sft, RATES["sft"][given.sft_type], given)
        keep()
        model = report["sft"]["checkpoint"]
        if given.sft_type == "lora":
            model = merged(model, given.out / "sft-merged")
    report["dpo"] = []
    for rate in given.rate or [RATES["dpo"][given.sft_type]]:
        report["dpo"].append(step("dpo", f"dpo-{rate:g}", model, given.pairs, rate, given))
        keep()
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
