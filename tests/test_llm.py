"""LLM in the names that vLLM users know, on the echo backend."""

from __future__ import annotations

import pytest

import martlet
from fake_backend import EchoRunner, FakeBackend, FakeTemplate, fake_card
from martlet import LLM, SamplingParams, backends, chat, hub
from martlet.errors import InvalidRequest, MartletError

GREEDY = SamplingParams(temperature=0, max_tokens=50)


@pytest.fixture
def llm(monkeypatch):
    monkeypatch.setattr(chat, "template_for", lambda card, tokenizer: FakeTemplate())
    with LLM(backend=FakeBackend(EchoRunner(max_rows=4))) as llm:
        yield llm
    assert llm.backend.runner.closed


def texts(outputs):
    return [[choice.text for choice in output.outputs] for output in outputs]


def test_public_names():
    assert martlet.LLM is LLM and martlet.RequestOutput and martlet.CompletionOutput


def test_answers_come_in_the_order_of_the_prompts(llm):
    prompts = [f"prompt number {i} " + "x" * (i * 7 % 30) for i in range(20)]
    outputs = llm.generate(prompts, GREEDY)
    assert texts(outputs) == [[p] for p in prompts]
    assert [o.prompt for o in outputs] == prompts
    assert all(o.finished and o.outputs[0].finish_reason == "stop" for o in outputs)
    assert len({o.request_id for o in outputs + llm.generate("again", GREEDY)}) == 21


@pytest.mark.parametrize(
    ("prompts", "texts_", "prompt"),
    [
        ("hi", ["hi"], "hi"),
        (["hi"], ["hi"], "hi"),
        ({"prompt": "hi"}, ["hi"], "hi"),
        ({"prompt_token_ids": [104, 105]}, ["hi"], None),
        ([104, 105], ["hi"], None),
        ([[104], [105]], ["h", "i"], None),
        ([{"prompt_token_ids": [104]}, "i"], ["h", "i"], None),
        ({"prompt": "hi", "prompt_token_ids": [104, 105]}, ["hi"], "hi"),
        ([], [], None),
    ],
)
def test_every_kind_of_prompt(llm, prompts, texts_, prompt):
    outputs = llm.generate(prompts, GREEDY)
    assert [o.outputs[0].text for o in outputs] == texts_
    if outputs:
        assert outputs[0].prompt == prompt
        assert bytes(outputs[0].prompt_token_ids).decode() == texts_[0]


def test_one_sampling_params_each(llm):
    outputs = llm.generate(["abc", "abc"], [GREEDY, SamplingParams(temperature=0, max_tokens=1)])
    assert texts(outputs) == [["abc"], ["a"]]
    assert [o.outputs[0].finish_reason for o in outputs] == ["stop", "length"]
    with pytest.raises(InvalidRequest, match="2 prompts but 1 sampling_params"):
        llm.generate(["a", "b"], [GREEDY])


def test_without_sampling_params_the_model_decides():
    card = fake_card(generation_config={"temperature": 0.0})
    with LLM(backend=FakeBackend(card=card)) as llm:
        assert llm.get_default_sampling_params() == SamplingParams(temperature=0.0)
        assert texts(llm.generate("a text longer than sixteen tokens")) == [["a text longer th"]]


def test_n_and_logprobs(llm):
    params = SamplingParams(n=3, seed=1, max_tokens=3, logprobs=2, prompt_logprobs=1)
    (output,) = llm.generate("abcdef", params)
    assert [c.index for c in output.outputs] == [0, 1, 2]
    assert [c.text for c in output.outputs] == ["bcd", "cde", "def"]
    choice = output.outputs[0]
    assert choice.cumulative_logprob == -0.75
    assert choice.logprobs[0][ord("b")] == martlet.llm.Logprob(-0.25, 1, "b")
    assert list(choice.logprobs[0]) == [ord("b"), ord("c")]
    assert output.prompt_logprobs[0] is None and list(output.prompt_logprobs[1]) == [ord("b")]
    assert len(output.prompt_logprobs) == 6
    (plain,) = llm.generate("abc", GREEDY)
    assert plain.outputs[0].logprobs is None and plain.outputs[0].cumulative_logprob is None


def test_stop_reason_and_cached_tokens(llm):
    prompt = "a prompt of more than sixteen tokens, and then STOP it"
    llm.generate(prompt, GREEDY)
    (output,) = llm.generate(prompt, SamplingParams(temperature=0, max_tokens=100, stop=["STOP"]))
    assert output.outputs[0].text == "a prompt of more than sixteen tokens, and then "
    assert output.outputs[0].stop_reason == "STOP"
    assert output.num_cached_tokens == 48
    assert output.metrics.finished_time > output.metrics.arrival_time


def test_chat_takes_one_conversation_or_several(llm):
    one = [{"role": "user", "content": "hello"}]
    two = [{"role": "user", "content": "x"}, {"role": "user", "content": "bye 🦆"}]
    assert texts(llm.chat(one, GREEDY)) == [["hello"]]
    assert texts(llm.chat([one, two], GREEDY)) == [["hello"], ["bye 🦆"]]
    (ended,) = llm.chat([{"role": "user", "content": "so<end>far"}], GREEDY)
    assert ended.outputs[0].text == "so"
    (whole,) = llm.chat(one, SamplingParams(temperature=0, max_tokens=8, ignore_eos=True))
    assert whole.outputs[0].text == "hellohel"


@pytest.mark.parametrize("bad", [{"text": "hi"}, {}, {"prompt": "hi", "multi_modal_data": 1}])
def test_a_prompt_of_no_known_kind(llm, bad):
    with pytest.raises(InvalidRequest, match="prompt or prompt_token_ids"):
        llm.generate(bad, GREEDY)


def test_nothing_runs_when_one_prompt_cannot(llm):
    with pytest.raises(InvalidRequest, match="512"):
        llm.generate(["fine", "x" * 600], GREEDY)
    assert llm.backend.stats().prompt_tokens == 0


def test_a_failure_in_the_backend_is_raised(llm):
    llm.backend.runner.fail_on = b"poison"
    with pytest.raises(MartletError, match="the log has the cause") as caught:
        llm.generate(["fine", "poison"], GREEDY)
    assert "injected" in str(caught.value.__cause__)
    assert texts(llm.generate("fine", GREEDY)) == [["fine"]]


def test_arguments_reach_the_loaders(monkeypatch):
    seen = {}

    def resolve(name, *, load_format):
        seen.update(name=name, load_format=load_format)
        return fake_card()

    def load(card, **options):
        seen.update(options)
        return FakeBackend()

    monkeypatch.setattr(hub, "resolve", resolve)
    monkeypatch.setattr(backends, "load", load)
    arguments = {"dtype": "float32", "max_model_len": 9, "max_num_seqs": 2, "kv_cache_tokens": 64, "device": "cpu"}
    more = {"enable_prefix_caching": False, "max_num_batched_tokens": 5, "seed": 6}
    with LLM("m", gpu_memory_utilization=0.5, load_format="dummy", backend="pt", **arguments, **more):
        pass
    assert (seen["name"], seen["load_format"], seen["backend"]) == ("m", "dummy", "pt")
    assert {name: getattr(seen["load"], name) for name in arguments} == arguments
    assert seen["load"].memory_utilization == 0.5 and seen["load"].seed == 6
    assert {name: getattr(seen["engine"], name) for name in more} == more


def test_a_progress_bar_can_be_shown(llm, capsys):
    llm.generate(["a", "b"], GREEDY, use_tqdm=True)
    assert "generating" in capsys.readouterr().out
