"""The transformers backend on a tiny random model, against transformers itself."""

from __future__ import annotations

import json
import logging
import queue
import time

import pytest
import torch
from byte_tokenizer import EOS, ByteTokenizer
from transformers import LlamaConfig, LlamaForCausalLM

from fake_backend import fake_card
from martlet.backends import transformers_backend
from martlet.backends.transformers_backend import load_transformers
from martlet.backends.transformers_model import load_model
from martlet.backends.transformers_sampler import SampledRow, choose
from martlet.engine.options import EngineOptions
from martlet.engine.request import Request
from martlet.errors import CheckpointError, InvalidRequest, Overloaded, UsageError
from martlet.hub.dummy import DummyCheckpoint
from martlet.runners.base import LoadOptions
from martlet.sampling_params import SamplingParams

CONFIG = {
    "vocab_size": 258,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "initializer_range": 0.6,
    "tie_word_embeddings": False,
    "bos_token_id": 257,
    "eos_token_id": EOS,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("tiny")
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**CONFIG)).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def card(folder):
    config = json.loads((folder / "config.json").read_text())
    return fake_card(name="tiny", path=folder, format="safetensors", config=config)


@pytest.fixture(scope="module")
def model(folder):
    return LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def backend(card):
    backend = load_transformers(card, ByteTokenizer(), LoadOptions(device="cpu"), EngineOptions(max_num_queued=8))
    yield backend
    backend.close()
    backend.close()
    assert not backend._thread.is_alive()


def run(backend, *requests):
    """{(request id, index): all its outputs put together}"""
    found = {}
    for output in backend.generate(requests):
        whole = found.setdefault((output.request_id, output.index), output)
        if whole is not output:
            whole.token_ids += output.token_ids
            whole.text += output.text
            whole.logprobs = whole.logprobs and whole.logprobs + (output.logprobs or [])
            whole.finish_reason, whole.stop_reason = output.finish_reason, output.stop_reason
    return found


def greedy(model, prompt, count):
    """Argmax by argmax, the whole context every time: no cache, no batch, no padding."""
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(int(model(torch.tensor([tokens])).logits[0, -1].argmax()))
    return tokens[len(prompt) :]


def ask(name, prompt=(1, 2, 3), *, stream=False, **params):
    params = {"temperature": 0, "max_tokens": 8, "ignore_eos": True, **params}
    return Request(name, list(prompt), SamplingParams(**params), stream=stream)


@torch.no_grad()
def test_a_padded_batch_equals_each_request_alone(backend, model):
    prompts = {"a": (1, 2, 3), "b": tuple(range(40)), "c": (9,)}
    limits = {"a": 12, "b": 3, "c": 20}
    found = run(backend, *(ask(n, p, max_tokens=limits[n], stream=n == "c") for n, p in prompts.items()))
    for name, prompt in prompts.items():
        assert found[name, 0].token_ids == greedy(model, prompt, limits[name])
        assert found[name, 0].finish_reason == "length"


def test_seeded_rows_do_not_depend_on_their_batch(backend):
    draw = {"temperature": 1.0, "seed": 5, "n": 3, "top_k": 20, "top_p": 0.9, "min_p": 0.01, "max_tokens": 6}
    alone = run(backend, ask("a", **draw))
    crowd = run(backend, ask("x", tuple(range(30))), ask("a", **draw), ask("y", temperature=1.0))
    for index in range(3):
        assert alone["a", index].token_ids == crowd["a", index].token_ids
    assert len({tuple(alone["a", i].token_ids) for i in range(3)}) == 3


@torch.no_grad()
def test_logprobs_are_of_the_raw_distribution(backend, model):
    output = run(backend, ask("a", logprobs=3, max_tokens=2, temperature=0.5, seed=1, repetition_penalty=1.5))["a", 0]
    raw = model(torch.tensor([[1, 2, 3]])).logits[0, -1].log_softmax(-1)
    first = output.logprobs[0]
    assert first.logprob == pytest.approx(float(raw[first.token]), abs=1e-4)
    assert first.top_ids.tolist() == raw.topk(3).indices.tolist()
    assert first.rank == int((raw > raw[first.token]).sum()) + 1
    assert len(output.logprobs) == 2


def test_end_tokens_stop_strings_and_their_reasons(backend, model):
    with torch.no_grad():
        tokens = greedy(model, (1, 2, 3), 8)
    by_id = run(backend, ask("a", stop_token_ids=[tokens[3]]))["a", 0]
    cut = tokens.index(tokens[3])
    assert (by_id.token_ids, by_id.finish_reason, by_id.stop_reason) == (tokens[: cut + 1], "stop", tokens[3])
    longer = run(backend, ask("a", stop_token_ids=[tokens[3]], min_tokens=8))["a", 0]
    assert len(longer.token_ids) == 8 and tokens[3] not in longer.token_ids[:7]
    word = run(backend, ask("a", allowed_token_ids=[ord("x")], stop="xxx", max_tokens=20))["a", 0]
    assert (word.text, word.finish_reason, word.stop_reason, len(word.token_ids)) == ("", "stop", "xxx", 3)
    ended = run(backend, ask("a", logit_bias={EOS: 100.0}, ignore_eos=False))["a", 0]
    assert (ended.token_ids, ended.text, ended.finish_reason, ended.stop_reason) == ([EOS], "", "stop", None)


@pytest.mark.parametrize(
    ("request_", "param"),
    [
        (ask("a", prompt=()), "prompt"),
        (ask("a", prompt=range(128)), "prompt"),
        (ask("a", prompt=(258,)), "prompt"),
        (ask("a", stop_token_ids=[258]), "stop_token_ids"),
        (ask("a", prompt_logprobs=1), "prompt_logprobs"),
        (Request("a", [1], adapter="lora"), "model"),
    ],
)
def test_what_cannot_run_is_refused_by_name(backend, request_, param):
    with pytest.raises(InvalidRequest) as caught:
        backend.submit([ask("fine"), request_], queue.SimpleQueue())
    assert caught.value.param == param
    assert backend.stats().waiting == 0


def test_same_ids_and_full_queues(backend):
    with pytest.raises(InvalidRequest, match="ids must differ"):
        backend.submit([ask("a"), ask("a")], queue.SimpleQueue())
    with pytest.raises(Overloaded):
        backend.submit([ask(f"r{i}") for i in range(9)], queue.SimpleQueue())


def test_abort_ends_a_running_and_a_waiting_request(backend):
    before = backend.stats().finished.get("abort", 0)
    outbox = queue.SimpleQueue()
    backend.submit([ask("running", max_tokens=100, stream=True)], outbox)
    outbox.get(timeout=10)
    backend.submit([ask("waiting")], outbox)
    backend.abort(["running", "waiting", "unknown"])
    last = []
    while len(last) < 2:
        last += [o for o in outbox.get(timeout=10) if o.last]
    assert {(o.request_id, o.finish_reason) for o in last} == {("running", "abort"), ("waiting", "abort")}
    assert backend.stats().finished["abort"] == before + 2
    assert len(run(backend, ask("next"))["next", 0].token_ids) == 8


def test_a_failure_is_told_to_its_requests_and_to_nobody_else(backend, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(transformers_backend.Detokenizer, "feed", lambda *_: 1 / 0)
        output = run(backend, ask("a"))["a", 0]
        assert output.finish_reason == "error" and isinstance(output.error, ZeroDivisionError)
    assert run(backend, ask("b"))["b", 0].finish_reason == "length"
    deadline = time.monotonic() + 5
    while backend.stats().running and time.monotonic() < deadline:
        time.sleep(0.01)
    assert backend.stats().running == 0 and backend.stats().error is None


def test_dummy_weights_are_ours_name_by_name(card):
    """Every parameter of the Hugging Face model is one of ours, under the name the family gives it."""
    dummy = fake_card(name="tiny", path=card.path, format="dummy", config={**card.config, "dtype": "float32"})
    model = load_model(dummy, LoadOptions(device="cpu", seed=3))
    ours = torch.from_numpy(DummyCheckpoint(3).random("layers.1.down", (32, 48)).astype("float32"))
    assert torch.equal(model.model.layers[1].mlp.down_proj.weight, ours)
    assert torch.equal(model.model.norm.weight, torch.ones(32))


def test_options_without_a_use_are_named(card, caplog):
    load = LoadOptions(device="cpu", kv_cache_tokens=64, max_num_seqs=2)
    with caplog.at_level(logging.WARNING, "martlet"):
        load_transformers(card, ByteTokenizer(), load, EngineOptions(max_num_batched_tokens=8)).close()
    assert "the transformers backend has no use for kv_cache_tokens, max_num_batched_tokens" in caplog.messages


def test_what_cannot_be_loaded(card, tmp_path):
    with pytest.raises(UsageError, match="quantise"):
        load_model(card, LoadOptions(device="cpu", quant="int4"))
    with pytest.raises(UsageError, match="float64"):
        load_model(card, LoadOptions(device="cpu", dtype="float64"))
    (tmp_path / "config.json").write_text(json.dumps(card.config))
    with pytest.raises(CheckpointError, match=str(tmp_path)):
        load_model(fake_card(path=tmp_path, format="safetensors", config=card.config), LoadOptions(device="cpu"))


LOGITS = torch.tensor([2.0, 1.0, 0.5, -1.0])


@pytest.mark.parametrize(
    ("params", "output", "possible"),
    [
        ({"temperature": 0}, [], {0}),
        ({"top_k": 1}, [], {0}),
        ({"top_k": 2}, [], {0, 1}),
        ({"top_p": 0.6}, [], {0, 1}),  # 0.61 alone reaches it only just: 0.609 > 0.6
        ({"min_p": 0.3}, [], {0, 1}),
        ({"allowed_token_ids": [2, 3]}, [], {2, 3}),
        ({"temperature": 0, "logit_bias": {3: 50.0}}, [], {3}),
        ({"temperature": 0, "presence_penalty": 1.5}, [0], {1}),
        ({"temperature": 0, "frequency_penalty": 0.6}, [0, 0], {1}),
        ({"temperature": 0, "repetition_penalty": 3.0}, [0], {1}),
        ({"temperature": 0, "min_tokens": 1}, [], {1}),
        ({"temperature": 0, "min_tokens": 1}, [3], {0}),
    ],
)
def test_choose(params, output, possible):
    row = SampledRow(SamplingParams(**params), [2], (0,), torch.Generator().manual_seed(0), list(output))
    raw = LOGITS.clone()
    drawn = {choose(row, raw) for _ in range(200)}
    assert torch.equal(raw, LOGITS)
    assert drawn == possible if params != {"top_p": 0.6} else drawn <= possible and 0 in drawn
