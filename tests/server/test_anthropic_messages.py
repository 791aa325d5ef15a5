"""Anthropic's /v1/messages as the official client sees it, errors in its shape, and blocks whatever the model says."""

from __future__ import annotations

import json

import anthropic
import httpx
import pytest
from hypothesis import given
from live_server import live
from said import CHUNKS, Said, whole_and_streamed

from fake_backend import FakeBackend, FakeTemplate
from martlet.server import create_app
from martlet.server.message_blocks import MessageShape

HI = [{"role": "user", "content": "hé 🦆"}]
GREEDY = {"temperature": 0}


@pytest.fixture(scope="module")
def claude(url):
    with anthropic.Anthropic(base_url=url, api_key="none", max_retries=0) as client:
        yield client


def ask(claude, messages=HI, max_tokens=50, **more):
    return claude.messages.create(model="echo", messages=messages, max_tokens=max_tokens, extra_body=GREEDY, **more)


def test_a_message_is_answered(claude):
    message = ask(claude, system="be")
    assert [(block.type, block.text) for block in message.content] == [("text", "hé 🦆")]
    assert (message.stop_reason, message.stop_sequence, message.role, message.model) == (
        "end_turn",
        None,
        "assistant",
        "echo",
    )
    assert message.usage.output_tokens == 9
    prompt = message.usage.input_tokens + message.usage.cache_read_input_tokens
    assert prompt == len("system\x02be\x03user\x02\x03") + 8


def test_the_stream_makes_the_same_message(claude):
    with claude.messages.stream(model="echo", messages=HI, max_tokens=50, extra_body=GREEDY) as stream:
        kinds = [event.type for event in stream if event.type != "text"]
        message = stream.get_final_message()
    assert kinds[:2] == ["message_start", "content_block_start"]
    assert kinds[-3:] == ["content_block_stop", "message_delta", "message_stop"]
    assert set(kinds[2:-3]) == {"content_block_delta"}
    whole = ask(claude)
    assert message.content[0].text == whole.content[0].text and message.stop_reason == whole.stop_reason
    assert message.usage.output_tokens == whole.usage.output_tokens


def test_stop_sequences_and_limits_are_told(claude):
    message = ask(claude, [{"role": "user", "content": "one two"}], stop_sequences=["x", " t"])
    assert (message.content[0].text, message.stop_reason, message.stop_sequence) == ("one", "stop_sequence", " t")
    assert ask(claude, max_tokens=1).stop_reason == "max_tokens"
    message = ask(claude, [{"role": "user", "content": "a<end>b"}])  # the template's own stop is nobody's sequence
    assert (message.content[0].text, message.stop_reason, message.stop_sequence) == ("a", "end_turn", None)


def test_blocks_and_prefill_become_turns(claude):
    blocks = [{"type": "text", "text": "he", "cache_control": {"type": "ephemeral"}}, {"type": "text", "text": "llo"}]
    assert ask(claude, [{"role": "user", "content": blocks}]).content[0].text == "hello"
    # the last turn is the model's: it goes on with it (the echo then repeats what it finds there)
    message = ask(claude, [*HI, {"role": "assistant", "content": "so"}])
    assert message.content[0].text == "so"
    counted = claude.messages.count_tokens(model="echo", messages=[*HI, {"role": "assistant", "content": "so"}])
    used = message.usage
    assert counted.input_tokens == used.input_tokens + used.cache_read_input_tokens


def test_tokens_are_counted_as_they_are_used(claude):
    counted = claude.messages.count_tokens(model="echo", messages=HI, system="be")
    used = ask(claude, system="be").usage
    assert counted.input_tokens == used.input_tokens + used.cache_read_input_tokens
    long = [{"role": "user", "content": "x" * 2000}]  # longer than the model can take
    assert claude.messages.count_tokens(model="echo", messages=long).input_tokens == 2006


IMAGE = {"type": "image", "source": {"type": "url", "url": "http://169.254.169.254/latest"}}


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"max_tokens": None}, "max_tokens"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "robot", "content": "a"}]}, "messages[0].role"),
        ({"messages": [{"role": "user", "content": [IMAGE]}]}, "messages[0].content[0]"),
        ({"messages": [{"role": "user", "content": [{"text": "a"}]}]}, "messages[0].content[0].type"),
        ({"messages": [{"role": "user", "content": [{"type": "tool_result", "content": "a"}]}]}, "tool_use_id"),
        ({"messages": [{"role": "assistant", "content": [{"type": "tool_use", "id": "a", "name": "f"}]}]}, "input"),
        ({"system": [IMAGE]}, "system[0]"),
        ({"stop_sequences": [""]}, "stop_sequences"),
        ({"stop_sequences": ["a"] * 10_000}, "stop_sequences"),
        ({"thinking": {"type": "enabled", "budget_tokens": 1024}}, "thinking"),
        ({"thinking": {}}, "thinking.type"),
        ({"mcp_servers": [{}]}, "mcp_servers"),
        ({"container": "c"}, "container"),
        ({"tools": [{"type": "bash_20250124", "name": "bash"}]}, "tools[0].type"),
        ({"tools": [{"name": "f"}]}, "tools[0].input_schema"),
        ({"tools": [{"name": "f", "input_schema": {"type": "array"}}]}, "tools[0].input_schema must"),
        ({"tools": [{"name": "a b", "input_schema": {}}]}, "tools[0].name must"),
        ({"tool_choice": {"type": "any-ish"}}, "tool_choice.type"),
        ({"temperature": -1}, "temperature"),
    ],
)
def test_refusals_name_the_field_in_anthropics_shape(url, more, words):
    answer = httpx.post(f"{url}/v1/messages", json={"messages": HI, "max_tokens": 5, **more})
    assert answer.status_code == 400
    body = answer.json()
    assert body["type"] == "error" and body["error"]["type"] == "invalid_request_error"
    assert words in body["error"]["message"]
    assert body["request_id"] == answer.headers["x-request-id"]


def test_the_clients_errors(claude, url):
    with pytest.raises(anthropic.NotFoundError):
        claude.messages.create(model="ecko", messages=HI, max_tokens=5)
    backend = FakeBackend()
    with live(create_app(backend, FakeTemplate(), api_keys=["right"])) as address:
        with pytest.raises(anthropic.AuthenticationError) as caught:
            anthropic.Anthropic(base_url=address, api_key="wrong").messages.create(
                model="echo", messages=HI, max_tokens=5
            )
        assert caught.value.body["error"]["type"] == "authentication_error"
        right = anthropic.Anthropic(base_url=address, api_key="right", max_retries=0)
        assert ask(right).content[0].text == "hé 🦆"
        backend.runner.fail_on = b"poison"
        with pytest.raises(anthropic.InternalServerError) as caught:
            ask(right, [{"role": "user", "content": "poison"}])
        assert caught.value.body["error"]["type"] == "api_error" and "secret" not in str(caught.value)
        with (
            pytest.raises(anthropic.APIStatusError),
            right.messages.stream(
                model="echo", messages=[{"role": "user", "content": "poison"}], max_tokens=5
            ) as stream,
        ):
            stream.get_final_message()
    backend.close()


@given(CHUNKS)
def test_blocks_are_the_same_streamed_and_whole(chunks):
    whole, streamed = whole_and_streamed(lambda: MessageShape(()), "msg_1", chunks)
    said = Said.of(chunks)
    blocks: list[dict] = []
    for event in streamed:
        if event["type"] == "content_block_start":
            assert event["index"] == len(blocks)
            blocks.append(event["content_block"] | {"json": ""})
        elif event["type"] == "content_block_delta":
            assert event["index"] == len(blocks) - 1
            block, delta = blocks[-1], event["delta"]
            for kind, name in (("text", "text"), ("thinking", "thinking"), ("json", "partial_json")):
                if name in delta:
                    block[kind] += delta[name]
    starts = sum(e["type"] == "content_block_start" for e in streamed)
    assert starts == sum(e["type"] == "content_block_stop" for e in streamed) == len(whole["content"])
    assert [(b["id"], b["name"], b["json"]) for b in blocks if b["type"] == "tool_use"] == said.calls
    for block, made in zip(blocks, whole["content"], strict=True):
        text = block.pop("json")
        if block["type"] == "tool_use":
            try:
                block["input"] = json.loads(text)
            except ValueError:
                block["input"] = {}
        assert block == made
    last = next(e for e in streamed if e["type"] == "message_delta")
    assert last["delta"]["stop_reason"] == whole["stop_reason"] == ("tool_use" if said.calls else "end_turn")


SAYS = '<think>hm</think>So.\n<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call>'
ADD = {
    "name": "add",
    "description": "adds",
    "input_schema": {"type": "object", "properties": {"a": {"type": "integer"}}},
}


@pytest.mark.parametrize("stream", [False, True])
def test_thoughts_text_and_calls_are_blocks(claude, stream):
    said = {"model": "echo", "messages": [{"role": "user", "content": SAYS}], "max_tokens": 200, "tools": [ADD]}
    if stream:
        with claude.messages.stream(**said, extra_body=GREEDY) as events:
            message = events.get_final_message()
    else:
        message = claude.messages.create(**said, extra_body=GREEDY)
    assert [block.type for block in message.content] == ["thinking", "text", "tool_use"]
    thinking, text, call = message.content
    assert (thinking.thinking, text.text, call.name, call.input) == ("hm", "So.", "add", {"a": 1})
    assert message.stop_reason == "tool_use"
    turns = [
        {"role": "user", "content": SAYS},
        {"role": "assistant", "content": [block.model_dump(exclude_none=True) for block in message.content]},
        {"role": "user", "content": [{"type": "tool_result", "tool_use_id": call.id, "content": "2"}]},
    ]
    assert ask(claude, turns, tools=[ADD]).content[0].text == "2"


def test_tools_count_and_may_be_chosen(claude, url):
    plain = claude.messages.count_tokens(model="echo", messages=HI)
    assert claude.messages.count_tokens(model="echo", messages=HI, tools=[ADD]).input_tokens >= plain.input_tokens
    body = {"messages": HI, "max_tokens": 9, "tools": [ADD], "tool_choice": {"type": "tool", "name": "sub"}}
    answer = httpx.post(f"{url}/v1/messages", json=body)
    assert answer.status_code == 400 and "tool_choice" in answer.json()["error"]["message"]
    body["tool_choice"] = {"type": "none", "disable_parallel_tool_use": True}
    assert httpx.post(f"{url}/v1/messages", json={**body, "temperature": 0}).json()["stop_reason"] == "end_turn"


def test_thinking_may_be_left_to_the_model_and_switched_off_where_the_template_can(monkeypatch, url):
    body = {"messages": HI, "max_tokens": 50, "temperature": 0}

    def ask_for(kind):
        return httpx.post(f"{url}/v1/messages", json={**body, "thinking": {"type": kind}})

    assert ask_for("adaptive").status_code == 200
    render, told = FakeTemplate.render, []

    def switched(self, messages, *, enable_thinking=True, **more):
        told.append(enable_thinking)
        return render(self, messages, **more)

    monkeypatch.setattr(FakeTemplate, "render", switched)
    assert ask_for("disabled").status_code == 200 and told == [False]
    monkeypatch.setattr(FakeTemplate, "reasoning", None)
    assert ask_for("disabled").status_code == 200 and told == [False, True]
    assert "thinking" in ask_for("adaptive").json()["error"]["message"]
