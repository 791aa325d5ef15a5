"""Answers of the default model under grammars, over HTTP: always valid, whatever the temperature."""

from __future__ import annotations

import json
import re

import httpx
import jsonschema
import openai
import pytest
from live_server import live

from martlet import backends, chat
from martlet.engine import constraints
from martlet.runners.base import LoadOptions
from martlet.server import create_app

MODEL = "smollm2-135m-instruct"
PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
        "colours": {"type": "array", "items": {"enum": ["red", "grün", "青"]}, "minItems": 1, "maxItems": 3},
        "home": {
            "type": "object",
            "properties": {"zip": {"type": "string", "pattern": "^[0-9]{5}$"}, "far": {"type": "boolean"}},
            "required": ["zip"],
            "additionalProperties": False,
        },
    },
    "required": ["name", "age", "colours", "home"],
    "additionalProperties": False,
}
SCHEMAS = {
    "person": PERSON,
    "either": {"anyOf": [{"type": "integer", "minimum": 7, "maximum": 31}, {"const": None}, {"enum": ["é", "🦆"]}]},
    "recursive": {
        "$ref": "#/$defs/node",
        "$defs": {
            "node": {
                "type": "object",
                "properties": {
                    "v": {"type": "boolean"},
                    "next": {"anyOf": [{"$ref": "#/$defs/node"}, {"type": "null"}]},
                },
                "required": ["v", "next"],
                "additionalProperties": False,
            }
        },
    },
}  # fmt: skip


@pytest.fixture(scope="module")
def url():
    load = LoadOptions(device="cpu", dtype="float32", max_model_len=512, max_num_seqs=8, kv_cache_tokens=4096)
    backend = backends.load(MODEL, load=load)
    with live(create_app(backend, chat.template_for(backend.card, backend.tokenizer))) as address:
        yield address
    backend.close()


@pytest.fixture(scope="module")
def client(url):
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=120) as client:
        yield client


def ask(client, text="Describe somebody.", **more):
    messages = [{"role": "user", "content": text}]
    return client.chat.completions.create(**{"model": MODEL, "messages": messages, "max_tokens": 130, **more}).choices


def form(schema):
    return {"type": "json_schema", "json_schema": {"name": "form", "strict": True, "schema": schema}}


@pytest.mark.parametrize("name", SCHEMAS)
def test_answers_are_valid(client, name):
    for choice in ask(client, response_format=form(SCHEMAS[name]), n=2, temperature=1, seed=5):
        if choice.finish_reason == "stop":
            jsonschema.validate(json.loads(choice.message.content), SCHEMAS[name])
        else:
            assert name == "recursive" and choice.finish_reason == "length"  # of a chain that goes on and on


def test_json_regex_choice_and_grammar(client):
    (choice,) = ask(client, response_format={"type": "json_object"}, temperature=0)
    assert choice.finish_reason == "stop" and isinstance(json.loads(choice.message.content), dict)
    date = r"\d{4}-(0[1-9]|1[0-2])-[0-3]\d"
    (choice,) = ask(client, "When?", extra_body={"guided_regex": date})
    assert re.fullmatch(date, choice.message.content)
    (choice,) = ask(client, "Which?", extra_body={"structured_outputs": {"choice": ["纸", "Schere", "stone"]}})
    assert choice.message.content in ("纸", "Schere", "stone") and choice.finish_reason == "stop"
    gbnf = {"guided_grammar": 'root ::= [0-9] [0-9]? " apples"'}
    done = client.completions.create(model=MODEL, prompt="1 + 2 =", max_tokens=20, extra_body=gbnf)
    assert re.fullmatch(r"[0-9]{1,2} apples", done.choices[0].text)


def test_neighbours_and_streams_are_what_they_are_alone(client):
    alone = ask(client, "Count: 1, 2, 3", temperature=0, max_tokens=24)[0].message.content
    person = ask(client, response_format=form(PERSON), temperature=0)[0].message.content
    stream = client.chat.completions.create(
        model=MODEL,
        messages=[{"role": "user", "content": "Describe somebody."}],
        response_format=form(PERSON),
        temperature=0,
        max_tokens=130,
        stream=True,
    )
    pieces = [next(stream)]
    together = ask(client, "Count: 1, 2, 3", temperature=0, max_tokens=24)[0].message.content
    pieces += stream
    assert together == alone
    assert "".join(choice.delta.content or "" for piece in pieces for choice in piece.choices) == person


def test_other_settings_hold(client):
    (choice,) = ask(client, extra_body={"guided_regex": "(ab)*", "min_tokens": 4}, max_tokens=9, temperature=0)
    assert len(choice.message.content) >= 4 and set(choice.message.content) <= {"a", "b"}
    (choice,) = ask(client, extra_body={"guided_json": PERSON}, stop=['"age"'], temperature=0)
    assert choice.message.content.startswith("{") and '"age"' not in choice.message.content
    with pytest.raises(openai.BadRequestError, match="leave no token"):
        ask(client, extra_body={"guided_choice": ["7"], "allowed_token_ids": [100, 101]})


@pytest.mark.parametrize(
    ("fields", "param", "said"),
    [
        ({"response_format": form({"type": "array", "uniqueItems": True})}, "response_format", "uniqueItems"),
        ({"response_format": {"type": "xml"}}, "response_format.type", "json_object"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema", "schema"),
        ({"guided_regex": "(a"}, "guided_regex", "unclosed group"),
        ({"guided_grammar": "start: a\n\nb: %"}, "guided_grammar", "line 3: lexer error"),
        ({"guided_regex": "a", "guided_choice": ["b"]}, "guided_choice", "exclude"),
        ({"structured_outputs": {"structural_tag": "{}"}}, "structured_outputs.structural_tag", "not supported"),
        ({"guided_json": {}, "ignore_eos": True}, "ignore_eos", "grammar"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_what_cannot_be_done_is_refused_by_name(client, fields, param, said):
    with pytest.raises(openai.BadRequestError) as caught:
        ask(client, extra_body=fields)
    assert caught.value.param == param and said in str(caught.value)
    assert "%llguidance" not in str(caught.value)


# Forty rules, each of which may begin with any of the others: a mask of it takes minutes.
TANGLE = "start: a0\n" + "\n".join(
    f"a{i}: " + " | ".join(f"a{j} a{k}" for j in range(1, 40) for k in (1, 7, 13)) + ' | "c"' for i in range(40)
)
DOUBLING = {f"d{i}": {"anyOf": [{"$ref": f"#/$defs/d{i + 1}"}] * 2} for i in range(40)} | {"d40": {"type": "null"}}


def alive(url):
    return httpx.get(f"{url}/health").json() == {"status": "ok"}


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"guided_grammar": TANGLE}, "guided_grammar"),
        ({"response_format": form({"properties": {f"p{i}": {} for i in range(10_000)}})}, "response_format"),
    ],
    ids=["a tangle of rules", "ten thousand properties"],
)
def test_a_grammar_that_takes_too_long_is_a_400(client, url, monkeypatch, fields, param):
    monkeypatch.setattr(constraints, "CHECK_SECONDS", 0.5)
    with pytest.raises(openai.BadRequestError, match=r"more than 0\.5 s") as caught:
        ask(client, extra_body=fields)
    assert caught.value.param == param and alive(url)
    monkeypatch.undo()
    assert ask(client, extra_body={"guided_choice": ["yes"]})[0].message.content == "yes"


@pytest.mark.parametrize(
    ("fields", "begins"),
    [
        ({"guided_regex": "(a+)+$"}, "a+"),
        ({"guided_regex": "(a|a)*" * 100 + "b"}, "a*b?"),
        ({"guided_regex": "((a{1,1000}){1,1000}){1,1000}"}, "a+"),
        ({"response_format": form({"type": "string", "pattern": "^(([a-z])+.)+[A-Z]([a-z])+$"})}, '"[a-z].*'),
        ({"response_format": form({"type": "string", "pattern": "^((a{1,500}){1,500}b){1,500}$"})}, '"a[ab]*"?'),
        ({"response_format": form({"$defs": DOUBLING, "$ref": "#/$defs/d0"})}, "null"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_what_makes_other_engines_backtrack_for_ever_is_just_followed(client, url, monkeypatch, fields, begins):
    monkeypatch.setattr(constraints, "CHECK_SECONDS", 60.0)  # a slow machine may take its time, not for ever
    (choice,) = ask(client, extra_body=fields, max_tokens=6, temperature=0)
    assert re.fullmatch(begins, choice.message.content, re.DOTALL) and alive(url)


@pytest.mark.parametrize("target", ["http://127.0.0.1:9/schema", "file:///etc/passwd", "nowhere.json"])
def test_a_schema_is_never_fetched(client, target):
    with pytest.raises(openai.BadRequestError, match=re.escape(target.removeprefix("file://"))) as caught:
        ask(client, extra_body={"response_format": form({"$ref": target})})
    assert caught.value.param == "response_format" and "root:" not in str(caught.value)
