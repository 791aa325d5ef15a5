"""The CUDA runner on two ranks, under Triton's interpreter: all of the code but graphs and the memory of real GPUs."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

from engines import answers, card, options

from martlet.runners.torch_runner import TorchRunner


def test_two_ranks_give_the_tokens_of_one(tmp_path):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "TRITON_INTERPRET": "1"}
    environment["CUDA_VISIBLE_DEVICES"] = ""
    command = [sys.executable, str(Path(__file__).with_name("rank.py"))]
    first, second = (
        subprocess.Popen([*command, str(rank), "2", str(tmp_path)], env=environment, stdout=subprocess.PIPE, text=True)
        for rank in range(2)
    )
    said = first.communicate(timeout=120)[0]
    assert first.returncode == 0 == second.wait(timeout=30)
    want = answers(TorchRunner(card("llama"), options("cpu")), max_tokens=2, first=2)
    assert ast.literal_eval(said) == {key: tokens for key, (tokens, *_) in want.items()}
