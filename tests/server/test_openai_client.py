"""What the official client sees, on a model that echoes byte by byte: every emoji is cut between tokens."""

from __future__ import annotations

import json

import httpx
import openai
import pytest
from live_server import live

from fake_backend import FakeBackend, FakeTemplate
from martlet.server import create_app

TEXTS = ["plain words", "日本語のテキスト、そして中文", "🦆 ducks 👩‍👩‍👧‍👦 fly", "é\nñ", " leading space", "x"]


def user(text):
    return [{"role": "user", "content": text}]


def streamed(chunks):
    """Chunks of a one-choice chat stream, put together as a client does."""
    text, finish = "", None
    for chunk in chunks:
        for choice in chunk.choices:
            text += choice.delta.content or ""
            finish = choice.finish_reason or finish
    return text, finish


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("how", [{"temperature": 0}, {"temperature": 1, "seed": 7}])
def test_stream_equals_plain(client, text, how):
    ask = {"model": "echo", "messages": user(text), "max_tokens": 100, **how}
    choice = client.chat.completions.create(**ask).choices[0]
    assert streamed(client.chat.completions.create(**ask, stream=True)) == (choice.message.content, "stop")
    if how["temperature"] == 0:
        assert choice.message.content == text
    ask = {"model": "echo", "prompt": text, "max_tokens": 100, **how}
    plain = client.completions.create(**ask).choices[0].text
    assert "".join(c.choices[0].text for c in client.completions.create(**ask, stream=True)) == plain


@pytest.mark.parametrize("stop", ["world", ["nothing", "wor"], "世界"])
def test_a_stop_string_cut_across_tokens_leaves_no_trace(client, stop):
    text = "hello 世界" if stop == "世界" else "hello world"
    ask = {"model": "echo", "messages": user(text), "temperature": 0, "stop": stop}
    response = client.chat.completions.create(**ask)
    assert response.choices[0].message.content == "hello "
    assert response.choices[0].finish_reason == "stop"
    assert response.choices[0].stop_reason == (stop if isinstance(stop, str) else "wor")
    chunks = list(client.chat.completions.create(**ask, stream=True))
    assert streamed(chunks) == ("hello ", "stop")
    kept = client.chat.completions.create(**ask, extra_body={"include_stop_str_in_output": True})
    assert kept.choices[0].message.content.endswith(stop if isinstance(stop, str) else "wor")


def test_the_templates_own_stop_ends_a_turn_without_a_stop_reason(client):
    choice = client.chat.completions.create(model="echo", messages=user("a<end>b"), temperature=0).choices[0]
    assert (choice.message.content, choice.finish_reason) == ("a", "stop")
    assert not hasattr(choice, "stop_reason")


def test_the_first_delta_has_the_role_and_all_chunks_one_id(client):
    chunks = list(client.chat.completions.create(model="echo", messages=user("hey"), temperature=0, stream=True))
    assert [c.choices[0].delta.role for c in chunks] == ["assistant"] + [None] * (len(chunks) - 1)
    assert len({c.id for c in chunks}) == 1 and chunks[0].id.startswith("chatcmpl-")
    assert {c.object for c in chunks} == {"chat.completion.chunk"}
    assert [c.choices[0].finish_reason for c in chunks] == [None] * (len(chunks) - 1) + ["stop"]
    assert all(c.usage is None for c in chunks)


def test_usage_comes_last_and_only_when_asked_for(client):
    ask = {"model": "echo", "messages": user("hey"), "temperature": 0}
    plain = client.chat.completions.create(**ask).usage
    chunks = list(client.chat.completions.create(**ask, stream=True, stream_options={"include_usage": True}))
    assert all(c.usage is None and len(c.choices) == 1 for c in chunks[:-1])
    last = chunks[-1]
    assert last.choices == [] and last.usage.completion_tokens == plain.completion_tokens == 4  # h e y <eos>
    assert last.usage.prompt_tokens == plain.prompt_tokens == len("user") + len("hey") + 2
    assert last.usage.total_tokens == last.usage.prompt_tokens + 4


def test_a_prefix_hit_is_told_in_usage(client):
    ask = {"model": "echo", "messages": user("a prompt of more than one block of sixteen tokens"), "temperature": 0}
    client.chat.completions.create(**ask)
    assert client.chat.completions.create(**ask).usage.prompt_tokens_details.cached_tokens >= 48
    salted = client.chat.completions.create(**ask, extra_body={"cache_salt": "mine"})
    assert salted.usage.prompt_tokens_details.cached_tokens == 0


def test_sse_is_exact_on_the_wire(url):
    body = {"model": "echo", "messages": user("hi"), "stream": True, "temperature": 0}
    with httpx.stream("POST", f"{url}/v1/chat/completions", json=body) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        assert "content-length" not in response.headers
        text = response.read().decode()
    events = text.split("\n\n")
    assert events.pop() == "" and events[-1] == "data: [DONE]"
    assert all(event.startswith("data: {") for event in events[:-1])
    assert all(set(json.loads(e[6:])) == {"id", "object", "created", "model", "choices"} for e in events[:-1])
    body = {"model": "echo", "prompt": "hi", "stream": True}
    text = httpx.post(f"{url}/v1/completions", json=body).text
    assert {json.loads(e[6:])["object"] for e in text.split("\n\n")[:-2]} == {"text_completion"}


def test_n_choices_are_the_answers_to_consecutive_seeds(client):
    ask = {"model": "echo", "messages": user("abcdef"), "seed": 5}
    response = client.chat.completions.create(**ask, n=3)
    single = [client.chat.completions.create(**{**ask, "seed": 5 + i}).choices[0].message.content for i in range(3)]
    assert [c.index for c in response.choices] == [0, 1, 2]
    assert [c.message.content for c in response.choices] == single
    assert len(set(single)) == 3
    texts = ["", "", ""]
    for chunk in client.chat.completions.create(**ask, n=3, stream=True):
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
    assert texts == single


def test_a_seed_belongs_to_its_request(client):
    ask = {"model": "echo", "messages": user("abcdefghijklmnopqrstuvwxyz"), "seed": 3}
    first = client.chat.completions.create(**ask).choices[0].message.content
    unseeded = {client.chat.completions.create(**{**ask, "seed": None}).choices[0].message.content for _ in range(12)}
    assert client.chat.completions.create(**ask).choices[0].message.content == first
    assert len(unseeded) > 1  # the seeded request has not reseeded the others


@pytest.mark.parametrize(
    ("prompt", "texts"),
    [("abc", ["abc"]), (["ab", "cd"], ["ab", "cd"]), ([104, 105], ["hi"]), ([[104], [105, 106]], ["h", "ij"])],
)
def test_completions_take_all_four_kinds_of_prompt(client, prompt, texts):
    response = client.completions.create(model="echo", prompt=prompt, temperature=0, n=2)
    assert [c.text for c in response.choices] == [text for text in texts for _ in range(2)]
    assert [c.index for c in response.choices] == list(range(2 * len(texts)))
    assert response.object == "text_completion" and response.id.startswith("cmpl-")
    assert response.usage.prompt_tokens == sum(map(len, texts))
    texts_by_index = dict.fromkeys(range(2 * len(texts)), "")
    for chunk in client.completions.create(model="echo", prompt=prompt, temperature=0, n=2, stream=True):
        texts_by_index[chunk.choices[0].index] += chunk.choices[0].text
    assert list(texts_by_index.values()) == [c.text for c in response.choices]


def test_completions_are_raw_text_and_16_tokens(client):
    response = client.completions.create(model="echo", prompt="z" * 40, temperature=0)
    assert response.usage.prompt_tokens == 40  # no chat template
    assert response.usage.completion_tokens == 16
    assert response.choices[0].finish_reason == "length"


def test_chat_runs_to_the_models_length(client):
    response = client.chat.completions.create(
        model="echo", messages=user("again "), temperature=0, extra_body={"ignore_eos": True}
    )
    assert response.usage.total_tokens == 512
    assert response.choices[0].finish_reason == "length"


def test_chat_logprobs_carry_the_tokens_real_bytes(client):
    ask = {"model": "echo", "messages": user("a🦆"), "temperature": 0, "logprobs": True, "top_logprobs": 2}
    content = client.chat.completions.create(**ask).choices[0].logprobs.content
    assert b"".join(bytes(entry.bytes) for entry in content) == "a🦆".encode()
    assert [entry.token for entry in content[:2]] == ["a", "bytes:\\xf0"]
    assert content[0].logprob == -0.25
    assert [(top.token, top.logprob) for top in content[0].top_logprobs] == [("a", -0.25), ("b", -1.25)]
    chunks = client.chat.completions.create(**ask, stream=True)
    assert [e for c in chunks for e in (c.choices[0].logprobs.content if c.choices[0].logprobs else ())] == content
    alone = client.chat.completions.create(**{**ask, "top_logprobs": None}).choices[0].logprobs.content
    assert all(entry.top_logprobs == [] for entry in alone)


def test_completion_logprobs_are_four_parallel_lists(client):
    ask = {"model": "echo", "prompt": "aéb", "temperature": 0, "logprobs": 2}
    choice = client.completions.create(**ask).choices[0]
    assert choice.logprobs.tokens == ["a", "bytes:\\xc3", "bytes:\\xa9", "b"]
    assert choice.logprobs.token_logprobs == [-0.25] * 4
    assert choice.logprobs.text_offset == [0, 1, 1, 2]
    assert choice.logprobs.top_logprobs[0] == {"a": -0.25, "b": -1.25}
    chunks = [c.choices[0] for c in client.completions.create(**ask, stream=True)]
    assert [t for c in chunks for t in c.logprobs.tokens] == choice.logprobs.tokens
    assert [o for c in chunks for o in c.logprobs.text_offset] == choice.logprobs.text_offset


def test_echo_puts_the_prompt_first_with_its_logprobs(client):
    ask = {"model": "echo", "prompt": "ab", "temperature": 0, "echo": True, "logprobs": 1, "n": 2}
    for choice in client.completions.create(**ask).choices:
        assert choice.text == "abab"
        assert choice.logprobs.tokens == ["a", "b", "a", "b"]
        assert choice.logprobs.token_logprobs == [None, -0.25, -0.25, -0.25]
        assert choice.logprobs.text_offset == [0, 1, 2, 3]
    texts = ["", ""]
    for chunk in client.completions.create(**ask, stream=True):
        texts[chunk.choices[0].index] += chunk.choices[0].text
    assert texts == ["abab", "abab"]
    by_ids = client.completions.create(model="echo", prompt=[65, 66], echo=True, temperature=0, max_tokens=1)
    assert by_ids.choices[0].text == "ABA"


def test_scoring_a_prompt_generates_nothing(client):
    response = client.completions.create(model="echo", prompt="abc", max_tokens=0, echo=True, logprobs=0)
    assert response.choices[0].text == "abc"
    assert response.choices[0].logprobs.token_logprobs == [None, -0.25, -0.25]
    assert response.choices[0].finish_reason == "length" and response.usage.completion_tokens == 0


def test_every_field_may_be_null(url):
    names = "n temperature top_p presence_penalty frequency_penalty seed stop max_tokens max_completion_tokens"
    names += " logit_bias logprobs top_logprobs stream stream_options tools tool_choice response_format user"
    body = {"model": "echo", "messages": user("hi"), **dict.fromkeys(names.split())}
    assert httpx.post(f"{url}/v1/chat/completions", json=body).status_code == 200
    names = "n temperature presence_penalty stop max_tokens logprobs echo suffix best_of stream"
    body = {"model": "echo", "prompt": "hi", **dict.fromkeys(names.split())}
    assert httpx.post(f"{url}/v1/completions", json=body).status_code == 200


def test_messages_of_all_kinds(client):
    call = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    messages = [
        {"role": "user", "content": "first"},
        {"role": "user", "content": [{"type": "text", "text": "in "}, {"type": "text", "text": "parts"}]},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c1", "content": "42"},
        {"role": "system", "content": "late"},
        {"role": "developer", "content": "later"},
        {"role": "user", "content": "the last one"},
    ]
    response = client.chat.completions.create(model="echo", messages=messages, temperature=0)
    assert response.choices[0].message.content == "the last one"
    assert response.choices[0].message.role == "assistant"
    rest = client.chat.completions.create(model="echo", messages=messages[:2], temperature=0)
    assert rest.choices[0].message.content == "in parts"


def test_the_reply_names_the_model_as_it_was_asked_for(client, url):
    assert [m.id for m in client.models.list()] == ["echo", "parrot"]
    card = client.models.retrieve("parrot")
    assert (card.root, card.max_model_len, card.parent) == ("echo", 512, None)
    assert client.chat.completions.create(model="parrot", messages=user("hi")).model == "parrot"
    assert httpx.post(f"{url}/v1/completions", json={"prompt": "hi"}).json()["model"] == "echo"
    with pytest.raises(openai.NotFoundError) as caught:
        client.models.retrieve("parot")
    assert "Did you mean parrot?" in caught.value.message


def test_max_completion_tokens_is_max_tokens(client):
    for name in ("max_tokens", "max_completion_tokens"):
        response = client.chat.completions.create(model="echo", messages=user("hello"), temperature=0, **{name: 2})
        assert response.choices[0].message.content == "he"


def test_the_models_defaults_fill_what_is_left_open():
    backend = FakeBackend()
    with live(create_app(backend, FakeTemplate(), defaults={"temperature": 0.0})) as url:
        ask = {"messages": user("abcdef"), "seed": 3}
        answers = [
            httpx.post(f"{url}/v1/chat/completions", json=ask | more).json()["choices"][0]["message"]["content"]
            for more in ({}, {"temperature": None}, {"temperature": 1})
        ]
    backend.close()
    assert answers == ["abcdef", "abcdef", "defabc"]


def test_ignored_fields_are_named(url):
    body = {"messages": user("hi"), "banana": 1, "user": "me", "bad\nname": 2}
    response = httpx.post(f"{url}/v1/chat/completions", json=body)
    assert response.status_code == 200
    assert response.headers["x-martlet-ignored-fields"] == "banana, bad?name"
    with httpx.stream("POST", f"{url}/v1/chat/completions", json={**body, "stream": True}) as response:
        assert "banana" in response.headers["x-martlet-ignored-fields"]
    assert "x-martlet-ignored-fields" not in httpx.post(f"{url}/v1/completions", json={"prompt": "a"}).headers


def test_continue_the_last_message(client):
    body = {"continue_final_message": True}
    ask = {"model": "echo", "messages": [*user("q"), {"role": "assistant", "content": "so far"}], "temperature": 0}
    assert client.chat.completions.create(**ask, extra_body=body).usage.prompt_tokens == (
        client.chat.completions.create(**ask).usage.prompt_tokens - 1
    )
