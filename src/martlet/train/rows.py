"""One row of a dataset file, in any of the layouts people have, as one thing: a conversation.

Supervised rows end with an assistant's message. Preference rows carry a second ending that is worse (`rejected`),
labelled rows a verdict on their ending (`label`), rows for pretraining only a text. Layouts (SWIFT's and their kin):

    query, response, history, system        also rejected_response, label
    messages                                OpenAI's; also rejected_response, rejected_messages, chosen + rejected
    conversations                           ShareGPT's from/value, ChatGLM3's role/content/parameters/observation
    conversation                            pairs {human, assistant}
    instruction, input, output              alpaca's, with history and system
    prompt + chosen + rejected              texts or message lists
    text, or response alone                 pretraining
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from martlet.chat.messages import Message, history_to_messages, normalise
from martlet.errors import InvalidRequest

_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "bot": "assistant",
    "system": "system",
    "function_call": "call",
    "tool_call": "call",
    "observation": "tool",
    "tool": "tool",
    "tool_response": "tool",
    "function": "tool",
}
_SYNONYMS = {
    "question": "query",
    "prompt": "query",
    "answer": "response",
    "completion": "response",
    "rejected_answer": "rejected_response",
    "content": "text",
}


class RowError(ValueError):
    """Why a row cannot be trained on."""


@dataclass(frozen=True, slots=True)
class Row:
    """A conversation to learn from.

    messages: normalised, tool calls as OpenAI writes them, the last one an assistant's; empty when `text` is set.
    learn: for each message, whether its words are learned; only assistants' are. rejected: the words of a worse last
    message. label: whether the last message is desirable. origin: FILE:LINE, for whoever reports it.
    """

    messages: tuple[Message, ...] = ()
    learn: tuple[bool, ...] = ()
    tools: tuple[dict[str, Any], ...] = ()
    rejected: str | None = None
    label: bool | None = None
    text: str | None = None
    origin: str = field(default="", compare=False)

    @property
    def prompt(self) -> tuple[Message, ...]:
        """All but the last message."""
        return self.messages[:-1]

    @property
    def answer(self) -> str:
        return self.messages[-1]["content"] or ""


def parse(record: Mapping[str, Any], columns: Mapping[str, str] | None = None) -> Row:
    """The row that a JSON object, a line of CSV or of a table holds. columns: renames, the file's name to ours.

    Raises RowError with a reason a person can act on.
    """
    if not isinstance(record, Mapping):
        raise RowError(f"a row must be an object, got {type(record).__name__}")
    row = {(columns or {}).get(str(key), str(key)): value for key, value in record.items() if not _absent(value)}
    try:
        return _checked(_read(row), row)
    except InvalidRequest as error:
        raise RowError(error.message) from error


def _read(row: dict[str, Any]) -> tuple[list[Message], list[bool | None], str | None]:
    """(messages, learn or None each, the worse ending) of a row of any layout. One text alone: no messages."""
    chosen, rejected = row.get("chosen"), row.get("rejected")
    if _is_turns(chosen) and len(chosen) > 1:  # both are whole conversations
        messages, learn = _turns(chosen, "chosen")
        return messages, learn, _last_words(rejected, "rejected")
    if "messages" in row:
        messages, learn = _turns(row["messages"], "messages")
    elif "conversations" in row:
        messages, learn = _turns(row["conversations"], "conversations")
    elif "conversation" in row:
        messages, learn = _pairs(row["conversation"]), None
    elif _is_turns(row.get("prompt")):
        messages, learn = _turns(row["prompt"], "prompt")
    else:
        messages, learn = _query_response(row), None
    learn = learn or [None] * len(messages)
    if chosen is not None:
        messages, learn = [*messages, _ending(chosen, "chosen")], [*learn, None]
    if row.get("system") is not None and messages and messages[0]["role"] != "system":
        messages, learn = [{"role": "system", "content": _text(row, "system")}, *messages], [False, *learn]
    worse = rejected if rejected is not None else row.get("rejected_response", row.get("rejected_messages"))
    return messages, learn, None if worse is None else _last_words(worse, "rejected")


def _query_response(row: dict[str, Any]) -> list[Message]:
    row = dict(row)
    for name, ours in _SYNONYMS.items():
        if name in row and ours not in row:
            row[ours] = row[name]
    query, answer = row.get("query"), row.get("response")
    if query is None and "instruction" in row:
        query = "\n".join(part for part in (_text(row, "instruction"), _text(row, "input")) if part)
    if answer is None and "output" in row:
        answer = row["output"]
    if query is None:
        return []
    messages = history_to_messages(row.get("history"), _as_text(query, "query"))
    if answer is not None:
        messages.append({"role": "assistant", "content": _as_text(answer, "response")})
    return messages


def _turns(turns: Any, where: str) -> tuple[list[Message], list[bool | None]]:
    """Messages told as role/content or from/value, tool use in OpenAI's, ShareGPT's or ChatGLM3's way."""
    if not _is_turns(turns):
        raise RowError(f"{where} must be a list of messages")
    messages: list[Message] = []
    learn: list[bool | None] = []
    for i, turn in enumerate(turns):
        role, words = turn.get("role", turn.get("from")), turn.get("content", turn.get("value"))
        if isinstance(words, list):
            words = [{"type": "text", "text": p["value"]} if "value" in p else p for p in words if isinstance(p, dict)]
        kind = _ROLES.get(role) if isinstance(role, str) else None
        if kind is None:
            raise RowError(f"{where}[{i}] has role {role!r}; known roles are {', '.join(sorted(_ROLES))}")
        flag = turn.get("loss", turn.get("loss_weight"))
        flag = None if flag is None else bool(flag)
        if kind == "call":
            messages.append(_call(_json(words, f"{where}[{i}]"), f"{where}[{i}]"))
        elif kind == "tool" and "parameters" in turn:  # ChatGLM3: a call and what came of it are one turn
            messages.append(_call({"name": turn.get("name"), "arguments": turn["parameters"]}, f"{where}[{i}]"))
            learn.append(flag)
            messages.append({"role": "tool", "content": _as_text(turn.get("observation", ""), f"{where}[{i}]")})
            flag = False
        elif kind == "tool":
            messages.append({"role": "tool", "content": _as_text(words, f"{where}[{i}]")})
        else:
            extra = {key: turn[key] for key in ("tool_calls", "reasoning_content") if turn.get(key)}
            messages.append({"role": kind, "content": words, **extra})
        learn.append(flag)
    return messages, learn


def _call(call: Any, where: str) -> Message:
    calls = call if isinstance(call, list) else [call]
    if not all(isinstance(c, Mapping) and isinstance(c.get("name"), str) for c in calls):
        raise RowError(f"{where} is no tool call: an object with name and arguments is needed")
    functions = [{"name": c["name"], "arguments": c.get("arguments", c.get("parameters", {}))} for c in calls]
    return {
        "role": "assistant",
        "content": None,
        "tool_calls": [{"type": "function", "function": f} for f in functions],
    }


def _pairs(pairs: Any) -> list[Message]:
    if not _is_turns(pairs):
        raise RowError("conversation must be a list of {human, assistant}")
    return history_to_messages([(pair.get("human"), pair.get("assistant")) for pair in pairs])


def _ending(value: Any, where: str) -> Message:
    return {"role": "assistant", "content": _last_words(value, where)}


def _last_words(value: Any, where: str) -> str:
    """The words of an ending: text, a message, or a conversation whose last message counts."""
    if isinstance(value, list) and value:
        value = value[-1]
    if isinstance(value, Mapping):
        value = value.get("content", value.get("value"))
    return _as_text(value, where)


def _checked(parsed: tuple[list[Message], list[bool | None], str | None], row: Mapping[str, Any]) -> Row:
    """A Row when everything that training needs is there."""
    messages, learn, rejected = parsed
    if not messages:
        text = row.get("text", row.get("content", row.get("response")))
        if text is None:
            raise RowError(f"no known layout: the columns are {', '.join(sorted(row)) or 'none'}")
        return Row(text=_as_text(text, "text"))
    messages = normalise(messages)
    last = messages[-1]
    if last["role"] != "assistant":
        raise RowError(f"there is no answer: the last message is the {last['role']}'s")
    if not (last["content"] or "").strip() and not last.get("tool_calls"):
        raise RowError("the answer is empty")
    if len(messages) == 1:
        raise RowError("there is no question before the answer")
    if rejected is not None and rejected == last["content"]:
        raise RowError("the rejected answer is the chosen one")
    flags = [m["role"] == "assistant" and flag is not False for m, flag in zip(messages, learn, strict=True)]
    if not any(flags):
        raise RowError("no message is to be learned: every loss is 0")
    label = row.get("label", row.get("kto_tag"))
    return Row(
        tuple(messages), tuple(flags), _tools(row.get("tools")), rejected, None if label is None else _truth(label)
    )


def _tools(tools: Any) -> tuple[dict[str, Any], ...]:
    """Tool schemas: OpenAI's {"type": "function", "function": ...} or bare functions, as a list or as JSON text."""
    if tools is None:
        return ()
    found = _json(tools, "tools")
    if not isinstance(found, list) or not all(isinstance(tool, dict) for tool in found):
        raise RowError("tools must be a list of objects")
    return tuple(t if "function" in t else {"type": "function", "function": t} for t in found)


def _json(value: Any, where: str) -> Any:
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except ValueError as error:
        raise RowError(f"{where} is not JSON: {error}") from error


def _truth(value: Any) -> bool:
    words = {"true": True, "false": False, "1": True, "0": False}
    if isinstance(value, str) and value.strip().lower() in words:
        return words[value.strip().lower()]
    if isinstance(value, (bool, int, float)):
        return bool(value)
    raise RowError(f"label must be true or false, got {value!r}")


def _is_turns(value: Any) -> bool:
    return isinstance(value, Sequence) and bool(value) and all(isinstance(turn, Mapping) for turn in value)


def _text(row: Mapping[str, Any], name: str) -> str | None:
    return None if row.get(name) is None else _as_text(row[name], name)


def _as_text(value: Any, where: str) -> str:
    if isinstance(value, (dict, list)) and where not in ("query", "response", "text"):
        return json.dumps(value, ensure_ascii=False)
    if not isinstance(value, str):
        raise RowError(f"{where} must be text, got {type(value).__name__}")
    return value


def _absent(value: Any) -> bool:
    """None, and the NaN that tables have for it."""
    return value is None or (isinstance(value, float) and value != value)
