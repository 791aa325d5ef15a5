"""/tokenize and /detokenize agree with what the generating endpoints do."""

from __future__ import annotations

import subprocess
import sys

import httpx
import pytest

HI = [{"role": "user", "content": "hé"}]


def post(url, path, body):
    return httpx.post(url + path, json=body)


def test_a_prompt_there_and_back(url):
    answer = post(url, "/tokenize", {"prompt": "hé", "return_token_strs": True}).json()
    assert answer == {
        "count": 3,
        "max_model_len": 512,
        "tokens": [104, 195, 169],
        "token_strs": ["h", "bytes:\\xc3", "bytes:\\xa9"],
    }
    assert post(url, "/detokenize", {"tokens": answer["tokens"]}).json() == {"prompt": "hé"}
    assert post(url, "/tokenize", {"prompt": ""}).json()["count"] == 0


@pytest.mark.parametrize("more", [{}, {"continue_final_message": True}])
def test_messages_count_what_a_chat_would(url, client, more):
    answer = post(url, "/tokenize", {"model": "parrot", "messages": HI, **more}).json()
    chat = client.chat.completions.create(model="echo", messages=HI, max_tokens=1, extra_body=more)
    assert answer["count"] == len(answer["tokens"]) == chat.usage.prompt_tokens


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/tokenize", {}, "prompt"),
        ("/tokenize", {"prompt": "a", "messages": HI}, "prompt"),
        ("/tokenize", {"prompt": "a", "add_generation_prompt": True}, "add_generation_prompt"),
        ("/tokenize", {"messages": HI, "chat_template": "{{ 1 }}"}, "chat_template"),
        ("/tokenize", {"messages": []}, "messages"),
        ("/tokenize", {"prompt": "\ud800"}, "prompt"),
        ("/tokenize", {"prompt": 3}, "prompt"),
        ("/detokenize", {}, "tokens"),
        ("/detokenize", {"tokens": [258]}, "tokens"),
        ("/detokenize", {"tokens": [-1]}, "tokens"),
        ("/detokenize", {"tokens": ["a"]}, "tokens[0]"),
    ],
)
def test_refusals_name_the_field(url, path, body, param):
    import json

    answer = httpx.post(url + path, content=json.dumps(body), headers={"content-type": "application/json"})
    assert answer.status_code == 400 and answer.json()["error"]["param"] == param


def test_an_unknown_model_is_a_404(url):
    assert post(url, "/tokenize", {"model": "ecko", "prompt": "a"}).status_code == 404


def test_texts_longer_than_prompts_are_read_in_one_thread_that_gives_way_to_all_others():
    """And give the ids that they give anywhere else. In a process of its own: priorities are not taken back."""
    code = """
import asyncio, json, os, sys, threading
from martlet import hub
from martlet.server import prompts
encode = hub.load_tokenizer(hub.resolve(hub.DEFAULT_MODEL)).encode
text = "Seven swifts, 7 martlets; " * 40_000
priority = lambda *_: (threading.get_native_id(), os.getpriority(os.PRIO_PROCESS, threading.get_native_id()))

async def main():
    nice = [await prompts.off_loop(size, priority) for size in (1, 10_000, len(text), len(text))]
    ids, others = await asyncio.gather(prompts.off_loop(len(text), encode, text), asyncio.sleep(0, priority()))
    return nice, ids == encode(text), others

(short, long, first, second), same, others = asyncio.run(main())
assert first == second and len({short[0], long[0], first[0]}) == 3
usual = os.getpriority(os.PRIO_PROCESS, 0)
print({short[1], long[1], others[1]} == {usual}, same, first[1] == (19 if sys.platform == "linux" else usual))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout.split() == ["True"] * 3, done.stderr
