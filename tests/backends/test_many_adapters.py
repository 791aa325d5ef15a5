"""Many adapters in one engine: every answer is that of the merged model alone, whatever runs beside it."""

from __future__ import annotations

import random
import threading
from dataclasses import replace

import pytest

from lora_models import KINDS, VOCAB, greedy, make_base, tune
from martlet.backends.native import NativeBackend
from martlet.backends.transformers_backend import load_transformers
from martlet.engine.options import EngineOptions
from martlet.engine.request import Request
from martlet.errors import InvalidRequest, ModelNotFound
from martlet.runners.base import LoadOptions
from martlet.runners.cpu_runner import CpuRunner
from martlet.runners.torch_runner import TorchRunner
from martlet.sampling_params import SamplingParams

TOKENS = 10


@pytest.fixture(autouse=True)
def one_thread(monkeypatch):
    monkeypatch.setattr("martlet.runners.machine.usable_cores", lambda: 1)  # a second one only waits here


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return make_base(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def tuned(base, tmp_path_factory):
    """Twelve adapters by name."""
    folder = tmp_path_factory.mktemp("adapters")
    return {f"a{n}": tune(base[1], folder / f"a{n}", seed=n, **KINDS[n % len(KINDS)]) for n in range(12)}


@pytest.fixture(scope="module")
def wanted(base, tuned):
    """(adapter, prompt) pairs and what transformers answers with the adapter merged in."""
    models = {None: base[1]} | {name: each.merged() for name, each in tuned.items()}
    rng = random.Random(1)
    shared = [rng.randrange(VOCAB) for _ in range(24)]
    pairs = []
    for number in range(64):
        name = [None, *tuned][number % 13]
        cut = rng.randint(0, 24)
        pairs.append((name, shared[:cut] + [rng.randrange(VOCAB) for _ in range(rng.randint(1, 8))]))
    answers = {}
    for name, model in models.items():
        prompts = [prompt for each, prompt in pairs if each == name]
        answers |= {(name, tuple(p)): tokens for p, tokens in zip(prompts, greedy(model, prompts, TOKENS), strict=True)}
    return [(name, prompt, answers[name, tuple(prompt)]) for name, prompt in pairs]


class Unhelpful:
    """A tokenizer of a model whose text nobody asks for."""

    eos_ids = ()


def backend_of(runner, card, slots: int, **options) -> NativeBackend:
    load = LoadOptions(dtype="float32", device="cpu", kv_cache_tokens=4096, max_num_seqs=16, max_model_len=64)
    load = replace(load, max_adapters=slots, **options)
    return NativeBackend(card, Unhelpful(), runner(card, load), max_lora_rank=load.max_lora_rank)


def request(id: str, adapter: str | None, prompt: list[int]) -> Request:
    params = SamplingParams(temperature=0, max_tokens=TOKENS, detokenize=False, ignore_eos=True)
    return Request(id, prompt, params, adapter=adapter)


def answers(backend, requests) -> dict[str, list[int]]:
    found: dict[str, list[int]] = {}
    for output in backend.generate(requests):
        assert output.error is None, output.error
        found.setdefault(output.request_id, []).extend(output.token_ids)
    return found


@pytest.mark.parametrize(("runner", "slots"), [(TorchRunner, 12), (TorchRunner, 3), (CpuRunner, 12), (CpuRunner, 3)])
def test_64_mixed_requests_answer_as_their_merged_models(base, tuned, wanted, runner, slots):
    backend = backend_of(runner, base[0], slots)
    for name, each in tuned.items():
        backend.load_adapter(name, each.path)
    got = answers(backend, [request(str(i), name, prompt) for i, (name, prompt, _) in enumerate(wanted)])
    backend.close()
    assert [got[str(i)] for i in range(len(wanted))] == [tokens for *_, tokens in wanted]
    assert len({tuple(tokens) for *_, tokens in wanted}) > 50, "the adapters hardly change an answer"


def test_an_adapter_is_announced_only_when_it_is_right(base, tuned, wanted, tmp_path):
    backend = backend_of(TorchRunner, base[0], 2, max_lora_rank=8)
    backend.load_adapter("a0", tuned["a0"].path)
    for name, path in (("a3", tuned["a3"].path), ("gone", tmp_path / "gone"), ("a0", base[0].path)):
        with pytest.raises(InvalidRequest):
            backend.load_adapter(name, path)
    for name in ("", " a", "a\n", "a" * 300):
        with pytest.raises(InvalidRequest, match="printable"):
            backend.load_adapter(name, tuned["a0"].path)
    assert list(backend.adapters()) == ["a0"], "a failed load leaves the one of that name in place"
    with pytest.raises(ModelNotFound, match="no adapter is called 'a3'"):
        list(backend.generate([request("x", "a3", [1])]))
    name, prompt, tokens = next(each for each in wanted if each[0] == "a0")
    assert answers(backend, [request("x", name, prompt)]) == {"x": tokens}
    backend.unload_adapter("a0")
    assert not backend.adapters()
    with pytest.raises(ModelNotFound):
        backend.unload_adapter("a0")
    backend.close()


def test_without_slots_the_flags_are_named(base, tuned):
    backend = backend_of(TorchRunner, base[0], 0)
    with pytest.raises(InvalidRequest, match="--max_loras"):
        backend.load_adapter("a0", tuned["a0"].path)
    backend.close()


def test_reloads_under_traffic_never_mix_versions(base, tuned, wanted):
    """Threads reload one name while requests run: each answer is wholly of one version, the old or the new."""
    backend = backend_of(TorchRunner, base[0], 2)
    names = ["a0", "a4", "a5"]
    _, prompt, _ = wanted[0]
    whole = {tuple(greedy(tuned[name].merged(), [prompt], TOKENS)[0]) for name in names}
    assert len(whole) == 3
    backend.load_adapter("live", tuned["a0"].path)
    stop = threading.Event()

    def reload() -> None:
        turn = 0
        while not stop.is_set():
            turn += 1
            backend.load_adapter("live", tuned[names[turn % 3]].path)

    thread = threading.Thread(target=reload)
    thread.start()
    seen = set()
    try:
        for turn in range(6):
            got = answers(backend, [request(f"{turn}-{i}", "live", prompt) for i in range(4)])
            seen |= {tuple(tokens) for tokens in got.values()}
    finally:
        stop.set()
        thread.join()
    backend.close()
    assert seen <= whole and len(seen) > 1


@pytest.fixture
def transformers_backend(base):
    load = LoadOptions(dtype="float32", device="cpu", max_num_seqs=4, max_adapters=1)
    backend = load_transformers(base[0], Unhelpful(), load, EngineOptions())
    yield backend
    backend.close()


def test_the_transformers_backend_runs_one_adapter_a_batch(base, tuned, wanted, transformers_backend, tmp_path):
    backend = transformers_backend
    dora = tune(base[1], tmp_path / "dora", seed=99, use_dora=True, target_modules=["q_proj", "up_proj"])
    names = ["a0", "a1", "a4"]
    for name in names:
        backend.load_adapter(name, tuned[name].path)
    backend.load_adapter("dora", dora.path)
    asked = [(name, prompt, tokens) for name, prompt, tokens in wanted if name in (None, *names)]
    _, prompt, _ = asked[0]
    asked.append(("dora", prompt, greedy(dora.merged(), [prompt], TOKENS)[0]))
    got = answers(backend, [request(str(i), name, prompt) for i, (name, prompt, _) in enumerate(asked)])
    assert [got[str(i)] for i in range(len(asked))] == [tokens for *_, tokens in asked]
    backend.load_adapter("a0", tuned["a5"].path)
    backend.unload_adapter("a1")
    assert (
        answers(backend, [request("again", "a0", prompt)])["again"]
        == (greedy(tuned["a5"].merged(), [prompt], TOKENS)[0])
    )
    with pytest.raises(InvalidRequest, match="no adapter is called 'a1'; there is a0, a4, dora"):
        list(backend.generate([request("gone", "a1", prompt)]))
    with pytest.raises(InvalidRequest, match="no such folder"):
        backend.load_adapter("x", tmp_path / "x")


def test_the_transformers_backend_merges(base, tuned, wanted):
    card = replace(base[0], merge=tuned["a0"].path)
    backend = load_transformers(card, Unhelpful(), LoadOptions(dtype="float32", device="cpu"), EngineOptions())
    _, prompt, tokens = next(each for each in wanted if each[0] == "a0")
    assert answers(backend, [request("x", None, prompt)]) == {"x": tokens}
    backend.close()
