"""/v1/responses as the official client sees it, and its items whatever the model says."""

from __future__ import annotations

import json

import httpx
import openai
import pytest
from hypothesis import given
from said import CHUNKS, Said, whole_and_streamed

from martlet.server.response_items import ResponseShape


def ask(client, text="hé 🦆", **more):
    return client.responses.create(model="echo", input=text, temperature=0, **more)


def events(client, **more):
    return list(ask(client, stream=True, **more))


def test_a_text_is_answered(client):
    answer = ask(client)
    assert answer.output_text == "hé 🦆" and answer.status == "completed" and answer.error is None
    assert answer.id.startswith("resp_") and answer.model == "echo" and answer.store is False
    usage = answer.usage
    assert (usage.output_tokens, usage.total_tokens) == (9, usage.input_tokens + 9)
    assert answer.output[0].status == "completed" and answer.output[0].role == "assistant"


def test_instructions_and_items_become_turns(client):
    """The echo repeats the last turn, so what came before shows in the count."""
    items = [
        {"role": "user", "content": "one"},
        {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "two"}]},
        {"role": "user", "content": [{"type": "input_text", "text": "th"}, {"type": "input_text", "text": "ree"}]},
    ]
    answer = client.responses.create(model="echo", input=items, instructions="be", temperature=0)
    told = ["system\x02be\x03", "user\x02one\x03", "assistant\x02two\x03", "user\x02three\x03"]
    assert answer.output_text == "three" and answer.instructions == "be"
    assert answer.usage.input_tokens == sum(map(len, told))


def test_the_events_come_in_order_with_numbers_and_make_the_whole(client):
    found = events(client)
    assert [e.sequence_number for e in found] == list(range(len(found)))
    kinds = [e.type for e in found]
    assert kinds[:4] == [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.content_part.added",
    ]
    assert kinds[-4:] == [
        "response.output_text.done",
        "response.content_part.done",
        "response.output_item.done",
        "response.completed",
    ]
    assert set(kinds[4:-4]) == {"response.output_text.delta"}
    assert "".join(e.delta for e in found[4:-4]) == found[-4].text == found[-1].response.output_text == "hé 🦆"
    assert found[-1].response.usage.output_tokens == 9
    assert found[0].response.status == "in_progress" and found[0].response.output == []


def test_the_wire_names_each_event(url):
    text = httpx.post(f"{url}/v1/responses", json={"input": "a", "stream": True, "temperature": 0}).text
    for event in text.strip().split("\n\n"):
        name, data = event.split("\n")
        assert name.removeprefix("event: ") == json.loads(data.removeprefix("data: "))["type"]


def test_an_answer_cut_short_is_incomplete(client):
    for answer in (ask(client, max_output_tokens=2), events(client, max_output_tokens=2)[-1].response):
        assert answer.status == "incomplete" and answer.incomplete_details.reason == "max_output_tokens"
        assert answer.output[0].status == "incomplete" and answer.max_output_tokens == 2


def test_logprobs_when_included(client):
    wish = {"include": ["message.output_text.logprobs"], "top_logprobs": 2}
    whole = ask(client, "ab", **wish).output[0].content[0].logprobs
    assert [entry.token for entry in whole] == ["a", "b"] and len(whole[0].top_logprobs) == 2
    deltas = [e for e in events(client, text="ab", **wish) if e.type == "response.output_text.delta"]
    assert [entry.token for e in deltas for entry in e.logprobs] == ["a", "b"]


@pytest.mark.parametrize(
    ("more", "param"),
    [
        ({"store": True}, "store"),
        ({"previous_response_id": "resp_1"}, "previous_response_id"),
        ({"conversation": "c"}, "conversation"),
        ({"background": True}, "background"),
        ({"truncation": "auto"}, "truncation"),
        ({"service_tier": "flex"}, "service_tier"),
        ({"prompt": {"id": "p"}}, "prompt"),
        ({"max_tool_calls": 1}, "max_tool_calls"),
        ({"include": ["file_search_call.results"]}, "include"),
        ({"top_logprobs": 3}, "top_logprobs"),
        ({"reasoning": {"summary": "detailed"}}, "reasoning.summary"),
        ({"text": {"verbosity": "low"}}, "text.verbosity"),
        ({"text": {"format": {}}}, "text.format.type"),
        ({"tools": [{"type": "web_search"}]}, "tools[0].type"),
        ({"tools": [{}]}, "tools[0].type"),
        ({"tools": [{"type": "function"}]}, "tools[0].name"),
        ({"tools": [{"type": "function", "name": "a b"}]}, "tools[0].name"),
        ({"tools": [{"type": "function", "name": "f", "parameters": {"properties": 1}}]},
         "tools[0].parameters.properties"),
        ({"tool_choice": {"type": "allowed_tools"}}, "tool_choice"),
        ({"max_output_tokens": 0}, "max_output_tokens"),
        ({"max_output_tokens": 10**6}, "input"),
        ({"temperature": 1000}, "temperature"),
        ({"input": 3}, "input"),
        ({"input": []}, "input"),
        ({"input": [3]}, "input[0]"),
        ({"input": [{}]}, "input[0].role"),
        ({"input": [{"role": "user"}]}, "input[0].content"),
        ({"input": [{"role": "wizard", "content": "a"}]}, "input"),
        ({"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "http://x"}]}]},
         "input[0].content[0]"),
        ({"input": [{"role": "user", "content": [{"type": "input_file", "file_url": "file:///etc/passwd"}]}]},
         "input[0].content[0]"),
        ({"input": [{"type": "item_reference", "id": "x"}]}, "input[0].type"),
        ({"input": [{"type": "function_call", "name": "f"}]}, "input[0].arguments"),
        ({"input": [{"type": "function_call_output", "output": "a"}]}, "input[0].call_id"),
        ({"input": [{"type": "reasoning", "summary": []}, {"role": "user", "content": "a"}][:1]}, "input"),
        ({"metadata": {"a": 1}}, "metadata.a"),
        ({"n": 2}, "n"),
        ({"model": "ecko"}, "model"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("stream", [False, True])
def test_refusals_name_the_field(url, more, param, stream):
    answer = httpx.post(f"{url}/v1/responses", json={"input": "a", "stream": stream, **more})
    assert answer.status_code == (404 if param == "model" else 400), answer.text
    error = answer.json()["error"]
    assert error["param"] == param, answer.text
    if param.startswith("tools"):
        assert error["message"].startswith(param), answer.text


def test_nothing_is_stored(client):
    with pytest.raises(openai.NotFoundError, match="no responses are stored"):
        client.responses.retrieve("resp_1")


def test_unknown_fields_are_named(url):
    answer = httpx.post(
        f"{url}/v1/responses", json={"input": "a", "temperature": 0, "novel": 1, "": 2, "text": {"x": 1}}
    )
    assert answer.status_code == 200
    assert set(answer.headers["x-martlet-ignored-fields"].split(", ")) == {"novel", "?", "text.x"}


@given(CHUNKS)
def test_items_are_the_same_streamed_and_whole(chunks):
    whole, streamed = whole_and_streamed(lambda: ResponseShape(None, {}, wants_logprobs=False), "resp_1", chunks)
    assert [e["sequence_number"] for e in streamed] == list(range(len(streamed)))
    last = streamed[-1]["response"]
    assert last["output"] == whole["output"] and last["status"] == whole["status"]
    said = Said.of(chunks)
    made = [item for item in whole["output"] if item["type"] == "function_call"]
    assert [(c["call_id"], c["name"], c["arguments"]) for c in made] == said.calls
    for kind, text in (("message", said.content), ("reasoning", said.reasoning)):
        items = [item for item in whole["output"] if item["type"] == kind]
        assert "".join(item["content"][0]["text"] for item in items) == text
    rebuilt: dict[int, dict] = {}
    for event in streamed:  # as a client puts it together from deltas alone
        at = event.get("output_index")
        if event["type"] == "response.output_item.added":
            assert at == len(rebuilt)
            rebuilt[at] = event["item"] | {"text": ""}
        elif event["type"].endswith(".delta"):
            rebuilt[at]["text"] += event["delta"]
            assert event["item_id"] == rebuilt[at]["id"]
    for item, made_of in zip(whole["output"], rebuilt.values(), strict=True):
        assert (item["arguments"] if "arguments" in item else item["content"][0]["text"]) == made_of["text"]


SAYS = '<think>hm</think>So.\n<tool_call>\n{"name": "add", "arguments": {"a": 1, "b": "🦆"}}\n</tool_call>'
ADD = {
    "type": "function",
    "name": "add",
    "parameters": {"type": "object", "properties": {"a": {"type": "integer"}, "b": {"type": "string"}}},
    "strict": None,
}


def shape(item):
    if item.type == "function_call":
        return item.type, item.name, json.loads(item.arguments), item.call_id[:5]
    return item.type, item.content[0].text


@pytest.mark.parametrize("stream", [False, True])
def test_thoughts_text_and_calls_are_items_of_their_own(client, stream):
    if stream:
        found = events(client, text=SAYS, tools=[ADD])
        assert [e.sequence_number for e in found] == list(range(len(found)))
        answer = found[-1].response
        arguments = "".join(e.delta for e in found if e.type == "response.function_call_arguments.delta")
        assert json.loads(arguments) == {"a": 1, "b": "🦆"}
        thoughts = "".join(e.delta for e in found if e.type == "response.reasoning_text.delta")
        assert thoughts == "hm"
    else:
        answer = ask(client, SAYS, tools=[ADD])
    assert [shape(item) for item in answer.output] == [
        ("reasoning", "hm"),
        ("message", "So."),
        ("function_call", "add", {"a": 1, "b": "🦆"}, "call_"),
    ]
    assert answer.usage.output_tokens_details.reasoning_tokens == 2
    assert answer.tools[0].name == "add" and answer.status == "completed"


def test_the_next_turn_brings_the_calls_and_their_results(client):
    first = ask(client, SAYS, tools=[ADD])
    call = first.output[-1]
    turns = [
        {"role": "user", "content": SAYS},
        *[item.model_dump(exclude_none=True) for item in first.output],
        {"type": "function_call_output", "call_id": call.call_id, "output": "2"},
    ]
    answer = client.responses.create(model="echo", input=turns, tools=[ADD], temperature=0)
    assert answer.output_text == "2"  # the echo repeats the last turn: the result


def test_a_choice_of_tools_is_passed_on(url):
    for choice in ("sub", "nobody"):
        wish = {"input": "a", "tools": [ADD], "tool_choice": {"type": "function", "name": choice}}
        answer = httpx.post(f"{url}/v1/responses", json=wish)
        assert answer.status_code == 400 and answer.json()["error"]["param"] == "tool_choice"
    assert httpx.post(f"{url}/v1/responses", json={"input": "a", "tool_choice": "required"}).status_code == 400
