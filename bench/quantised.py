"""What `martlet export --quant_bits` costs and gives: size, quality on text that nobody calibrated on, decoding speed.

    python bench/quantised.py --text FILE [--model NAME] [--exports DIR] [--report bench/results/quantised.md]

The first half of FILE calibrates, the end of it is what perplexity is measured on. Everything runs on our CPU engine;
quality is against the same checkpoint in float32. Exports that lie in DIR from another run are used again. Speeds take
turns, and the best of the rounds counts: tokens a second of one sequence.
"""

from __future__ import annotations

import argparse
import json
import logging
import platform
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from martlet import __version__, hub
from martlet.bench.quality import logprobs
from martlet.engine.engine import Engine, drain
from martlet.engine.options import EngineOptions
from martlet.engine.request import Request
from martlet.export.arguments import ExportArguments
from martlet.export.run import export
from martlet.hub.card import ModelCard
from martlet.runners import LoadOptions, load, machine
from martlet.sampling_params import SamplingParams

EXPORTS: dict[str, dict[str, Any]] = {
    "rtn-int8": {"quant_method": "rtn", "quant_bits": 8},
    "rtn-int4": {"quant_method": "rtn", "quant_bits": 4},
    "gptq-int4": {"quant_method": "gptq", "quant_bits": 4, "quant_act_order": False},
    "gptq-int4-act-order": {"quant_method": "gptq", "quant_bits": 4},
    "awq-int4": {"quant_method": "awq", "quant_bits": 4},
}
PASSAGE = 1024  # tokens of held-out text at once


def passages(card: ModelCard, text: str, tokens: int) -> list[list[int]]:
    """The last `tokens` tokens of the text."""
    ids = hub.load_tokenizer(card).encode(text[-8 * tokens :])[-tokens:]
    return [ids[at : at + PASSAGE] for at in range(0, len(ids), PASSAGE)]


def exported(args: argparse.Namespace, folder: Path, rows: Path) -> dict[str, ModelCard]:
    cards = {}
    for name, how in EXPORTS.items():
        target = folder / name
        if not target.exists():
            began = time.perf_counter()
            how = how | {"quant_group_size": None if how["quant_bits"] == 8 else args.group}
            if how["quant_method"] != "rtn":
                how |= {"dataset": (str(rows),), "quant_n_samples": args.samples, "quant_seqlen": args.seqlen}
            export(ExportArguments(model=args.model, output=str(target), **how))
            print(f"{name}: exported in {time.perf_counter() - began:.0f} s", file=sys.stderr, flush=True)
        cards[name] = hub.resolve(str(target))
    return cards


def size(card: ModelCard) -> int:
    files = [card.path] if card.path.is_file() else card.path.glob("*.safetensors")
    return sum(file.stat().st_size for file in files)


def speeds(models: dict[str, tuple[ModelCard, str | None]], rounds: int, tokens: int) -> dict[str, float]:
    """Tokens a second of one sequence, the best of the rounds."""
    engines, best = {}, dict.fromkeys(models, 0.0)
    for name, (card, quant) in models.items():
        options = LoadOptions(device="cpu", quant=quant, max_num_seqs=1, max_model_len=512)
        engines[name] = Engine(load(card, options), options=EngineOptions(enable_prefix_caching=False))
    params = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, detokenize=False)
    for turn in range(rounds):
        for name, engine in engines.items():
            engine.add(Request(str(turn), list(range(100, 132)), params))
            engine.step()
            began = time.perf_counter()
            drain(engine, [])
            best[name] = max(best[name], (tokens - 1) / (time.perf_counter() - began))
    for engine in engines.values():
        engine.close()
    return best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--exports", type=Path)
    parser.add_argument("--group", type=int, default=64)
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--seqlen", type=int, default=512)
    parser.add_argument("--held_out", type=int, default=4096, help="tokens")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=96, help="decoded a round; 0: no speeds")
    parser.add_argument("--report", type=Path)
    args = parser.parse_args()
    logging.getLogger("martlet").setLevel(logging.WARNING)
    card, text = hub.resolve(args.model), args.text.read_text(encoding="utf-8")
    with tempfile.TemporaryDirectory() as scratch:
        folder = args.exports or Path(scratch)
        folder.mkdir(parents=True, exist_ok=True)
        rows = Path(scratch) / "rows.jsonl"
        lines = [line for line in text[: len(text) // 2].splitlines() if line.strip()]
        rows.write_text("\n".join(json.dumps({"text": line}) for line in lines), encoding="utf-8")
        quantised = exported(args, folder, rows)
        models: dict[str, tuple[ModelCard, str | None]] = {
            "as it is": (card, None), "as it is, bf16": (card, "bf16"), "as it is, --quant int8": (card, "int8"),
            "as it is, --quant int4": (card, "int4"), **{name: (one, None) for name, one in quantised.items()},
        }  # fmt: skip
        texts = passages(card, text, args.held_out)
        exact, isa = logprobs(card, "float32", texts)
        fast = speeds(models, args.rounds, args.tokens) if args.tokens else {}
        table = [
            "| weights | file, MB | mean change of log-probability | perplexity | decode, tok/s |",
            "|---|---|---|---|---|",
            f"| float32 of the same file | - | - | {np.exp(-exact.mean()):.2f} | - |",
        ]
        for name, (one, quant) in models.items():
            found, _ = logprobs(one, quant, texts)
            change, perplexity = np.abs(found - exact).mean(), np.exp(-found.mean())
            speed = f"{fast[name]:.0f}" if fast else "-"
            table.append(f"| {name} | {size(one) / 1e6:.0f} | {change:.3f} | {perplexity:.2f} | {speed} |")
            print(table[-1], file=sys.stderr, flush=True)
    words = " ".join(f"--{key} {value}" for key, value in vars(args).items() if key in ("group", "samples", "seqlen"))
    report = f"""# Quantised exports of {card.name}

Martlet {__version__}, {platform.processor() or platform.machine()}, {machine.usable_cores()} cores ({isa}).

    python bench/quantised.py --text FILE --model {args.model} {words} --held_out {args.held_out}

{args.samples} sequences of {args.seqlen} tokens of English encyclopedia text calibrate gptq and awq; the last
{len(exact):,} tokens of the file, which none of them saw, are what quality is measured on. {args.group} inputs share a
scale (int8: all of a row). Heads and embeddings of exports stay float16.

"""
    print(report + "\n".join(table))
    if args.report:
        args.report.write_text(report + "\n".join(table) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
