"""RWKV 5.0 to 7 against the authors' package `rwkv`, token by token; and one step against many, in whatever pieces."""

import importlib.util
import json
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from rwkv_models import DEPTH, VERSIONS, VOCAB, WIDTH, checkpoint, original
from safetensors.numpy import save_file
from tiny_models import Driver, compare, dense

from martlet.engine.engine import Engine, drain
from martlet.engine.options import EngineOptions
from martlet.engine.request import Request
from martlet.errors import InvalidRequest
from martlet.hub import open_checkpoint, peft
from martlet.model import adapters
from martlet.model.weights import read_spec
from martlet.runners.base import LoadOptions
from martlet.runners.torch_runner import TorchRunner
from martlet.sampling_params import SamplingParams


@pytest.fixture(scope="module")
def package():
    """The package's classes: version -> class. It decides by environment variables at import, so it is loaded twice."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RWKV_JIT_ON", "0")
        patch.setenv("RWKV_CUDA_ON", "0")
        path = importlib.util.find_spec("rwkv").submodule_search_locations[0] + "/model.py"

        def load(seven: str):
            patch.setenv("RWKV_V7_ON", seven)
            spec = importlib.util.spec_from_file_location(f"rwkv_model_{seven}", path)
            module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
            return module.RWKV

        old, seven = load("0"), load("1")
        yield lambda version: seven if version == "7.0" else old


@pytest.mark.parametrize("names", ["original", "hf"])
@pytest.mark.parametrize("version", VERSIONS)
def test_logits_equal_the_packages(version, names, package, tmp_path):
    card = checkpoint(version, tmp_path / "ours", names)
    torch.save({name: torch.from_numpy(t.copy()) for name, t in original(version).items()}, tmp_path / "theirs.pth")
    theirs = package(version)(str(tmp_path / "theirs"), "cpu fp32")

    def reference(text):
        state, rows = None, []
        for token in text.tolist():
            logits, state = theirs.forward([token], state)
            rows.append(torch.log_softmax(logits.float(), -1))
        return torch.stack(rows).numpy()

    assert theirs.args.n_layer == DEPTH
    compare(card, reference)


GENERATIONS = ("5.2", "6.0", "7.0")


@pytest.mark.parametrize("version", GENERATIONS)
def test_pieces_of_any_size_give_what_single_steps_give(version, tmp_path):
    card, text = checkpoint(version, tmp_path), np.random.default_rng(5).integers(0, VOCAB, 90)

    def run(*pieces: int) -> np.ndarray:
        driver, found = Driver(card), []
        assert sum(pieces) == len(text)
        for number, count in enumerate(pieces):
            new = [driver.enter(0, text)] if number == 0 else []
            result = driver.step([(0, count, number == len(pieces) - 1)], new)
            found += result.prompt_logprobs.get(0, [])
        return np.stack([dense(entry) for entry in [*found, result.logprobs[0]]])

    alone = run(*[1] * 90)
    for pieces in ([90], [1, 89], [63, 1, 15, 11], [7] * 12 + [6]):
        np.testing.assert_allclose(run(*pieces), alone, atol=1e-4)


def engine(card, rows: int = 64, **options) -> Engine:
    load = LoadOptions(device="cpu", dtype="float32", max_num_seqs=rows, block_size=2, **options)
    return Engine(TorchRunner(card, load), options=EngineOptions(seed=0))


def requests(count: int, length: int = 12, **params) -> list[Request]:
    rng = np.random.default_rng(1)
    prompts = [rng.integers(1, VOCAB, rng.integers(1, 40)).tolist() for _ in range(count)]
    return [
        Request(str(i), prompt, SamplingParams(max_tokens=length, temperature=0.7, seed=i, **params))
        for i, prompt in enumerate(prompts)
    ]


def answers(an_engine: Engine, asked: list[Request]) -> dict[tuple[str, int], list[int]]:
    outputs = drain(an_engine, asked)
    return {(output.request_id, output.index): output.token_ids for output in outputs}


@pytest.mark.parametrize("version", GENERATIONS)
def test_many_at_once_answer_as_each_does_alone(version, tmp_path):
    """Also those that were preempted in the middle, and those that begin from another's snapshot."""
    card = checkpoint(version, tmp_path)
    one = engine(card)
    alone = {}
    for request in requests(64):
        alone |= answers(one, [request])
    assert len({tuple(tokens) for tokens in alone.values()}) > 60
    assert answers(engine(card), requests(64)) == alone

    again = engine(card)
    outputs = []
    for request in requests(64):
        again.add(request)
    while again.has_work:
        outputs += again.step()
        if again.stats().steps % 4 == 0 and again.scheduler.running:
            again.scheduler._preempt(again.scheduler.running[-1])
            again.scheduler.check()
    assert {(output.request_id, output.index): output.token_ids for output in outputs} == alone
    assert again.scheduler.preemptions > 3
    assert answers(one, requests(64)) == alone and one.stats().prefix_hits > 64 * 4


def test_forks_go_their_own_ways(tmp_path):
    card = checkpoint("5.2", tmp_path)
    forked = answers(engine(card), requests(3, n=4))
    for (name, index), tokens in forked.items():
        asked = requests(3)[int(name)]
        params = SamplingParams(max_tokens=12, temperature=0.7, seed=int(name) + index)
        assert answers(engine(card), [Request("one", asked.prompt_token_ids, params)])["one", 0] == tokens


def test_memory_does_not_grow_with_the_text(tmp_path):
    one = engine(checkpoint("5.2", tmp_path), rows=2)
    prompt = np.random.default_rng(2).integers(1, VOCAB, 8000).tolist()
    one.add(Request("long", prompt, SamplingParams(max_tokens=192, seed=1)))
    held, tokens = set(), 0
    before = one.runner.states.all
    while one.has_work:
        tokens += sum(len(output.token_ids) for output in one.step())
        held.add(max((len(seq.blocks) for seq in one.scheduler.running), default=0))
    assert tokens == 192 and held == {0}, "blocks are held between steps"
    assert one.runner.states.all is before and before.shape == (2 + 16, one.runner.spec.state_size)


@pytest.mark.parametrize("version", GENERATIONS)
def test_bfloat16_stays_near(version, tmp_path):
    card, text = checkpoint(version, tmp_path), np.random.default_rng(5).integers(0, VOCAB, 60)

    def run(dtype: str) -> np.ndarray:
        driver = Driver(card, dtype=dtype)
        result = driver.step([(0, 60, True)], [driver.enter(0, text)])
        return np.stack([dense(entry) for entry in [*result.prompt_logprobs[0], result.logprobs[0]]])

    exact = run("float32")
    assert np.abs(run("bfloat16") - exact).mean() < 0.1 < exact.std() / 10


def test_adapters_are_served_merged(tmp_path):
    """A recurrence takes none beside other sequences; refused by tensor, with what works instead."""
    card, rng = checkpoint("5.2", tmp_path / "base", "hf"), np.random.default_rng(0)
    a, b = (rng.standard_normal(shape, np.float32) for shape in ((4, WIDTH), (WIDTH, 4)))
    module, folder = "rwkv.blocks.1.attention.key", tmp_path / "adapter"
    folder.mkdir()
    named = {f"base_model.model.{module}.lora_{part}.weight": tensor for part, tensor in (("A", a), ("B", b))}
    save_file(named, folder / peft.WEIGHTS)
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["key"]}
    (folder / peft.CONFIG).write_text(json.dumps(config))
    refused = rf"{module}.lora_A.weight: LoRA on {module} is served merged only \(--ckpt_dir"
    with pytest.raises(InvalidRequest, match=refused):
        adapters.read(folder, card, read_spec(card), 8)
    plain, merged = open_checkpoint(card), open_checkpoint(replace(card, merge=folder))
    wanted = plain.tensor(module + ".weight") + 2 * b @ a
    np.testing.assert_allclose(merged.tensor(module + ".weight"), wanted, atol=1e-5)
    other = module.replace("key", "value") + ".weight"
    np.testing.assert_array_equal(merged.tensor(other), plain.tensor(other))
