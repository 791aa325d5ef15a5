"""The recipe that trains a small RWKV: what it writes is served, and the engine sees the network that was trained."""

import importlib.util
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from martlet import LLM, SamplingParams

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def recipe():
    spec = importlib.util.spec_from_file_location("rwkv_recipe", ROOT / "recipes/rwkv5-small/train.py")
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_chunks_give_what_steps_give(recipe):
    torch.manual_seed(0)
    r, k, v = (torch.randn(2, 3, 64, 8) for _ in range(3))
    rate, bonus = torch.rand(3, 8), torch.randn(3, 8)
    state, steps = torch.zeros(2, 3, 8, 8), []
    for t in range(64):
        pair = k[:, :, t, :, None] * v[:, :, t, None, :]
        steps.append((r[:, :, t, None] @ (state + bonus[..., None] * pair))[:, :, 0])
        state = state * (-rate).exp()[..., None] + pair
    torch.testing.assert_close(recipe.wkv(r, k, v, rate, bonus), torch.stack(steps, 2), atol=1e-4, rtol=1e-4)


def test_what_was_trained_is_what_is_served(recipe, tmp_path, monkeypatch, capsys):
    text = "\n".join(file.read_text() for file in sorted(ROOT.glob("docs/*.md")))
    (tmp_path / "text.txt").write_text(text)
    out = tmp_path / "model"
    small = ["--layers", "2", "--width", "64", "--head", "32", "--vocabulary", "400", "--context", "64", "--batch", "8"]
    more = ["--steps", "60", "--looks", "2", "--dropout", "0", "--held_out", "0.1", "--device", "cpu", "--rate", "5e-3"]
    monkeypatch.setattr(sys, "argv", ["train.py", str(tmp_path / "text.txt"), "--out", str(out), *small, *more])
    recipe.main()
    said = capsys.readouterr().out
    unigram, best = (float(said.split(before)[1].split()[0]) for before in ("alone the held-out part costs", "loss"))
    assert best < unigram - 0.3, "it learned no more than how often each token occurs"

    with LLM(str(out), dtype="float32", device="cpu", max_num_seqs=2) as llm:
        ids = llm.backend.tokenizer.encode(text[500:1500])[:200]
        asked = SamplingParams(max_tokens=1, prompt_logprobs=0)
        told = llm.generate([{"prompt_token_ids": ids}], asked)[0].prompt_logprobs
    ours = np.array([entry[token].logprob for entry, token in zip(told[1:], ids[1:], strict=True)])
    network = recipe.RWKV(400, 2, 64, 32, 0.0).eval()
    network.load_state_dict({name: tensor.float() for name, tensor in load_file(out / "model.safetensors").items()})
    with torch.no_grad():
        padded = torch.tensor([ids + [0] * (-len(ids) % recipe.CHUNK)])
        logprobs = torch.log_softmax(network(padded), -1)[0]
    np.testing.assert_allclose(ours, logprobs[range(len(ids) - 1), ids[1:]].numpy(), atol=1e-4)
