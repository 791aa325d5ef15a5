"""Tool calls of the default model, held to their schemas, over HTTP with the official client."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import openai
import pytest
from live_server import live

from martlet import backends, chat
from martlet.chat.tool_formats import FORMATS
from martlet.runners.base import LoadOptions
from martlet.server import create_app

MODEL = "smollm2-135m-instruct"
BENCH = Path(__file__).parents[2] / "bench" / "tool_calls.py"
WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "parameters": {
            "type": "object",
            "properties": {
                "city": {"enum": ["Paris", "Rome"]},
                "days": {"type": "integer", "minimum": 1, "maximum": 7},
            },
            "required": ["city", "days"],
            "additionalProperties": False,
        },
    },
}
ASK = {
    "model": MODEL,
    "messages": [{"role": "user", "content": "Tell me the weather in Paris tomorrow."}],
    "tools": [WEATHER],
    "temperature": 0,
    "max_tokens": 100,
    "parallel_tool_calls": False,
}


@pytest.fixture(scope="module")
def backend():
    load = LoadOptions(device="cpu", max_model_len=2048, max_num_seqs=8, kv_cache_tokens=16384)
    backend = backends.load(MODEL, load=load)
    yield backend
    backend.close()


@pytest.fixture
def served(backend):
    """Makes a client of a server with a tool format."""
    opened = []

    def serve(name="hermes"):
        server = live(create_app(backend, chat.template_for(backend.card, backend.tokenizer, tools=name)))
        opened.append(server)
        return openai.OpenAI(base_url=f"{server.__enter__()}/v1", api_key="none", max_retries=0, timeout=60)

    yield serve
    for server in opened:
        server.__exit__(None, None, None)


def test_random_schemas_are_obeyed(served):
    spec = importlib.util.spec_from_file_location("tool_calls", BENCH)
    bench = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(bench)
    url = str(served().base_url).removesuffix("/v1/")
    assert bench.measure(url, MODEL, 10, "hermes", beside=False) == (10, 0)


@pytest.mark.parametrize("name", [name for name in FORMATS if name != "chatglm3"])
def test_a_required_call_in_every_format(served, name):
    client = served(name)
    choice = client.chat.completions.create(**ASK, tool_choice="required").choices[0]
    assert choice.finish_reason == "tool_calls" and choice.message.content is None
    (call,) = choice.message.tool_calls
    arguments = json.loads(call.function.arguments)
    assert arguments["city"] in ("Paris", "Rome") and 1 <= arguments["days"] <= 7
    streamed, finish = "", None
    for chunk in client.chat.completions.create(**ASK, tool_choice="required", stream=True):
        delta, finish = chunk.choices[0].delta, chunk.choices[0].finish_reason
        assert not delta.content
        streamed += "".join(piece.function.arguments for piece in delta.tool_calls or ())
    assert (streamed, finish) == (call.function.arguments, "tool_calls")


def test_a_named_tool_is_called(served):
    now = {"type": "function", "function": {"name": "now"}}
    choice = served().chat.completions.create(**ASK | {"tools": [WEATHER, now], "tool_choice": now}).choices[0]
    assert [(c.function.name, c.function.arguments) for c in choice.message.tool_calls] == [("now", "{}")]


def test_auto_leaves_the_answer_free_or_to_a_schema(served):
    client = served()
    assert client.chat.completions.create(**ASK).choices[0].message.content
    shape = {"type": "object", "properties": {"sunny": {"type": "boolean"}}, "required": ["sunny"]}
    shape |= {"additionalProperties": False}
    wanted = {"type": "json_schema", "json_schema": {"name": "x", "schema": shape}}
    message = client.chat.completions.create(**ASK, response_format=wanted).choices[0].message
    assert message.tool_calls or isinstance(json.loads(message.content)["sunny"], bool)


def test_a_schema_that_cannot_be_followed_is_named(served):
    odd = {"name": "odd", "parameters": {"type": "object", "properties": {"a": {"type": "string", "format": "x-odd"}}}}
    tools = [WEATHER, {"type": "function", "function": odd}]
    with pytest.raises(openai.BadRequestError, match="x-odd") as error:
        served().chat.completions.create(**ASK | {"tools": tools, "tool_choice": "required"})
    assert error.value.param == "tools[1].function.parameters"
    assert served().chat.completions.create(**ASK | {"tools": tools}).choices[0].finish_reason
