"""dSFT, then dDPO, of one model on one device, measured on pairs held back: Zephyr's two steps at a size that runs.

    python bench/gpu/train.py --model smollm2-135m-instruct --sft ROWS.jsonl --pairs PAIRS.json --out DIR

Both files are anything that `martlet sft --dataset` takes; without --sft only the second step runs. It writes
DIR/train.json (settings, first loss, reward accuracy and margin on held-out pairs after, seconds) and
DIR/{sft,dpo}_*.png. Before the second step every margin is 0, since the reference is the model as it begins.
`--split CHECKPOINT --parts DIR` cuts a model.safetensors into files of at most 16 MiB, and
`--join DIR --to CHECKPOINT` puts them together, for machines that take small files only.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import time
from pathlib import Path
from typing import Any

PART = 16 * 2**20


def split(checkpoint: Path, parts: Path) -> None:
    """All files of `checkpoint`; its weights in pieces named model.safetensors.000, .001, ..."""
    parts.mkdir(parents=True, exist_ok=True)
    for file in checkpoint.iterdir():
        if file.name != "model.safetensors":
            shutil.copy(file, parts)
    with open(checkpoint / "model.safetensors", "rb") as whole:
        for number, piece in enumerate(iter(lambda: whole.read(PART), b"")):
            (parts / f"model.safetensors.{number:03}").write_bytes(piece)


def join(parts: Path, checkpoint: Path) -> None:
    checkpoint.mkdir(parents=True, exist_ok=True)
    pieces = sorted(parts.glob("model.safetensors.*"))
    for file in parts.iterdir():
        if file not in pieces:
            shutil.copy(file, checkpoint)
    with open(checkpoint / "model.safetensors", "wb") as whole:
        for piece in pieces:
            whole.write(piece.read_bytes())


def step(kind: str, model: str, data: str, given: argparse.Namespace) -> dict[str, Any]:
    """One of the two steps: its settings are Zephyr's, but for the size of batches and, with LoRA, the rate."""
    from martlet.train.arguments import RlhfArguments, SftArguments
    from martlet.train.run import train

    rates = {"sft": 2e-5, "dpo": 5e-7} if given.sft_type == "full" else {"sft": 2e-4, "dpo": 5e-5}
    settings: dict[str, Any] = {
        "model": model,
        "dataset": (data,),
        "dataset_test_ratio": given.held,
        "sft_type": given.sft_type,
        "target_modules": ("ALL",),
        "lora_dropout": 0.0,
        "max_length": given.max_length,
        "batch_size": given.batch_size,
        "gradient_accumulation_steps": given.accumulate,
        "num_train_epochs": given.epochs,
        "max_steps": given.max_steps,
        "learning_rate": (given.rate if kind == "dpo" else None) or rates[kind],
        "weight_decay": 0.0,
        "warmup_ratio": 0.1,
        "logging_steps": 1,
        "evaluation_strategy": "epoch",
        "save_strategy": "epoch",
        "save_only_model": True,
        "report_to": ("none",),
        "output_dir": str(given.out / kind),
        "device": given.device,
    }
    arguments = RlhfArguments(**settings, beta=given.beta) if kind == "dpo" else SftArguments(**settings)
    began = time.monotonic()
    result = train(arguments)
    assert result is not None
    steps = [line for line in result.log_history if "loss" in line]
    evaluations = [line for line in result.log_history if "eval_loss" in line]
    for picture in Path(result.output_dir, "images").glob("*.png"):
        shutil.copy(picture, given.out / f"{kind}_{picture.name}")
    names = ("loss", "rewards/accuracies", "rewards/margins")
    return {
        "learning_rate": arguments.learning_rate,
        "steps": result.global_step,
        "first_loss": steps[0]["loss"],
        "last_loss": steps[-1]["loss"],
        "held_out": [{n: e[f"eval_{n}"] for n in names if f"eval_{n}" in e} | {"step": e["step"]} for e in evaluations],
        "train_seconds": result.train_time,
        "seconds": round(time.monotonic() - began, 1),
        "checkpoint": result.last_model_checkpoint,
        "sft_type": arguments.sft_type,
    }


def merged(model: str, checkpoint: str, target: Path) -> str:
    """A folder of the model with the adapter of the first step in its weights, for the second to begin from."""
    from peft import PeftModel

    from martlet import hub
    from martlet.backends.transformers_model import load_model
    from martlet.runners.base import LoadOptions

    card = hub.resolve(model)
    whole = load_model(card, LoadOptions(device="cpu", dtype="float32"))
    PeftModel.from_pretrained(whole, checkpoint).merge_and_unload().save_pretrained(target)
    hub.load_tokenizer(card).save(target)
    return str(target)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--sft", help="rows for the first step")
    parser.add_argument("--pairs", help="preference pairs for the second")
    parser.add_argument("--out", type=Path, default=Path("train-out"))
    parser.add_argument("--sft_type", choices=("full", "lora"), default="full")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--held", type=float, default=0.2, help="part held back to measure on")
    parser.add_argument("--epochs", type=float, default=1.0)
    parser.add_argument("--max_steps", type=int, default=-1)
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--accumulate", type=int, default=1)
    parser.add_argument("--max_length", type=int, default=1024)
    parser.add_argument("--beta", type=float, default=0.1)
    parser.add_argument("--rate", type=float, help="learning rate of the second step (default: Zephyr's 5e-7)")
    parser.add_argument("--split", type=Path, metavar="CHECKPOINT")
    parser.add_argument("--parts", type=Path)
    parser.add_argument("--join", type=Path, metavar="PARTS")
    parser.add_argument("--to", type=Path)
    given = parser.parse_args()
    if given.split:
        split(given.split, given.parts)
        return
    if given.join:
        join(given.join, given.to)
        return
    if not given.pairs:
        parser.error("--pairs FILE is missing")

    given.out.mkdir(parents=True, exist_ok=True)
    report: dict[str, Any] = {"settings": {name: str(value) for name, value in vars(given).items()}}
    model = given.model
    if given.sft:
        report["sft"] = step("sft", model, given.sft, given)
        checkpoint = report["sft"]["checkpoint"]
        model = checkpoint if given.sft_type == "full" else merged(model, checkpoint, given.out / "sft-merged")
    report["dpo"] = step("dpo", model, given.pairs, given)
    report["ln2"] = math.log(2)
    text = json.dumps(report, indent=1)
    (given.out / "train.json").write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
