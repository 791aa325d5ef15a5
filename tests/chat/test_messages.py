import pytest

from martlet.chat import history_to_messages, messages_to_history, normalise
from martlet.errors import InvalidRequest


def test_parts_are_joined_and_the_input_is_left_alone():
    given = [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}], "name": None}]
    assert normalise(given) == [{"role": "user", "content": "ab"}]
    assert given[0]["content"][0] == {"type": "text", "text": "a"}


def test_an_assistant_may_have_calls_in_place_of_content():
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}
    (message,) = normalise([{"role": "assistant", "content": None, "tool_calls": [call]}])
    assert message["content"] is None
    assert message["tool_calls"][0]["function"]["arguments"] == {"a": 1}
    assert call["function"]["arguments"] == '{"a": 1}'


@pytest.mark.parametrize(
    ("messages", "param", "says"),
    [
        ([], "messages", "empty"),
        ("hi", "messages", "list"),
        ({"role": "user", "content": "hi"}, "messages", "list"),
        (["hi"], "messages[0]", "object"),
        ([{"content": "hi"}], "messages[0].role", "known roles"),
        ([{"role": "bot", "content": "hi"}], "messages[0].role", "'bot'"),
        ([{"role": ["user"], "content": "hi"}], "messages[0].role", "known roles"),
        ([{"role": "user"}], "messages[0].content", "content"),
        ([{"role": "user", "content": None}], "messages[0].content", "content"),
        ([{"role": "user", "content": 3}], "messages[0].content", "int"),
        ([{"role": "user", "content": b"x"}], "messages[0].content", "bytes"),
        ([{"role": "user", "content": "a\ud800"}], "messages[0].content", "surrogate"),
        ([{"role": "user", "content": [{"type": "image_url"}]}], "messages[0].content[0]", "'image_url'"),
        ([{"role": "user", "content": [3]}], "messages[0].content[0]", "int"),
        ([{"role": "user", "content": [{"type": "text"}]}], "messages[0].content[0].text", "text"),
        ([{"role": "user", "content": "a", "x": object()}], "messages[0].x", "object"),
        ([{"role": "assistant", "content": None, "tool_calls": "x"}], "messages[0].tool_calls", "list"),
        (
            [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]}],
            "messages[0].tool_calls",
            "not JSON",
        ),
    ],
)
def test_malformed_messages_are_named(messages, param, says):
    with pytest.raises(InvalidRequest, match=says) as error:
        normalise(messages)
    assert error.value.param == param


def test_deep_data_is_refused():
    deep = {"role": "user", "content": "a", "x": None}
    inner = deep
    for _ in range(100):
        inner["x"] = {"x": None}
        inner = inner["x"]
    inner["x"] = 1
    with pytest.raises(InvalidRequest, match="nested"):
        normalise([deep])


def test_pairs_and_messages_are_inverse():
    history = [("q1", "a1"), ("q2", "a2")]
    messages = history_to_messages(history, "q3", "be kind")
    assert [m["role"] for m in messages] == ["system", "user", "assistant", "user", "assistant", "user"]
    assert messages_to_history(messages) == (history, "q3", "be kind")
    assert messages_to_history(messages[1:5]) == (history, None, None)


@pytest.mark.parametrize("history", [["ab"], [("a",)], [("a", "b", "c")], [3]])
def test_what_is_no_pair_is_refused(history):
    with pytest.raises(InvalidRequest, match=r"history\[0\]"):
        history_to_messages(history, "q")


def test_a_dialogue_that_pairs_cannot_tell_is_refused():
    with pytest.raises(InvalidRequest, match="in turn"):
        messages_to_history([{"role": "user", "content": "a"}, {"role": "user", "content": "b"}])
