"""How many instructions a decode step takes, counted by valgrind: the same on a busy machine as on a quiet one.

    python bench/cpu/instructions.py             # count, and compare with bench/results/instructions.json
    python bench/cpu/instructions.py --update    # write that file

Two layers of SmolLM2-135M's shapes with a vocabulary of 4,096, one thread, context 128, the AVX2 kernels (valgrind
knows no AVX-512). Exits 1 when a count grew by more than 3 %. Counts compare only between builds of the same compiler.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

RESULTS = Path(__file__).resolve().parents[1] / "results" / "instructions.json"
QUANTS = ("float32", "bf16", "int8", "int4")
CONFIG = {
    "model_type": "llama", "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 2,
    "num_attention_heads": 9, "num_key_value_heads": 3, "vocab_size": 4096, "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5, "rope_theta": 1e5, "tie_word_embeddings": True,
}  # fmt: skip
CONTEXT, STEPS, GROWTH = 128, 4, 1.03


def decode(quant: str, steps: int) -> None:
    """What valgrind watches: a prompt of CONTEXT tokens, then `steps` decode steps."""
    from martlet.hub.card import ModelCard
    from martlet.runners import machine
    from martlet.runners.base import Batch, LoadOptions, NewRow
    from martlet.runners.cpu_runner import CpuRunner
    from martlet.sampling_params import SamplingParams

    machine.usable_cores = lambda: 1
    card = ModelCard("counted", Path(), "dummy", "llama", config=CONFIG)
    runner = CpuRunner(card, LoadOptions(quant=quant, max_num_seqs=1, kv_cache_tokens=256, max_model_len=256))
    row, blocks = np.zeros(1, np.int32), np.arange(16, dtype=np.int32)
    new = NewRow(0, np.arange(CONTEXT, dtype=np.int32), CONTEXT, SamplingParams(temperature=0), seed=0)
    sample = np.ones(1, bool)
    runner.launch(Batch(row, row, row + CONTEXT, sample, None, [new], np.zeros(16, np.int32), blocks, blocks))
    for i in range(steps):
        runner.launch(Batch(row, row + CONTEXT + i, row + 1, sample))


def count(quant: str, steps: int) -> int:
    """Instructions inside Executor::work, which is all that a step computes, of a whole run."""
    with tempfile.NamedTemporaryFile() as out:
        command = ["valgrind", "--tool=callgrind", f"--callgrind-out-file={out.name}", "--collect-atstart=no"]
        command += ["--toggle-collect=martlet::Executor::work*"]
        command += [sys.executable, __file__, "--decode", quant, str(steps)]
        done = subprocess.run(command, capture_output=True, text=True)
    found = re.search(r"Collected : (\d+)", done.stderr)
    if done.returncode or not found or not int(found[1]):
        raise SystemExit(f"valgrind failed or counted nothing: {done.stderr[-800:]}")
    return int(found[1])


def main() -> int:
    if sys.argv[1:2] == ["--decode"]:
        decode(sys.argv[2], int(sys.argv[3]))
        return 0
    compiler = subprocess.run(["c++", "--version"], capture_output=True, text=True).stdout.splitlines()[0]
    counts = {quant: (count(quant, 2 * STEPS) - count(quant, STEPS)) // STEPS for quant in QUANTS}
    if sys.argv[1:] == ["--update"]:
        RESULTS.write_text(json.dumps({"compiler": compiler, "instructions_per_decode_step": counts}, indent=2) + "\n")
        return 0
    kept = json.loads(RESULTS.read_text())
    comparable = kept["compiler"] == compiler
    grown = False
    for quant, now in counts.items():
        before = kept["instructions_per_decode_step"][quant]
        grown |= comparable and now > before * GROWTH
        print(f"{quant:8} {now:>12,} instructions, {now / before:.3f} of those kept")
    if not comparable:
        print(f"counted with {compiler}, kept with {kept['compiler']}: no verdict")
    return int(grown)


if __name__ == "__main__":
    sys.exit(main())
