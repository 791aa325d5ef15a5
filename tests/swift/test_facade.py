"""SWIFT's names over a backend that echoes the last message."""

from __future__ import annotations

import copy
import itertools
import json
import pickle
import subprocess
import sys

import pytest

from fake_backend import FakeBackend, FakeTemplate, fake_card
from martlet import hub
from martlet.errors import InvalidRequest, MartletError, UsageError
from martlet.swift import (
    HistoryPair,
    LoRARequest,
    ModelType,
    TemplateType,
    VllmEngine,
    VllmGenerationConfig,
    get_default_template_type,
    get_template,
    get_vllm_engine,
    inference_stream_vllm,
    inference_vllm,
)
from martlet.swift.engine import _dtype_name


@pytest.fixture(scope="module")
def engine():
    with VllmEngine(FakeBackend(), "echo") as engine:
        engine.generation_config.temperature = 0
        yield engine


template = FakeTemplate()


def test_model_types_are_the_registrys():
    assert ModelType.qwen_7b_chat == "qwen-7b-chat"
    assert ModelType.smollm2_135m_instruct == "smollm2-135m-instruct"
    assert ModelType.qwen1half_7b_chat_int4 == "qwen1half-7b-chat-int4"
    assert {"qwen-7b", "chatglm3-6b", "llama2-7b-chat"} <= set(ModelType.get_model_name_list())
    assert "qwen_7b_chat" in dir(ModelType)
    with pytest.raises(AttributeError, match="Did you mean qwen_7b_chat"):
        _ = ModelType.qwen_7b_cht


@pytest.mark.parametrize(
    ("model_type", "template_type"),
    [
        ("qwen-7b-chat", "qwen"),
        ("qwen-7b", "default-generation"),
        ("chatglm3-6b", "chatglm3"),
        ("yi-6b-chat", "yi"),
        ("qwen1half-7b-chat-int4", "qwen"),
        ("llama2-7b-chat", "llama"),
        ("llama3-8b-instruct", "llama3"),
        ("smollm2-135m-instruct", "checkpoint"),
    ],
)
def test_default_templates_are_those_of_swift(model_type, template_type):
    assert get_default_template_type(model_type) == template_type
    assert template_type in TemplateType.get_template_name_list()


def test_unknown_names_are_refused_with_the_nearest(engine):
    with pytest.raises(UsageError, match="Did you mean qwen-7b-chat"):
        get_default_template_type("qwen-7b-cha")
    with pytest.raises(UsageError, match="Did you mean qwen"):
        get_template("qwem", engine.hf_tokenizer)
    assert TemplateType.default_generation == "default-generation"


def test_templates_take_no_option_they_would_ignore(engine):
    assert get_template("yi", engine.hf_tokenizer, default_system="s").default_system == "s"
    for options in ({"max_length": 5}, {"truncation_strategy": "truncation_left"}, {"tools_prompt": "react_en"}):
        with pytest.raises(UsageError, match=next(iter(options))):
            get_template("yi", engine.hf_tokenizer, **options)


def test_a_batch_answers_in_order_and_leaves_its_input_alone(engine):
    history = [["q0", "a0"]]
    requests = [{"query": "one"}, {"query": "zwei 你好"}, {"query": "3", "history": history, "system": "s"}]
    kept = copy.deepcopy(requests)
    responses = inference_vllm(engine, template, requests)
    assert [r["response"] for r in responses] == ["one", "zwei 你好", "3"]
    assert [r["history"] for r in responses] == [
        [("one", "one")],
        [("zwei 你好", "zwei 你好")],
        [["q0", "a0"], ("3", "3")],
    ]
    assert requests == kept and history == [["q0", "a0"]]
    again = inference_vllm(engine, template, [{"query": "more", "history": responses[2]["history"]}])
    assert again[0]["history"] == [("q0", "a0"), ("3", "3"), ("more", "more")]
    assert len(responses[2]["history"]) == 2


def test_history_is_lists_and_tuples_at_once():
    pair = HistoryPair("q", "a")
    assert pair == ("q", "a") == pair and pair == ["q", "a"] == pair and [pair] == [("q", "a")]
    assert pair != ("q", "b") and pair != "qa" and pair != ("q",)
    assert repr([pair]) == "[('q', 'a')]" and json.dumps([pair]) == '[["q", "a"]]'
    assert isinstance(pair, list) and tuple(pair) == ("q", "a")
    assert pickle.loads(pickle.dumps(pair)) == pair == copy.deepcopy(pair)
    query, response = pair
    assert (query, response) == ("q", "a")


def test_streams_are_cumulative_and_whole(engine):
    requests = [{"query": "ab你"}, {"query": "longer one"}]
    steps = list(inference_stream_vllm(engine, template, requests))
    assert steps[-1] == inference_vllm(engine, template, requests)
    for step, following in itertools.pairwise(steps):
        assert len(step) == 2
        assert all(b["response"].startswith(a["response"]) for a, b in zip(step, following, strict=True))
        assert all(entry["history"][-1][1] == entry["response"] for entry in step)
    assert len(steps) > 10 and "�" not in "".join(r["response"] for step in steps for r in step)


def test_a_stream_left_early_stops_its_requests(engine):
    stream = inference_stream_vllm(engine, template, [{"query": "x" * 200}])
    next(stream)
    stream.close()
    assert inference_vllm(engine, template, [{"query": "next"}])[0]["response"] == "next"
    assert engine.backend.stats().running == 0


def test_generation_config_counts(engine):
    config = VllmGenerationConfig(max_new_tokens=2, do_sample=False)
    assert inference_vllm(engine, template, [{"query": "hello"}], generation_config=config)[0]["response"] == "he"
    config = VllmGenerationConfig(do_sample=False, stop="l")
    assert inference_vllm(engine, template, [{"query": "hello"}], generation_config=config)[0]["response"] == "he"
    long = [{"query": "x" * 100}]
    assert len(inference_vllm(engine, template, long)[0]["response"]) == 64  # SWIFT's default
    seeded = VllmGenerationConfig(seed=3)
    first, second = (
        inference_vllm(engine, template, [{"query": "hello"}], generation_config=seeded)[0]["response"] for _ in "ab"
    )
    assert first == second != "hello"


def test_generation_config_speaks_both_languages():
    config = VllmGenerationConfig(temperature=0.7, top_k=0)
    params = config.sampling_params(template)
    assert (params.max_tokens, params.temperature, params.top_k) == (64, 0.7, 0)
    assert params.stop_token_ids == template.stop_ids and params.stop == template.stop
    config.max_tokens = 9
    assert config.max_new_tokens == config.max_tokens == 9
    config.do_sample = False
    assert config.sampling_params(template).temperature == 0
    config.do_sample = True
    assert config.sampling_params(template).temperature == 0.7


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        ("num_beams", 2, "beam"),
        ("length_penalty", 0.5, "beam"),
        ("n", 2, "martlet.LLM"),
        ("max_length", 20, "max_new_tokens"),
        ("temprature", 1, "Did you mean temperature"),
    ],
)
def test_a_generation_config_ignores_nothing(name, value, says):
    with pytest.raises(UsageError, match=says):
        setattr(VllmGenerationConfig(), name, value)
    with pytest.raises((UsageError, TypeError)):
        VllmGenerationConfig(**{name: value})


def test_a_wrong_value_is_named_when_it_is_used(engine):
    engine.generation_config.top_p = 7
    try:
        with pytest.raises(InvalidRequest, match="top_p"):
            inference_vllm(engine, template, [{"query": "a"}])
    finally:
        engine.generation_config.top_p = 1.0


def test_the_models_own_settings_are_the_engines_defaults():
    settings = {"temperature": 0.6, "top_p": 0.9, "do_sample": True, "eos_token_id": 2, "max_new_tokens": None}
    with VllmEngine(FakeBackend(card=fake_card(generation_config=settings)), "echo") as engine:
        config = engine.generation_config
        assert (config.temperature, config.top_p, config.top_k, config.max_new_tokens) == (0.6, 0.9, 50, 64)
        assert engine.max_model_len == 512 and engine.model_type == "echo"


@pytest.mark.parametrize(
    ("requests", "says"),
    [
        ([{"query": "a", "images": []}], "'images'"),
        ([{"quary": "a"}], "'quary'"),
        ([{"query": None}], "query"),
        ([{"query": "a", "history": ["ab"]}], r"history\[0\]"),
        ([{"query": "a", "history": [(1, 2)]}], "content"),
        ({"query": "a"}, "list"),
        (["a"], "list"),
        ([{"query": "ok"}, {"query": "x" * 600}], "512"),
    ],
)
def test_bad_requests_are_named_and_none_runs(engine, requests, says):
    before = engine.backend.stats().finished
    with pytest.raises(InvalidRequest, match=says):
        list(inference_stream_vllm(engine, template, requests))
    with pytest.raises(InvalidRequest, match=says):
        inference_vllm(engine, template, requests)
    assert engine.backend.stats().finished == before


def test_an_engine_fault_reaches_the_caller(engine):
    engine.backend.runner.fail_on = b"poison"
    try:
        with pytest.raises(Exception, match=r"injected|failed"):
            inference_vllm(engine, template, [{"query": "poison"}])
    finally:
        engine.backend.runner.fail_on = b""
    assert inference_vllm(engine, template, [{"query": "fine"}])[0]["response"] == "fine"


def test_info_progress_and_verbose(engine, capsys):
    info = {}
    inference_vllm(engine, template, [{"query": "abc"}], generation_info=info, use_tqdm=True, verbose=True)
    assert info["num_samples"] == 1 and info["num_generated_tokens"] == 4  # and the end token
    assert info["num_prompt_tokens"] == len("user\x02abc\x03") and info["tokens/s"] > 0
    out = capsys.readouterr().out
    assert "inference" in out and "[PROMPT]" in out and "[OUTPUT]abc" in out
    list(inference_stream_vllm(engine, template, [{"query": "abc"}], generation_info=info, verbose=True))
    assert "[OUTPUT]abc" in capsys.readouterr().out


def test_an_empty_batch_has_no_answers(engine):
    assert inference_vllm(engine, template, []) == [] == list(inference_stream_vllm(engine, template, []))


def test_an_engine_without_room_for_adapters_says_what_makes_some(engine):
    adapter = LoRARequest("default-lora", 1, "output/checkpoint-100")
    with pytest.raises(MartletError, match="enable_lora"):
        inference_vllm(engine, template, [{"query": "a"}], lora_request=adapter)


@pytest.mark.parametrize(
    "options",
    [
        {"use_async": True},
        {"engine_kwargs": {"swap_space": 4}},
        {"quantization": "awq"},
        {"torch_dtype": "int3"},
    ],
)
def test_an_engine_option_that_cannot_be_had_is_named(options):
    with pytest.raises(MartletError) as error:
        get_vllm_engine(ModelType.smollm2_135m_instruct, **options)
    assert error.value.param == ("swap_space" if "engine_kwargs" in options else next(iter(options)))


def test_options_reach_the_engine(monkeypatch, tmp_path):
    seen = {}
    monkeypatch.setattr(hub, "resolve", lambda name, **options: seen.update(name=name, **options) or fake_card())

    def load(card, *, backend, load):
        seen.update(card=card, backend=backend, load=load)
        return FakeBackend()

    monkeypatch.setattr("martlet.backends.load", load)
    with get_vllm_engine(
        "qwen-7b-chat",
        "fp16",
        model_id_or_path=tmp_path,
        gpu_memory_utilization=0.5,
        max_model_len=128,
        max_num_seqs=3,
        max_loras=4,
    ) as engine:
        assert engine.model_type == "qwen-7b-chat"
    assert seen["name"] == str(tmp_path) and seen["model_type"] == "qwen-7b-chat" and seen["backend"] == "native"
    load = seen["load"]
    assert (load.dtype, load.memory_utilization, load.max_model_len, load.max_num_seqs) == ("float16", 0.5, 128, 3)


class TorchDtype:
    def __str__(self):
        return "torch.bfloat16"


@pytest.mark.parametrize(
    ("given", "name"),
    [(None, "auto"), ("AUTO", "auto"), ("fp32", "float32"), ("half", "float16"), (TorchDtype(), "bfloat16")],
)
def test_dtypes_by_object_and_by_name(given, name):
    assert _dtype_name(given) == name


def test_importing_the_names_is_cheap():
    code = (
        "import sys, time; t = time.process_time()\n"
        "from martlet.swift import ModelType, get_vllm_engine, get_default_template_type, get_template\n"
        "from martlet.swift import inference_vllm, inference_stream_vllm, LoRARequest, XRequestConfig\n"
        "from martlet.swift import inference_client, get_model_list_client\n"
        "print(time.process_time() - t, 'torch' in sys.modules, 'httpx' in sys.modules, 'jinja2' in sys.modules)"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert float(out[0]) < 0.1 and out[1:] == ["False"] * 3
