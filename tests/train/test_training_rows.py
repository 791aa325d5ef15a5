"""Every layout of a row says the same conversation, and a bad row says what is wrong with it."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from martlet.train.rows import RowError, parse

ASKED = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]

SAME = {
    "swift": {"query": "q", "response": "a"},
    "synonyms": {"question": "q", "answer": "a"},
    "prompt and completion": {"prompt": "q", "completion": "a"},
    "messages": {"messages": ASKED},
    "sharegpt": {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]},
    "chatglm3": {"conversations": ASKED},
    "pairs": {"conversation": [{"human": "q", "assistant": "a"}]},
    "alpaca": {"instruction": "q", "input": "", "output": "a"},
    "parts": {"messages": [ASKED[0], {"role": "assistant", "content": [{"type": "text", "value": "a"}]}]},
    "a table's gaps": {"query": "q", "response": "a", "history": None, "system": float("nan")},
}


@pytest.mark.parametrize("record", SAME.values(), ids=SAME)
def test_layouts_agree(record):
    row = parse(record)
    assert list(row.messages) == ASKED and row.learn == (False, True)
    assert row.rejected is None and row.label is None and row.text is None


PREFERENCES = {
    "swift": {"query": "q", "response": "a", "rejected_response": "b"},
    "texts": {"prompt": "q", "chosen": "a", "rejected": "b"},
    "endings": {"prompt": "q", "chosen": [ASKED[1]], "rejected": [{"role": "assistant", "content": "b"}]},
    "prompt of messages": {"prompt": ASKED[:1], "chosen": "a", "rejected": "b"},
    "whole conversations": {
        "prompt": "q",
        "messages": ASKED,
        "chosen": ASKED,
        "rejected": [ASKED[0], {"role": "assistant", "content": "b"}],
    },
    "sharegpt": {
        "conversations": [{"from": "human", "value": "q"}],
        "chosen": {"from": "gpt", "value": "a"},
        "rejected": {"from": "gpt", "value": "b"},
    },
    "messages": {"messages": ASKED, "rejected_response": "b"},
    "ms-swift 4": {"messages": ASKED, "rejected_messages": [ASKED[0], {"role": "assistant", "content": "b"}]},
}


@pytest.mark.parametrize("record", PREFERENCES.values(), ids=PREFERENCES)
def test_preferences_agree(record):
    row = parse(record)
    assert list(row.messages) == ASKED and row.rejected == "b"


def test_history_system_label_and_text():
    row = parse({"system": "s", "history": [["q0", "a0"]], "query": "q", "response": "a", "label": "false"})
    assert [m["content"] for m in row.messages] == ["s", "q0", "a0", "q", "a"]
    assert row.learn == (False, False, True, False, True) and row.label is False
    assert parse({"text": "once"}).text == "once"
    assert parse({"response": "once"}).text == "once"
    assert parse({"q": "?", "a": "!"}, {"q": "query", "a": "response"}).answer == "!"


def test_tool_use_of_chatglm3_and_sharegpt_is_the_same():
    tools = [{"name": "weather", "parameters": {"type": "object"}}]
    glm = parse(
        {
            "tools": tools,
            "conversations": [
                {"role": "user", "content": "rain?"},
                {"role": "tool", "name": "weather", "parameters": {"city": "Ulm"}, "observation": "dry"},
                {"role": "assistant", "content": "No."},
            ],
        }
    )
    sharegpt = parse(
        {
            "tools": json.dumps(tools),
            "conversations": [
                {"from": "human", "value": "rain?"},
                {"from": "function_call", "value": '{"name": "weather", "arguments": {"city": "Ulm"}}'},
                {"from": "observation", "value": "dry"},
                {"from": "gpt", "value": "No."},
            ],
        }
    )
    assert glm == sharegpt
    assert [m["role"] for m in glm.messages] == ["user", "assistant", "tool", "assistant"]
    assert glm.learn == (False, True, False, True) and glm.tools[0]["function"]["name"] == "weather"


def test_a_message_may_be_left_unlearned():
    turns = [ASKED[0], {**ASKED[1], "loss": False}, ASKED[0], {**ASKED[1], "loss_weight": 1.0}]
    assert parse({"messages": turns}).learn == (False, False, False, True)


BAD = {
    "there is no answer": {"query": "q"},
    "the answer is empty": {"query": "q", "response": " "},
    "there is no question": {"messages": ASKED[1:]},
    "no known layout: the columns are x, y": {"x": 1, "y": 2},
    "must be an object, got list": ["q", "a"],
    "role 'robot'": {"messages": [{"role": "robot", "content": "q"}]},
    "response must be text, got int": {"query": "q", "response": 3},
    "is not JSON": {"tools": "{", "query": "q", "response": "a"},
    "the rejected answer is the chosen one": {"query": "q", "response": "a", "rejected_response": "a"},
    "label must be true or false": {"query": "q", "response": "a", "label": "maybe"},
    "no message is to be learned": {"messages": [ASKED[0], {**ASKED[1], "loss": 0}]},
}


@pytest.mark.parametrize("reason", BAD)
def test_bad_rows_say_why(reason):
    with pytest.raises(RowError, match=reason):
        parse(BAD[reason])


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text("ab {", max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["role", "content", "from"]), inner),
    max_leaves=8,
)


@given(st.dictionaries(st.sampled_from(["messages", "conversations", "query", "response", "chosen", "tools"]), JSON))
def test_whatever_stands_there_gives_a_row_or_a_reason(record):
    try:
        row = parse(record)
    except RowError:
        return
    assert row.text is not None or row.messages[-1]["role"] == "assistant"
