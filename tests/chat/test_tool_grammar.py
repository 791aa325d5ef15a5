"""Grammars of every tool format, held against llguidance: what they let through is what the parser reads."""

from __future__ import annotations

import json
import random

import numpy as np
import pytest
from llguidance import LLMatcher, LLTokenizer

from martlet import hub
from martlet.chat import Parser, Reply, reasoning_format
from martlet.chat.reasoning import REASONING
from martlet.chat.tool_formats import FORMATS
from martlet.chat.tool_grammar import tool_grammar
from martlet.chat.tool_prompt import write_calls
from martlet.hub.tokenizer import load_tokenizer

PLACE = {
    "type": "object",
    "properties": {
        "city": {"enum": ["Zürich", 'a "b"\n', "::="]},
        "days": {"type": "integer", "minimum": 1, "maximum": 9},
        "exact": {"$ref": "#/$defs/flag"},
    },
    "required": ["days"],
    "additionalProperties": False,
    "$defs": {"flag": {"type": ["boolean", "null"]}},
}
DASHED = {
    "type": "object",
    "properties": {"in": {"type": "array", "items": {"enum": [1, 2.5]}, "maxItems": 2}, "a-b": {"const": {"x": None}}},
    "required": ["a-b", "in"],
    "additionalProperties": False,
}
NOTHING = {"type": "object", "properties": {}, "additionalProperties": False}
TOOLS = [("weather", PLACE), ("odd-name", DASHED), ("now", NOTHING)]
CALLS = [("weather", {"city": 'a "b"\n', "days": 3, "exact": None}), ("odd-name", {"in": [1, 2.5], "a-b": {"x": None}})]


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(hub.resolve("smollm2-135m-instruct"))


@pytest.fixture(scope="module")
def guide(tokenizer):
    return LLTokenizer(tokenizer._core.to_str(), n_vocab=tokenizer.vocab_size, eos_token=list(tokenizer.eos_ids))


def written(calls, known):
    """Values are constrained as JSON, in Python's calls too."""
    return write_calls(calls, known).replace("None", "null")


def takes(guide, grammar, text):
    """Whether `text` is an answer."""
    matcher = LLMatcher(guide, grammar)
    assert not matcher.is_error(), matcher.get_error()
    tokens = guide.tokenize_str(text)
    return matcher.try_consume_tokens(tokens) == len(tokens) and matcher.is_accepting()


def read(name, text, **options):
    reply, parser = Reply(), Parser(FORMATS[name], [tool for tool, _ in TOOLS], **options)
    reply.add(parser.feed(text) + parser.finish())
    return [(call.name, json.loads(call.arguments)) for call in reply.calls], reply


@pytest.mark.parametrize(
    ("name", "thoughts"),
    [(name, how) for name in FORMATS for how in ("", "marked", "inside") if name != "chatglm3" or not how],
)
def test_answers_that_are_allowed(name, thoughts, guide):
    known, reasoning = FORMATS[name], reasoning_format("think") if thoughts else None
    options = {"reasoning": reasoning, "inside_reasoning": thoughts == "inside"}
    before = {"": "", "marked": "<think>\n<tool_call> Action: [weather(\n</think>\n\n", "inside": "hm</think>\n"}[
        thoughts
    ]
    must = tool_grammar(known, TOOLS, required=True, **options)
    may = tool_grammar(known, TOOLS, required=False, **options)
    one = tool_grammar(known, TOOLS, required=True, parallel=False, **options)
    text, single = written(CALLS, known), written(CALLS[:1], known)
    for grammar in (must, may):
        assert takes(guide, grammar, before + text) and takes(guide, grammar, before + single)
    assert takes(guide, one, before + single) and not takes(guide, one, before + text)
    assert not takes(guide, must, before + "Hello.") and not takes(guide, must, before)
    blank = "\n" if name == "chatglm3" else ""  # an answer of words begins with a line of its own
    for words in ("Hello [1] {x} weather( <tool", "", '{"a": 1}', "[1]", " \n" if blank else "\n"):
        assert takes(guide, may, before + blank + words)
    wrong = [single.replace("weather", "other"), single.replace("3", "0"), single.replace("days", "dais")]
    for broken in wrong:
        assert broken != single
        assert not takes(guide, must, before + broken)
        if not (known.at == "start" and "other" in broken and known.call == "python"):  # which is text
            assert not takes(guide, may, before + broken)
    if known.at in ("anywhere", "line") and name != "chatglm3":
        assert takes(guide, may, f"{before}Let me see.\n{text}\nDone.")
        assert not takes(guide, may, f"{before}Let me see.\n{known.begin} me")
    calls, reply = read(name, before + text, **options)
    assert calls == CALLS and reply.content == ""


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("required", [True, False])
def test_whatever_is_let_through_is_read_and_valid(name, required, guide):
    """Random walks through the masks, which begin with the mark of a call where free text is allowed."""
    from jsonschema import validate

    known = FORMATS[name]
    grammar = tool_grammar(known, TOOLS, required=required, parallel=False)
    begin = (
        ""
        if required
        else {"llama3": '{"name": "', "pythonic": "[weather(", "chatglm3": "weather"}.get(name, known.begin)
    )
    draw = random.Random(5)
    for _ in range(4):
        matcher, tokens = LLMatcher(guide, grammar), guide.tokenize_str(begin)
        matcher.consume_tokens(tokens)
        for _ in range(400):
            allowed = np.frombuffer(matcher.compute_logit_bias(), np.uint8).nonzero()[0]
            token = draw.choice(allowed.tolist())
            if token in guide.eos_tokens:
                break
            matcher.consume_token(token)
            tokens.append(token)
            parsed = guide.decode_bytes(tokens).decode("utf-8", "replace") if matcher.is_accepting() else ""
            if parsed:
                break
        calls, reply = read(name, parsed)
        assert len(calls) == 1 and (not reply.content or not required), parsed
        validate(calls[0][1], dict(TOOLS)[calls[0][0]])


def test_marks_that_are_control_tokens_cannot_be_spelt(tokenizer, guide):
    token = tokenizer.token_id("<|im_start|>")
    marked = lambda mark: token if mark == "[TOOL_CALLS]" else None  # noqa: E731
    text = '[{"name": "now", "arguments": {}}]'
    for required in (True, False):
        grammar = tool_grammar(FORMATS["mistral"], TOOLS, required=required, control_id=marked)
        matcher = LLMatcher(guide, grammar)
        ids = [token, *guide.tokenize_str(" " + text)]
        assert matcher.try_consume_tokens(ids) == len(ids) and matcher.is_accepting()
        assert takes(guide, grammar, "[TOOL_CALLS] " + text) != required  # plain text is no call


def test_thoughts_between_control_tokens(tokenizer, guide):
    ids = {"<think>": tokenizer.token_id("<|im_start|>"), "</think>": tokenizer.token_id("<|endoftext|>")}
    options = {"reasoning": REASONING["think"], "control_id": ids.get, "required": True}
    call = guide.tokenize_str(written(CALLS, FORMATS["hermes"]))
    thoughts = guide.tokenize_str("hm </think>")
    for inside in (True, False):
        matcher = LLMatcher(guide, tool_grammar(FORMATS["hermes"], TOOLS, inside_reasoning=inside, **options))
        answer = [*([] if inside else [ids["<think>"]]), *thoughts, ids["</think>"], *call]
        assert matcher.try_consume_tokens(answer) == len(answer) and matcher.is_accepting()


def test_a_turn_may_end_with_the_templates_own_token(tokenizer, guide):
    end = tokenizer.token_id("<|im_start|>")
    for name in FORMATS:
        matcher = LLMatcher(guide, tool_grammar(FORMATS[name], TOOLS, required=False, ends=[end]))
        answer = [*guide.tokenize_str(written(CALLS, FORMATS[name])), end]
        assert matcher.try_consume_tokens(answer) == len(answer) and matcher.is_accepting()


def test_schemas_are_strict_only_where_a_call_is_required(guide):
    odd = [("f", {"type": "object", "properties": {"a": {"type": "string", "format": "no such format"}}})]
    for name in FORMATS:
        assert "no such format" in LLMatcher(guide, tool_grammar(FORMATS[name], odd, required=True)).get_error()
        assert takes(
            guide, tool_grammar(FORMATS[name], odd, required=False), write_calls([("f", {"a": "b"})], FORMATS[name])
        )


@pytest.mark.parametrize("needed", [[], ["b"], ["a", "c"]])
def test_keywords_come_in_order_and_may_be_left_out(needed, guide):
    schema = {"type": "object", "properties": {key: {"type": "integer"} for key in "abc"}, "required": needed}
    grammar = tool_grammar(FORMATS["pythonic"], [("f", schema)], required=True, parallel=False)
    for number in range(8):
        keys = [key for bit, key in enumerate("abc") if number >> bit & 1]
        text = write_calls([("f", dict.fromkeys(keys, 1))], FORMATS["pythonic"])
        assert takes(guide, grammar, text) == set(keys).issuperset(needed)
