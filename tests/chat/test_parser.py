"""Answers in every format, whole and broken, cut anywhere."""

from __future__ import annotations

import itertools
import json

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from martlet.chat import Call, CallArguments, CallStart, Content, Parser, Reply, reasoning_format, tool_format
from martlet.chat.parser import new_call_id
from martlet.chat.tool_formats import FORMATS
from martlet.errors import UsageError

TOOLS = ("f", "get_weather", "a-b")


def parser(name=None, tools=TOOLS, **options):
    count = itertools.count()
    known = tool_format(name) if name else None
    return Parser(known, tools, call_id=lambda: f"call{next(count)}", **options)


def read(pieces, name=None, tools=TOOLS, **options):
    reply, reading = Reply(), parser(name, tools, **options)
    for piece in pieces:
        reply.add(reading.feed(piece))
    reply.add(reading.finish())
    return reply


def calls(reply):
    return [(call.name, json.loads(call.arguments)) for call in reply.calls]


WHOLE = {
    "hermes": (
        'Let me look.\n<tool_call>\n{"name": "f", "arguments": {"q": ["<tool_call>", {"x": null}]}}\n</tool_call>\n'
        '<tool_call>\n{"arguments": {"city": "Zürich \\"\\u00e9"}, "name": "get_weather"}\n</tool_call>\n'
    ),
    "llama3": (
        ' <|python_tag|>{"name": "f", "parameters": {"q": ["<tool_call>", {"x": null}]}}; '
        '{"type": "function", "name": "get_weather", "parameters": {"city": "Zürich \\"é"}}'
    ),
    "mistral": (
        'Let me look.[TOOL_CALLS] [{"name": "f", "arguments": {"q": ["<tool_call>", {"x": null}]}}, '
        '{"name": "get_weather", "arguments": {"city": "Zürich \\"é"}, "id": "abcdefghi"}]'
    ),
    "pythonic": """[f(q=["<tool_call>", {'x': None}]), get_weather(city='Zürich "é')]""",
    "react": (
        'Let me look.\nAction: f\nAction Input: {"q": ["<tool_call>", {"x": null}]}\n'
        'Action: get_weather\nAction Input:{"city": "Zürich \\"é"}\n'
    ),
    "chatglm3": (
        "\n Let me look.<|assistant|>f\n ```python\ntool_call(q=['<tool_call>', {'x': None}])\n```"
        '<|assistant|>get_weather\n```python\ntool_call(city="Zürich \\"é")\n```'
    ),
}


@pytest.mark.parametrize("name", FORMATS)
def test_calls_of_every_format(name):
    reply = read([WHOLE[name]], name)
    assert calls(reply) == [("f", {"q": ["<tool_call>", {"x": None}]}), ("get_weather", {"city": 'Zürich "é'})]
    assert reply.content == ("" if name in ("llama3", "pythonic") else "Let me look.")
    assert [call.id for call in reply.calls] == ["call0", "call1"]


BROKEN = {
    "hermes": [
        '<tool_call>{"name": "unknown", "arguments": {}}</tool_call>',
        "<tool_call>nothing</tool_call>",
        '<tool_call>{"name": "f", "arguments": [1]}</tool_call>',
        '<tool_call>{"arguments": {}}</tool_call>',
        '<tool_call>{"name": "f", "name": "f", "arguments": {}}</tool_call>',
        '<tool_call>{"name": "f"',
        '<tool_call>{"name": "f", "arguments": "{]"}</tool_call>',
        '<tool_call>{"name": "f", "arguments": "[1]"}</tool_call>',
        '<tool_call>{"name": "f", "arguments": "{\\"a\\": \\"\\\\ud800\\ud800\\"}"}</tool_call>',
        '<tool_call>{"name": "f" "arguments": {}}</tool_call>',
        "a < b and <tool_cal",
    ],
    "llama3": ['{"name": "Ann", "age": 3}', '{"a": 1} {"name": "f", "parameters": {}}', "<|python_tag|>print(1)", "{"],
    "mistral": ["[TOOL_CALLS]", '[TOOL_CALLS]{"name": "f", "arguments": {}}', "[TOOL_CALLS] []", "[TOOL_CA"],
    "pythonic": [
        "[f(a=__import__('os').system('true'))]",
        "[f(1)]",
        "[f(a=b)]",
        "[f(a=1e999)]",
        "[f(a={1, 2})]",
        "[f(a=b'x')]",
        "[f(a=1, a=2)]",
        "[f(a=(1]",
        "[f(a='x)]",
        "[f(**[1])]",
        "[f" + "(" * 300,
        "[f(a=" + "-" * 5000 + "1)]",
        "[1, 2]",
        "[unknown()]",
        "[f(a='\\ud800')]",
    ],
    "react": [
        "Action: f\nAction Input: word",
        "Action: unknown\nAction Input: {}",
        "One Action: f\nAction Input: {}",
        "Action: f",
    ],
    "chatglm3": [
        "f\n```python\n__import__('os').system('true')\n```",
        "f\n```python\ntool_call(1)\n```",
        "f\ntool_call(a=1)",
        "f\n```python\ntool_call(a=1)",
        "f\n```python\ntool_call(a=1)\n```x",
        "f\n```python\nother(a=1)\n```",
        "f",
        "interpreter\n```python\nprint(1)\n```",
    ],
}


@pytest.mark.parametrize(("name", "text"), [(name, text) for name, texts in BROKEN.items() for text in texts])
def test_what_is_no_call_is_content_to_the_letter(name, text):
    assert read([text], name) == Reply(content=text)


def test_arguments_that_break_off_or_break_the_rules_stay_arguments():
    (call,) = read(['<tool_call>{"name": "f", "arguments": {"a": [1, "b'], "hermes").calls
    assert call.arguments == '{"a": [1, "b'
    reply = read(['<tool_call>{"name": "f", "arguments": {"a": 1,, "b"}}</tool_call>bye'], "hermes")
    assert (reply.calls[0].arguments, reply.content) == ('{"a": 1,, "b"}}', "bye")


@pytest.mark.parametrize(
    ("text", "content", "arguments"),
    [
        ('<tool_call>{"name": "f", "arguments": {"a": 1}</tool_call>', "", '{"a": 1}'),  # one brace too few
        ('<tool_call>{"name": "f", "arguments": {"a": 1}', "", '{"a": 1}'),
        ('<tool_call>{"name": "f", "arguments": {}}} ok', "} ok", "{}"),
        ('<tool_call>{"name": "f", "arguments": {}, "id": x}</tool_call>', ', "id": x}</tool_call>', "{}"),
        ('<tool_call>{"name": "f"}</tool_call>', "", "{}"),
        ('<tool_call>{"name": "f", "arguments": "{\\"a\\": 1}"}</tool_call>', "", '{"a": 1}'),
        ('one <tool_call>{"name": "f"}</tool_call>\n\n two', "one two", "{}"),
        ('one<tool_call>{"name": "f"}</tool_call>two', "one\ntwo", "{}"),
    ],
)
def test_whole_calls_among_odd_text(text, content, arguments):
    reply = read([text], "hermes")
    assert (reply.content, [call.arguments for call in reply.calls]) == (content, [arguments])


def test_a_call_too_many_is_content():
    text = '<tool_call>{"name": "f"}</tool_call>'
    assert read([text * 2], "hermes", max_calls=1) == Reply(text, calls=[Call("call0", "f", "{}")])
    assert read([text], "hermes", max_calls=0) == read([text], "hermes", tools=()) == Reply(text)


def test_python_calls_may_spread_a_dict_for_names_that_are_no_identifiers():
    reply = read(["""[a-b(x=true, **{"no name": 'y', "s": "\\/ \\ud83e\\udd86"})]"""], "pythonic")
    assert calls(reply) == [("a-b", {"x": True, "no name": "y", "s": "\\/ 🦆"})]
    assert calls(read([r"""[f(s="\/ \ud83e\udd86")]"""], "pythonic")) == [("f", {"s": "/ 🦆"})]


@pytest.mark.parametrize(
    ("text", "inside", "reply"),
    [
        ("<think>\nhm\n\nhm\n</think>\n\nhi ", False, Reply("hi ", "hm\n\nhm")),
        ("\n<think></think>hi", False, Reply("hi")),
        ("hm</think>hi", True, Reply("hi", "hm")),
        ("<think>hm</think>hi", True, Reply("hi", "hm")),
        ("hm</thi", True, Reply("", "hm</thi")),
        (" <thin", False, Reply(" <thin")),
        ("hi <think>hm</think>", False, Reply("hi <think>hm</think>")),
        ('<think><tool_call>{"name": "f"}</think><tool_call>{"name": "f"}', False,
         Reply("", '<tool_call>{"name": "f"}', [Call("call0", "f", "{}")])),
    ],
)  # fmt: skip
def test_thoughts_are_split_out(text, inside, reply):
    options = {"reasoning": reasoning_format("think"), "inside_reasoning": inside}
    assert read([text], "hermes", **options) == reply
    assert read(list(text), "hermes", **options) == reply


def test_deltas_come_as_soon_as_they_can():
    reading = parser("hermes")
    assert reading.feed("It is") == [Content("It is")]
    assert reading.feed(" <tool") == []
    assert reading.feed('_call>{"name": "f", "arguments": ') == []
    assert reading.feed('{"a": ') == [CallStart(0, "call0", "f"), CallArguments(0, '{"a": ')]
    assert reading.feed('"x') == [CallArguments(0, '"x')]
    assert reading.feed('y"}}</tool_call> ') == [CallArguments(0, 'y"}')]
    assert reading.finish() == []
    plain = parser()
    assert [plain.feed(piece) for piece in ("a ", "<tool_call>", "")] == [
        [Content("a ")],
        [Content("<tool_call>")],
        [],
    ]


@pytest.mark.parametrize("name", FORMATS)
def test_every_cut_of_recorded_text_gives_the_same(name):
    for text in (WHOLE[name], *(t for t in BROKEN[name] if len(t) < 200)):
        for reasoning in (None, reasoning_format("think")):
            marked = f"<think>\n{text}</think>\n{text}" if reasoning else text
            expected = read([marked], name, reasoning=reasoning)
            assert read(list(marked), name, reasoning=reasoning) == expected
            for at in range(1, len(marked)):
                assert read([marked[:at], marked[at:]], name, reasoning=reasoning) == expected


SCRAPS = [
    *("<tool_call>", "</tool_call>", "[TOOL_CALLS]", "<|python_tag|>", "<|assistant|>", "Action:", "Action Input:"),
    *("<think>", "</think>", "```python\n", "\n```", "tool_call(", '{"name": "f", ', '"arguments": {'),
    *('"parameters": ', "f(", "a=1", "f\n", '"name": '),
    *('"f"', "[", "]", "{", "}", "(", ")", ", ", ":", ";", "\n", " ", '"', "'", "\\", "é"),
]  # fmt: skip
TEXT = st.lists(st.sampled_from([*SCRAPS, *WHOLE.values()]) | st.text(max_size=3), max_size=12).map("".join)


@pytest.mark.parametrize("name", FORMATS)
@settings(max_examples=80, deadline=None)
@given(text=TEXT, cuts=st.lists(st.integers(0, 400), max_size=8), inside=st.booleans())
@example(text='<tool_call>{"name": "f", "arguments": {"a": 12', cuts=[44, 45], inside=False)
def test_every_cut_of_made_up_text_gives_the_same(name, text, cuts, inside):
    options = {"reasoning": reasoning_format("think") if inside else None, "inside_reasoning": inside}
    at = sorted({0, len(text), *(cut for cut in cuts if cut < len(text))})
    expected = read([text], name, **options)
    assert read([text[a:b] for a, b in itertools.pairwise(at)], name, **options) == expected
    assert read(list(text), name, **options) == expected


@pytest.mark.parametrize("name", FORMATS)
@settings(max_examples=80, deadline=None)
@given(text=TEXT)
def test_nothing_is_lost(name, text):
    """What is in no call and no mark is content, in order."""
    reply = read([text], name)
    if not reply.calls and name != "chatglm3":
        assert reply.content == text
    left = iter(text)
    said = "".join(reply.content.split())
    assert all(char in left for char in said)  # a subsequence


def test_ids_are_openais_and_unique():
    ids = {new_call_id() for _ in range(1000)}
    assert len(ids) == 1000
    assert all(each.startswith("call_") and len(each) == 29 and each[5:].isalnum() for each in ids)


def test_unknown_formats_are_named():
    with pytest.raises(UsageError, match="Did you mean hermes"):
        tool_format("herms")
    with pytest.raises(UsageError, match="unknown reasoning format"):
        reasoning_format("thonk")
    assert reasoning_format("none") is None
    assert tool_format("qwen") is tool_format("hermes")
