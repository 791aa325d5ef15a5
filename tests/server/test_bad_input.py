"""Whatever a client sends, it gets a 4xx that names what is wrong, and the next request is answered."""

from __future__ import annotations

import json

import httpx
import openai
import pytest

from martlet.server.schema import UNSUPPORTED, ChatBody, CompletionBody

HI = [{"role": "user", "content": "hi"}]
CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"

CHAT_CASES = [
    ({"messages": []}, "messages"),
    ({}, "messages"),
    ({"messages": "hi"}, "messages"),
    ({"messages": [{"role": "user", "content": 3}]}, "messages[0].content"),
    ({"messages": [{"role": "wizard", "content": "hi"}]}, "messages[0].role"),
    ({"messages": [{"role": "user"}]}, "messages[0].content"),
    ({"messages": [{"role": "user", "content": None}]}, "messages[0].content"),
    ({"messages": [{"role": "user", "content": [{"text": "hi"}]}]}, "messages[0].content[0].type"),
    ({"messages": [{"role": "user", "content": "half \ud800 a pair"}]}, "messages[0].content"),
    (
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
        "messages[0].content[0]",
    ),
    ({"messages": [{"role": "user", "content": "long " * 200}]}, "messages"),
    ({"messages": HI, "max_tokens": 510}, "messages"),
    ({"messages": HI, "max_tokens": 0}, "max_tokens"),
    ({"messages": HI, "max_completion_tokens": -1}, "max_completion_tokens"),
    ({"messages": HI, "max_completion_tokens": 3, "max_tokens": 4}, "max_completion_tokens"),
    ({"messages": HI, "temperature": -1}, "temperature"),
    ({"messages": HI, "temperature": "0.5"}, "temperature"),
    ({"messages": HI, "temperature": float("nan")}, "temperature"),
    ({"messages": HI, "top_p": 0}, "top_p"),
    ({"messages": HI, "top_k": 1.5}, "top_k"),
    ({"messages": HI, "n": 0}, "n"),
    ({"messages": HI, "n": 129}, "n"),
    ({"messages": HI, "n": True}, "n"),
    ({"messages": HI, "presence_penalty": 3}, "presence_penalty"),
    ({"messages": HI, "seed": 2**70}, "seed"),
    ({"messages": HI, "stop": ""}, "stop"),
    ({"messages": HI, "stop": ["a", 1]}, "stop[1]"),
    ({"messages": HI, "stop": ["a"] * 10_000}, "stop"),
    ({"messages": HI, "stop_token_ids": [9999]}, "stop_token_ids"),
    ({"messages": HI, "logit_bias": {"9999": 1}}, "logit_bias"),
    ({"messages": HI, "logit_bias": {"x": 1}}, "logit_bias"),
    ({"messages": HI, "logit_bias": {"1": 1e9}}, "logit_bias"),
    ({"messages": HI, "logit_bias": [1]}, "logit_bias"),
    ({"messages": HI, "logprobs": 3}, "logprobs"),
    ({"messages": HI, "top_logprobs": 3}, "top_logprobs"),
    ({"messages": HI, "logprobs": True, "top_logprobs": 21}, "top_logprobs"),
    ({"messages": HI, "stream": "yes"}, "stream"),
    ({"messages": HI, "stream_options": {"include_usage": True}}, "stream_options"),
    ({"messages": HI, "stream": True, "stream_options": {"include_usage": 1}}, "stream_options.include_usage"),
    (
        {"messages": HI, "stream": True, "stream_options": {"continuous_usage_stats": True}},
        "stream_options.continuous_usage_stats",
    ),
    (
        {"messages": HI, "continue_final_message": True, "add_generation_prompt": True},
        "continue_final_message",
    ),
    ({"messages": HI, "model": 3}, "model"),
]
COMPLETION_CASES = [
    ({}, "prompt"),
    ({"prompt": ""}, "prompt"),
    ({"prompt": []}, "prompt"),
    ({"prompt": None}, "prompt"),
    ({"prompt": {"a": 1}}, "prompt"),
    ({"prompt": ["a", ""]}, "prompt[1]"),
    ({"prompt": ["a", 3]}, "prompt[1]"),
    ({"prompt": [1, "a"]}, "prompt"),
    ({"prompt": [1, True]}, "prompt"),
    ({"prompt": [-1]}, "prompt"),
    ({"prompt": [[1], [258]]}, "prompt[1]"),
    ({"prompt": [2**80]}, "prompt"),
    ({"prompt": [0.5]}, "prompt[0]"),
    ({"prompt": "\udfff"}, "prompt"),
    ({"prompt": "x" * 512}, "prompt"),
    ({"prompt": "hi", "max_tokens": 511}, "prompt"),
    ({"prompt": ["a"] * 2049}, "prompt"),
    ({"prompt": ["a"] * 100, "n": 100}, "n"),
    ({"prompt": "hi", "max_tokens": 0}, "max_tokens"),
    ({"prompt": "hi", "logprobs": 21}, "logprobs"),
    ({"prompt": "hi", "logprobs": True}, "logprobs"),
    ({"prompt": "hi", "suffix": "end"}, "suffix"),
    ({"prompt": "hi", "best_of": 4}, "best_of"),
]


@pytest.fixture(autouse=True)
def still_answers(url):
    yield
    assert httpx.get(f"{url}/health").status_code == 200
    response = httpx.post(url + CHAT, json={"messages": HI, "temperature": 0})
    assert response.json()["choices"][0]["message"]["content"] == "hi"


def refused(response, status, param):
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["message"] and error["type"] == "invalid_request_error"
    assert error["param"] == param, error
    return error


@pytest.mark.parametrize(
    ("path", "body", "param"), [(CHAT, *case) for case in CHAT_CASES] + [(COMPLETIONS, *c) for c in COMPLETION_CASES]
)
def test_a_bad_field_is_a_400_that_names_it(url, path, body, param):
    headers = {"content-type": "application/json"}
    refused(httpx.post(url + path, content=json.dumps(body), headers=headers), 400, param)


def test_a_prompt_too_long_names_both_lengths(url):
    error = refused(httpx.post(url + COMPLETIONS, json={"prompt": "x" * 600, "max_tokens": 7}), 400, "prompt")
    assert error["code"] == "context_length_exceeded"
    assert "512" in error["message"] and "600" in error["message"] and "7" in error["message"]


FIELDS = """
messages model frequency_penalty presence_penalty logit_bias logprobs top_logprobs n seed stop stream stream_options
temperature top_p max_completion_tokens max_tokens user response_format tools tool_choice parallel_tool_calls
reasoning_effort use_beam_search top_k min_p repetition_penalty length_penalty stop_token_ids
include_stop_str_in_output ignore_eos min_tokens skip_special_tokens spaces_between_special_tokens
truncate_prompt_tokens truncation_side prompt_logprobs logprob_token_ids allowed_token_ids bad_words
thinking_token_budget repetition_detection watermarking structured_outputs echo add_generation_prompt
continue_final_message add_special_tokens documents chat_template chat_template_kwargs media_io_kwargs
mm_processor_kwargs priority request_id session_id cache_salt include_reasoning return_token_ids
return_tokens_as_token_ids return_token_offsets return_prompt_text stream_interval kv_transfer_params
ec_transfer_params vllm_xargs mm_payload return_weight_versions routed_experts_prompt_start store metadata
service_tier modalities audio prediction web_search_options verbosity functions function_call safety_identifier
prompt_cache_key best_of suffix prompt prompt_embeds
"""


def test_every_field_that_the_field_knows_is_honoured_or_refused_by_name():
    """OpenAI's and vLLM's fields: none of them may fall among those that are merely named in a header."""
    known = {*ChatBody.model_fields, *CompletionBody.model_fields, *UNSUPPORTED}
    assert set(FIELDS.split()) - known == set()


def asking(name):
    """A value of the field that asks for something."""
    return {"tool_choice": "required", "function_call": {"name": "f"}, "length_penalty": 2}.get(
        name, not UNSUPPORTED[name][0] if UNSUPPORTED[name] and isinstance(UNSUPPORTED[name][0], bool) else [{"a": 1}]
    )


@pytest.mark.parametrize("name", sorted(set(UNSUPPORTED) - {"continuous_usage_stats"}))
def test_a_known_field_that_is_not_supported_is_refused_by_name(url, name):
    body = {"messages": HI, "temperature": 0, name: asking(name)}
    assert refused(httpx.post(url + CHAT, json=body), 400, name)["code"] == "unsupported_parameter"
    for idle in (None, *UNSUPPORTED[name]):
        response = httpx.post(url + CHAT, json={**body, name: idle})
        assert response.status_code == 200, (name, idle, response.text)


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[]", b'"text"', b"null", b"\xff\xfe", b"[" * 100_000, b'{"messages": ' + b"[" * 100_000],
)
def test_a_body_that_is_no_object_is_a_400(url, content):
    response = httpx.post(url + CHAT, content=content, headers={"content-type": "application/json"})
    refused(response, 400, response.json()["error"]["param"])


def test_a_form_is_told_to_be_json(url):
    error = refused(httpx.post(url + CHAT, data={"messages": "hi"}), 400, None)
    assert "application/json" in error["message"]


def test_a_hostile_list_makes_few_errors(url):
    body = {"messages": [0] * 500_000}
    response = httpx.post(url + CHAT, json=body, timeout=20)
    assert len(response.text) < 1000
    refused(response, 400, "messages[0]")


def test_an_unknown_model_is_a_404_with_the_nearest_name(client):
    for call in (client.chat.completions.create, client.completions.create):
        more = {"messages": HI} if call == client.chat.completions.create else {"prompt": "hi"}
        with pytest.raises(openai.NotFoundError) as caught:
            call(model="ecko", **more)
        assert caught.value.code == "model_not_found" and caught.value.param == "model"
        assert "Did you mean echo?" in caught.value.message


def test_unknown_paths_and_methods_answer_in_the_same_shape(url):
    refused(httpx.get(f"{url}/v2/models"), 404, None)
    refused(httpx.get(url + CHAT), 405, None)
    forgotten = httpx.post(f"{url}/chat/completions", json={}).json()["error"]  # the base URL's /v1
    assert "Did you mean /v1/chat/completions" in forgotten["message"]
    assert httpx.head(f"{url}/health").status_code == 200


def test_a_large_body_is_a_413_with_or_without_a_length(url):
    big = b"{" + b" " * (17 << 20)
    refused(httpx.post(url + CHAT, content=big, headers={"content-type": "application/json"}), 413, None)

    def pieces():
        for _ in range(17):
            yield b" " * (1 << 20)

    try:
        response = httpx.post(url + CHAT, content=pieces(), headers={"content-type": "application/json"})
    except (httpx.WriteError, httpx.ReadError):
        return  # the server closed while the client was still sending
    refused(response, 413, None)


def test_long_texts_are_tokenised_beside_the_loop(url):
    error = refused(httpx.post(url + COMPLETIONS, json={"prompt": "x" * 1_000_000}), 400, "prompt")
    assert "1000000" in error["message"]
