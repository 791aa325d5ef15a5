"""The scripts in examples/ on the real model and against our real server, with shorter answers than they ask for."""

from __future__ import annotations

import asyncio
import itertools
import re
import sys
import threading
import time
from pathlib import Path

import pytest
import uvicorn

import martlet.swift
from martlet import backends, chat
from martlet.errors import InvalidRequest, MartletError, ModelNotFound, UsageError
from martlet.server.app import create_app
from martlet.swift import (
    ModelType,
    XRequestConfig,
    get_model_list_client,
    get_model_list_client_async,
    get_vllm_engine,
    inference_client,
    inference_client_async,
)

EXAMPLES = Path(__file__).parents[2] / "examples"
NAME = "smollm2-135m-instruct"


@pytest.fixture(scope="module")
def engine():
    with get_vllm_engine(ModelType.smollm2_135m_instruct, "fp32", max_model_len=512, max_num_seqs=4) as engine:
        yield engine


@pytest.fixture(scope="module")
def port(engine):
    backend = engine.backend
    template = chat.template_for(backend.card, backend.tokenizer)
    app = create_app(backend, template, defaults=backends.generation_defaults(backend.card))
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_config=None, access_log=False, lifespan="off", ws="none"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    deadline = time.monotonic() + 30
    while not server.started:
        assert time.monotonic() < deadline and thread.is_alive()
        time.sleep(0.01)
    yield server.servers[0].sockets[0].getsockname()[1]
    server.should_exit = True
    thread.join(10)


def run(name, monkeypatch, capsys, *args) -> list[str]:
    """Lines that an example prints, with its answers cut to 12 tokens: the script is tested, not the model."""
    source = (EXAMPLES / f"{name}.py").read_text(encoding="utf-8")
    source, cuts = re.subn(r"\b(256|32)\b", "12", source)
    assert cuts > 0
    monkeypatch.setattr(sys, "argv", [name, *args])
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    exec(compile(source, name, "exec"), {"__name__": "__main__"})
    return capsys.readouterr().out.splitlines()


def after(lines, head) -> list[str]:
    return [line.removeprefix(head) for line in lines if line.startswith(head)]


def test_batch(engine, monkeypatch, capsys):
    monkeypatch.setattr(martlet.swift, "get_vllm_engine", lambda model_type: engine, raising=False)
    out = "\n".join(run("inference", monkeypatch, capsys))
    assert after(out.splitlines(), "query: ") == ["你好!", "浙江的省会在哪?", "这有什么好吃的"]
    history = eval(out.rpartition("history: ")[2])
    assert [query for query, _ in history] == ["浙江的省会在哪?", "这有什么好吃的"]
    assert all(f"response: {response}" in out and response for _, response in history)


def test_stream(engine, monkeypatch, capsys):
    monkeypatch.setattr(martlet.swift, "get_vllm_engine", lambda model_type: engine, raising=False)
    lines = run("inference_stream", monkeypatch, capsys)
    assert lines[0] == "query_list: ['你好!', '浙江的省会在哪?']"
    steps = [eval(step) for step in after(lines, "response_list: ")]
    assert len(steps) > 5 and all(len(step) == 2 for step in steps) and all(steps[-1])
    assert all(new.startswith(old) for a, b in itertools.pairwise(steps) for old, new in zip(a, b, strict=True))
    history = eval("\n".join(lines).rpartition("history: ")[2])
    assert history[0] == ("浙江的省会在哪?", steps[-1][1]) and history[1][1].startswith(after(lines, "response: ")[-1])


def test_chat_clients_get_the_same_answers(port, monkeypatch, capsys):
    swift = run("client_swift_chat", monkeypatch, capsys, "--port", str(port))
    assert swift[0] == f"model_type: {NAME}"
    assert after(swift, "query: ") == ["浙江的省会在哪里?", "这有什么好吃的?"]
    assert all(after(swift, "response: "))
    openai = run("client_openai_chat", monkeypatch, capsys, "--port", str(port))
    assert openai == swift


def test_completion_clients_get_the_same_answers_streamed_or_not(port, monkeypatch, capsys):
    swift = run("client_swift_completions", monkeypatch, capsys, "--port", str(port))
    openai = run("client_openai_completions", monkeypatch, capsys, "--port", str(port))
    assert swift == openai
    _, plain, streamed = "\n".join(swift).split("query: 浙江 -> 杭州\n安徽 -> 合肥\n四川 ->\nresponse: ")
    assert plain.strip() == streamed.strip() != ""


def test_every_example_is_tested_and_listed():
    listed = (EXAMPLES / "README.md").read_text(encoding="utf-8")
    names = sorted(path.name for path in EXAMPLES.glob("*.py"))
    assert names == [
        "client_openai_chat.py",
        "client_openai_completions.py",
        "client_swift_chat.py",
        "client_swift_completions.py",
        "inference.py",
        "inference_stream.py",
        "self_cognition.py",
    ]
    assert all(f"`{name}`" in listed for name in names)


SHORT = XRequestConfig(max_tokens=4, temperature=0)


def test_a_stream_is_the_same_text_and_may_be_asked_for_later(port):
    config = XRequestConfig(max_tokens=8, temperature=0)
    whole = inference_client(NAME, "What is the capital of France?", request_config=config, port=port)
    assert whole.choices[0].message.content == "The capital of France is Paris."
    config.stream = True
    stream = inference_client(NAME, "What is the capital of France?", request_config=config, port=port)
    config.stream = False  # the stream keeps the settings it was asked with
    assert "".join(c.choices[0].delta.content for c in stream) == whole.choices[0].message.content


def test_history_system_and_stop_count(port):
    def ask(**options):
        answer = inference_client(NAME, "and its capital?", request_config=SHORT, port=port, **options)
        return answer.usage.prompt_tokens

    alone = ask(is_chat_request=True)
    assert ask(history=[("What is France?", "A country.")]) > alone
    assert ask(system="s") < alone  # shorter than the template's own
    config = XRequestConfig(max_tokens=8, temperature=0, stop=["France"])
    answer = inference_client(NAME, "What is the capital of France?", request_config=config, port=port)
    assert answer.choices[0].message.content == "The capital of "


def test_completions_take_a_text_alone(port):
    answer = inference_client(NAME, "1 2 3", request_config=SHORT, port=port, is_chat_request=False)
    assert answer.choices[0].text and answer.usage.prompt_tokens == 5
    with pytest.raises(UsageError, match="alone"):
        inference_client(NAME, "a", [("b", "c")], port=port, is_chat_request=False)


def test_errors_have_the_servers_words(port):
    with pytest.raises(ModelNotFound, match="smollm"):
        inference_client("smollm2-135m-instrukt", "a", request_config=SHORT, port=port)
    with pytest.raises(InvalidRequest, match="best_of"):
        inference_client(NAME, "a", request_config=XRequestConfig(best_of=2, n=2), port=port)
    with pytest.raises(MartletError, match="martlet deploy"):
        get_model_list_client(port=9)


def test_asynchronous_clients(port):
    async def talk():
        models = await get_model_list_client_async(port=port)
        answer = await inference_client_async(models.data[0].id, "hi", request_config=SHORT, port=port)
        stream = await inference_client_async(
            NAME, "hi", request_config=XRequestConfig(max_tokens=4, temperature=0, stream=True), port=port
        )
        text = "".join([chunk.choices[0].delta.content async for chunk in stream])
        assert text == answer.choices[0].message.content != ""
        text = await inference_client_async(NAME, "1 2 3", request_config=SHORT, port=port, is_chat_request=False)
        assert text.choices[0].text

    asyncio.run(talk())


def test_only_settings_that_were_made_are_sent():
    assert XRequestConfig().body(chat=True) == {} == XRequestConfig(stream=True).body(chat=False)
    config = XRequestConfig(max_tokens=3, temperature=0, stop=["x"], logprobs=True, top_logprobs=2)
    assert config.body(chat=True) == {
        "max_tokens": 3,
        "temperature": 0,
        "stop": ["x"],
        "logprobs": True,
        "top_logprobs": 2,
    }
    assert config.body(chat=False)["logprobs"] == 2
