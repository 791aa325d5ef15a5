"""Tools, past calls and their results as plain text, for templates that know no tools themselves."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

from martlet.chat.messages import Message
from martlet.chat.python_call import write_keywords
from martlet.chat.tool_formats import ToolFormat
from martlet.errors import InvalidRequest

RESULT_ROLES = ("tool", "function", "observation")


def as_text(messages: Sequence[Message], tools: Sequence[Mapping[str, Any]] | None, known: ToolFormat) -> list[Message]:
    """The conversation in messages that hold content alone: tools in the system text, results in user turns."""
    written: list[Message] = []
    joins = False  # the last message holds results, and takes more of them
    for message in messages:
        if message["role"] in RESULT_ROLES:
            text = (message["content"] or "").join(known.result)
            if joins:
                written[-1]["content"] += "\n" + text
            else:
                written.append({"role": "user", "content": text})
            joins = True
            continue
        joins = False
        if message.get("tool_calls"):
            calls = [_name_and_arguments(call) for call in message["tool_calls"]]
            text = "\n".join(part for part in (message["content"], write_calls(calls, known)) if part)
            message = {key: value for key, value in message.items() if key != "tool_calls"} | {"content": text}
        written.append(message)
    if tools:
        text = system_text(tools, known)
        if written and written[0]["role"] in ("system", "developer"):
            written[0] = written[0] | {"content": f"{written[0]['content']}\n\n{text}"}
        else:
            written.insert(0, {"role": "system", "content": text})
    return written


def system_text(tools: Sequence[Mapping[str, Any]], known: ToolFormat) -> str:
    """What a model is told of its tools."""
    listed = "\n".join(json.dumps(tool.get("function", tool), ensure_ascii=False) for tool in tools)
    example = write_calls([("name_of_the_function", {"name_of_a_parameter": "value"})], known)
    return (
        "You can call functions to help with what the user asks. These are the functions, one a line, with a JSON "
        f"Schema of their parameters:\n{listed}\n\nTo call one, write exactly in this form:\n{example}\n"
        "Write a call only when a function is needed; otherwise answer in words."
    ) + (f"\n{known.hint}" if known.hint else "")


def write_calls(calls: Sequence[tuple[str, Mapping[str, Any]]], known: ToolFormat) -> str:
    """Calls, (name, arguments) each, as the model would have written them."""
    items = [write_call(name, arguments, known) for name, arguments in calls]
    begin = "" if known.begin_optional else known.begin + known.pad
    end = (known.pad if known.end else "") + known.end
    if known.separator:
        return begin + known.opening + f"{known.separator} ".join(items) + known.closing + end
    if known.call == "chatglm3":  # whose prompt already holds the first mark
        return known.begin.join(items)
    return "\n".join(begin + item + end for item in items)


def write_call(name: str, arguments: Mapping[str, Any], known: ToolFormat) -> str:
    if known.call == "object":
        return json.dumps({"name": name, known.arguments: arguments}, ensure_ascii=False)
    if known.call == "react":
        return f"{name}\nAction Input: {json.dumps(arguments, ensure_ascii=False)}"
    if known.call == "python":
        return f"{name}({write_keywords(arguments)})"
    return f"{name}\n```python\ntool_call({write_keywords(arguments)})\n```"


def shorten_ids(messages: Sequence[Message], length: int) -> list[Message]:
    """The messages with ids of calls of just `length` letters and digits, the same for the same id."""

    def short(value: Any) -> Any:
        digest = hashlib.blake2b(str(value).encode(), digest_size=16).hexdigest()
        return value if isinstance(value, str) and len(value) == length and value.isalnum() else digest[:length]

    shortened = []
    for message in messages:
        message = dict(message)
        if "tool_call_id" in message:
            message["tool_call_id"] = short(message["tool_call_id"])
        if message.get("tool_calls"):
            message["tool_calls"] = [call | {"id": short(call.get("id"))} for call in message["tool_calls"]]
        shortened.append(message)
    return shortened


def _name_and_arguments(call: Mapping[str, Any]) -> tuple[str, Mapping[str, Any]]:
    arguments = call["function"].get("arguments") or {}
    if not isinstance(arguments, dict):
        raise InvalidRequest("arguments of a tool call must be an object", param="messages")
    return str(call["function"].get("name", "")), arguments
