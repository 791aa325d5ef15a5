"""Tool calls and thoughts through the official client, on a model that echoes what it should say."""

from __future__ import annotations

import json

import httpx
import openai
import pytest

from martlet.client import Client, Message
from martlet.server.schema import ChatBody
from martlet.server.tools import read_tools

WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather of a city",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}
TIME = {"type": "function", "function": {"name": "get_time"}}
ONE = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Zürich 🦆"}}\n</tool_call>'
TWO = ONE + '\n<tool_call>\n{"name": "get_time", "arguments": {}}\n</tool_call>'


def ask(text, **more):
    more.setdefault("tools", [WEATHER, TIME])
    return {"model": "echo", "messages": [{"role": "user", "content": text}], "temperature": 0, **more}


def put_together(chunks):
    """A message out of deltas, as clients do; checks the rules of the stream on the way."""
    content, reasoning, calls, finish = "", "", [], None
    for chunk in chunks:
        for choice in chunk.choices:
            assert finish is None
            delta, finish = choice.delta, choice.finish_reason
            content += delta.content or ""
            reasoning += getattr(delta, "reasoning_content", None) or ""
            for call in delta.tool_calls or ():
                if call.index == len(calls):
                    assert call.id and call.type == "function" and call.function.name
                    calls.append([call.id, call.function.name, ""])
                else:
                    assert call.index == len(calls) - 1
                    assert call.id is None and call.type is None and call.function.name is None
                calls[call.index][2] += call.function.arguments
    return content, reasoning, calls, finish


@pytest.mark.parametrize(
    ("text", "names"), [(ONE, ["get_weather"]), ("Let me see.\n" + TWO, ["get_weather", "get_time"])]
)
def test_calls_streamed_and_not(client, text, names):
    choice = client.chat.completions.create(**ask(text)).choices[0]
    assert choice.finish_reason == "tool_calls"
    assert choice.message.content == ("Let me see." if text.startswith("Let") else None)
    assert [call.function.name for call in choice.message.tool_calls] == names
    assert json.loads(choice.message.tool_calls[0].function.arguments) == {"city": "Zürich 🦆"}
    ids = [call.id for call in choice.message.tool_calls]
    content, _, calls, finish = put_together(client.chat.completions.create(**ask(text), stream=True))
    assert (content or None, finish) == (choice.message.content, "tool_calls")
    assert [call[1:] for call in calls] == [[c.function.name, c.function.arguments] for c in choice.message.tool_calls]
    assert len({*ids, *(call[0] for call in calls)}) == 2 * len(names)


def test_arguments_stream_as_they_come(client):
    chunks = list(client.chat.completions.create(**ask(ONE), stream=True))
    pieces = [c.choices[0].delta.tool_calls[0].function.arguments for c in chunks if c.choices[0].delta.tool_calls]
    assert "".join(pieces) == '{"city": "Zürich 🦆"}' and len(pieces) > 5


def test_the_clients_own_stream_accumulator_understands_us(client):
    with client.chat.completions.stream(**ask(TWO)) as stream:
        events = [event.type for event in stream]
        message = stream.get_final_completion().choices[0].message
    assert events.count("tool_calls.function.arguments.done") == 2
    assert [call.function.name for call in message.tool_calls] == ["get_weather", "get_time"]


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize(
    ("text", "more"),
    [
        (ONE, {"tools": openai.NOT_GIVEN}),
        (ONE, {"tool_choice": "none"}),
        (ONE.replace("get_weather", "get_wether"), {}),
        (ONE, {"tools": [TIME]}),
        ("<tool_call>{'name': 'get_time'}</tool_call>", {}),
    ],
)
def test_what_is_no_call_is_content(client, text, more, stream):
    response = client.chat.completions.create(**ask(text, **more), stream=stream)
    if stream:
        assert put_together(response) == (text, "", [], "stop")
    else:
        message = response.choices[0].message
        assert (message.content, message.tool_calls, response.choices[0].finish_reason) == (text, None, "stop")


def test_an_answer_cut_short_says_so(client):
    choice = client.chat.completions.create(**ask(ONE, max_tokens=len(ONE.encode()) - 30)).choices[0]
    assert choice.finish_reason == "length"
    assert choice.message.tool_calls[0].function.arguments == '{"city":'


def test_one_call_where_parallel_calls_are_off(client):
    message = client.chat.completions.create(**ask(TWO, parallel_tool_calls=False)).choices[0].message
    assert len(message.tool_calls) == 1 and "get_time" in message.content


def test_a_named_tool_is_the_only_one(client):
    named = {"type": "function", "function": {"name": "get_time"}}
    body = ChatBody(**ask("x", tool_choice=named))
    tools = read_tools(body)
    assert (tools.names, tools.choice, tools.parallel, len(tools.listed)) == (("get_time",), "required", False, 2)


@pytest.mark.parametrize("stream", [True, False])
def test_functions_are_answered_in_their_own_shape(client, stream):
    request = ask(TWO, tools=openai.NOT_GIVEN, functions=[WEATHER["function"], TIME["function"]], stream=stream)
    response = client.chat.completions.create(**request)
    if not stream:
        choice = response.choices[0]
        called, finish = choice.message.function_call.model_dump(), choice.finish_reason
        assert choice.message.tool_calls is None
    else:
        deltas = [chunk.choices[0] for chunk in response]
        calls = [choice.delta.function_call for choice in deltas if choice.delta.function_call]
        called = {"name": calls[0].name, "arguments": "".join(call.arguments for call in calls)}
        finish = deltas[-1].finish_reason
        assert [call.name for call in calls[1:]] == [None] * (len(calls) - 1)
    assert called == {"name": "get_weather", "arguments": '{"city": "Zürich 🦆"}'}
    assert finish == "function_call"


def test_a_conversation_with_functions_and_their_results(client):
    messages = [
        {"role": "user", "content": "weather?"},
        {"role": "assistant", "content": None, "function_call": {"name": "get_weather", "arguments": '{"city": "X"}'}},
        {"role": "function", "name": "get_weather", "content": "sunny"},
    ]
    message = client.chat.completions.create(model="echo", messages=messages, temperature=0).choices[0].message
    assert message.content == "sunny"


@pytest.mark.parametrize("stream", [True, False])
def test_thoughts(client, stream):
    text = "<think>\nhm 🦆\n</think>\n\nyes"
    response = client.chat.completions.create(**ask(text), stream=stream)
    if stream:
        assert put_together(response) == ("yes", "hm 🦆", [], "stop")
        return
    message = response.choices[0].message
    assert (message.content, message.reasoning_content, message.reasoning) == ("yes", "hm 🦆", "hm 🦆")
    assert response.usage.completion_tokens_details.reasoning_tokens == len("hm 🦆".encode())


@pytest.mark.parametrize("stream", [True, False])
def test_thoughts_are_left_out_on_request(client, stream):
    request = ask("<think>hm</think>yes", stream=stream, extra_body={"include_reasoning": False})
    response = client.chat.completions.create(**request)
    if stream:
        assert put_together(response) == ("yes", "", [], "stop")
    else:
        assert response.choices[0].message.content == "yes"
        assert not hasattr(response.choices[0].message, "reasoning")


def test_logprobs_go_with_every_token_of_a_call(client):
    request = ask(ONE, logprobs=True)
    content = client.chat.completions.create(**request).choices[0].logprobs.content
    assert b"".join(bytes(entry.bytes) for entry in content) == ONE.encode()
    chunks = client.chat.completions.create(**request, stream=True)
    assert [e for c in chunks for e in (c.choices[0].logprobs.content if c.choices[0].logprobs else ())] == content


def test_tokenize_counts_the_tools(url):
    body = {"messages": [{"role": "user", "content": "hi"}], "tools": [TIME, TIME]}
    assert httpx.post(f"{url}/tokenize", json=body).json()["error"]["param"] == "tools[1].function.name"


def called(**changes):
    return {"id": "c1", "type": "function", "function": {"name": "f", "arguments": "{}"}, **changes}


def named(name, **more):
    return {"type": "function", "function": {"name": name, **more}}


def test_bad_tools_are_named(url):
    history = [{"role": "assistant", "tool_calls": [called()]}]
    cases = [
        ({"tools": [TIME, TIME]}, "tools[1].function.name"),
        ({"tools": [named("no spaces")]}, "tools[0].function.name"),
        ({"tools": [named("x" * 65)]}, "tools[0].function.name"),
        ({"tools": [named("")]}, "tools[0].function.name"),
        ({"tools": [{"type": "function"}]}, "tools[0].function"),
        ({"tools": [{"type": "custom", "custom": {"name": "x"}}]}, "tools[0].type"),
        ({"tools": [named("f", parameters={"type": "array"})]}, "tools[0].function.parameters"),
        ({"tools": [named("f", parameters=[])]}, "tools[0].function.parameters"),
        ({"tools": [named("f", parameters={"properties": []})]}, "tools[0].function.parameters.properties"),
        ({"tools": [named(f"f{i}") for i in range(129)]}, "tools"),
        ({"tools": "x"}, "tools"),
        ({"tools": [TIME], "tool_choice": named("get_tim")}, "tool_choice"),
        ({"tools": [TIME], "tool_choice": "always"}, "tool_choice"),
        ({"tools": [], "tool_choice": "required"}, "tool_choice"),
        ({"tool_choice": named("f")}, "tool_choice"),
        ({"parallel_tool_calls": True}, "parallel_tool_calls"),
        ({"tools": [TIME], "functions": [TIME["function"]]}, "functions"),
        ({"functions": [TIME["function"]] * 2}, "functions[1].name"),
        ({"functions": [TIME["function"]], "function_call": {"name": "x"}}, "function_call"),
        ({"function_call": {"name": "x"}}, "function_call"),
        ({"messages": [*history, {"role": "tool", "content": "1"}]}, "messages[1].tool_call_id"),
        ({"messages": [*history, {"role": "tool", "content": "1", "tool_call_id": "c2"}]}, "messages[1].tool_call_id"),
        ({"messages": [{"role": "function", "content": "1"}]}, "messages[0].name"),
        ({"messages": [{"role": "user", "content": "1", "tool_calls": [called()]}]}, "messages[0].tool_calls"),
        ({"messages": [{"role": "assistant", "tool_calls": [{"id": "x"}]}]}, "messages[0].tool_calls[0].function"),
        ({"chat_template_kwargs": {"messages": []}}, "chat_template_kwargs.messages"),
        ({"chat_template_kwargs": {"self": 1}}, "chat_template_kwargs.self"),
    ]
    for changes, param in cases:
        body = {"messages": [{"role": "user", "content": "hi"}], **changes}
        response = httpx.post(f"{url}/v1/chat/completions", json=body)
        assert (response.status_code, response.json()["error"]["param"]) == (400, param), (changes, response.text)


def test_a_misspelt_tool_choice_is_helped(url):
    body = {"messages": [{"role": "user", "content": "hi"}], "tools": [TIME], "tool_choice": named("get_tim")}
    assert "Did you mean get_time" in httpx.post(f"{url}/v1/chat/completions", json=body).json()["error"]["message"]


def test_our_own_client_puts_calls_together(url):
    with Client(f"{url}/v1") as client:
        text = f"<think>hm</think>Let me see.\n{TWO}"
        tools = {"tools": [WEATHER, TIME], "temperature": 0}
        whole = client.chat([{"role": "user", "content": text}], model="echo", **tools).choices[0].message
        message = Message()
        for chunk in client.chat([{"role": "user", "content": text}], model="echo", stream=True, **tools):
            message.add(chunk.choices[0].delta)
        for call in (*whole.tool_calls, *message.tool_calls):
            assert call.id.startswith("call_")
            call.id = "same"
        assert message == whole
        assert (whole.content, whole.reasoning_content, len(whole.tool_calls)) == ("Let me see.", "hm", 2)
        results = [{"role": "tool", "tool_call_id": "same", "content": "sunny"}]
        asked = [{"role": "user", "content": text}, whole.told(), *results]
        assert client.chat(asked, model="echo", **tools).choices[0].message.content == "sunny"


def test_swifts_client_names_know_tools(url):
    from martlet.swift import inference_client
    from martlet.swift.client import XRequestConfig

    ask = {"host": "127.0.0.1", "port": url.rpartition(":")[2], "request_config": XRequestConfig(temperature=0)}
    message = inference_client("echo", ONE, tools=[WEATHER], **ask).choices[0].message
    assert message.tool_calls[0].function.name == "get_weather"
    assert inference_client("echo", ONE, tools=[WEATHER], tool_choice="none", **ask).choices[0].message.content == ONE
