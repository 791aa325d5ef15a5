"""A conversation as plain data: checking what a caller sent, and SWIFT's (query, response) pairs.

A message is {"role", "content", ...}. Content is text, or None beside tool calls; lists of text parts are joined.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from reprlib import repr as brief
from typing import Any

from martlet.errors import InvalidRequest

ROLES = ("system", "developer", "user", "assistant", "tool", "function", "observation")
MAX_DEPTH = 64

Message = dict[str, Any]


def normalise(messages: Sequence[Mapping[str, Any]]) -> list[Message]:
    """Copies of the messages with content as str or None, everything else as plain JSON data.

    Raises InvalidRequest naming the place: no messages, an unknown role, content of a type that is not text.
    """
    if isinstance(messages, (str, bytes, Mapping)) or not isinstance(messages, Sequence):
        raise InvalidRequest(f"messages must be a list, got {type(messages).__name__}", param="messages")
    if not messages:
        raise InvalidRequest("messages is empty; at least one message is needed", param="messages")
    return [_message(message, f"messages[{i}]") for i, message in enumerate(messages)]


def _message(message: Mapping[str, Any], where: str) -> Message:
    if not isinstance(message, Mapping):
        raise InvalidRequest(f"{where} must be an object with role and content, got {brief(message)}", param=where)
    role = message.get("role")
    if role not in ROLES:
        raise InvalidRequest(
            f"{where}.role is {brief(role)}; known roles are {', '.join(ROLES)}", param=f"{where}.role"
        )
    out: Message = {"role": role, "content": _content(message.get("content"), f"{where}.content")}
    if out["content"] is None and not (
        role == "assistant" and (message.get("tool_calls") or "function_call" in message)
    ):
        raise InvalidRequest(
            f"{where}.content is missing; only an assistant's tool calls need none", param=f"{where}.content"
        )
    for key, value in message.items():
        if key not in out and value is not None:
            out[str(key)] = plain(value, f"{where}.{key}")
    if "tool_calls" in out:
        out["tool_calls"] = _tool_calls(out["tool_calls"], f"{where}.tool_calls")
    if "reasoning" in out:  # vLLM's name for it
        out.setdefault("reasoning_content", out.pop("reasoning"))
    return _without_functions(out, f"{where}.function_call")


def _without_functions(message: Message, where: str) -> Message:
    """A message of the API before tools, as one with tools: a function call is a tool call with the id "function"."""
    if message["role"] == "function":
        return message | {"role": "tool", "tool_call_id": "function"}
    call = message.pop("function_call", None)
    if call is not None and not message.get("tool_calls"):
        message["tool_calls"] = _tool_calls([{"id": "function", "type": "function", "function": call}], where)
    return message


def _content(content: Any, where: str) -> str | None:
    if content is None or isinstance(content, str):
        return plain(content, where)
    if not isinstance(content, Sequence) or isinstance(content, (bytes, bytearray)):
        raise InvalidRequest(f"{where} must be text or a list of parts, got {type(content).__name__}", param=where)
    texts = []
    for i, part in enumerate(content):
        kind = part.get("type") if isinstance(part, Mapping) else None
        if isinstance(part, str):
            part, kind = {"text": part}, "text"
        if kind not in ("text", "input_text", "output_text"):
            named = repr(kind) if isinstance(part, Mapping) else type(part).__name__
            raise InvalidRequest(
                f"{where}[{i}] is a part of type {named}; this model reads text", param=f"{where}[{i}]"
            )
        if not isinstance(part.get("text"), str):
            raise InvalidRequest(f"{where}[{i}].text must be text", param=f"{where}[{i}].text")
        texts.append(plain(part["text"], f"{where}[{i}].text"))
    return "".join(texts)


def _tool_calls(calls: Any, where: str) -> list[dict[str, Any]]:
    """Calls with their arguments as an object: clients send JSON text, templates write the JSON themselves."""
    if not isinstance(calls, list) or not all(
        isinstance(c, dict) and isinstance(c.get("function"), dict) for c in calls
    ):
        raise InvalidRequest(f"{where} must be a list of objects with a function", param=where)
    for i, call in enumerate(calls):
        arguments = call["function"].get("arguments")
        if isinstance(arguments, str):
            try:
                call["function"]["arguments"] = json.loads(arguments or "{}")
            except ValueError as error:
                raise InvalidRequest(f"{where}[{i}].function.arguments is not JSON: {error}", param=where) from error
        if not isinstance(call["function"].get("arguments") or {}, dict):
            raise InvalidRequest(f"{where}[{i}].function.arguments must be an object", param=where)
    return calls


def plain(value: Any, where: str, depth: int = 0) -> Any:
    """A copy of JSON data in built-in types. InvalidRequest for anything else, and for text no UTF-8 can hold."""
    if depth > MAX_DEPTH:
        raise InvalidRequest(f"{where} is nested more than {MAX_DEPTH} deep", param=where)
    if value is None or type(value) in (bool, int, float):
        return value
    if isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise InvalidRequest(
                f"{where} holds half a surrogate pair at character {error.start}", param=where
            ) from error
        return str(value)
    if isinstance(value, Mapping):
        return {plain(str(k), where): plain(v, f"{where}.{k}", depth + 1) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(v, f"{where}[{i}]", depth + 1) for i, v in enumerate(value)]
    raise InvalidRequest(f"{where} is a {type(value).__name__}; only JSON data can be in a message", param=where)


def history_to_messages(
    history: Iterable[Sequence[str]] | None, query: str | None = None, system: str | None = None
) -> list[Message]:
    """Messages of a dialogue told as (query, response) pairs, an optional system text before and a query after them."""
    messages: list[Message] = [] if system is None else [{"role": "system", "content": system}]
    for i, pair in enumerate(history or ()):
        if isinstance(pair, str) or not isinstance(pair, Sequence) or len(pair) != 2:
            raise InvalidRequest(f"history[{i}] must be a query and a response, got {brief(pair)}", param="history")
        messages += [{"role": "user", "content": pair[0]}, {"role": "assistant", "content": pair[1]}]
    if query is not None:
        messages.append({"role": "user", "content": query})
    return messages


def messages_to_history(messages: Sequence[Mapping[str, Any]]) -> tuple[list[tuple[str, str]], str | None, str | None]:
    """The inverse: (history, query, system). Raises InvalidRequest for a dialogue that pairs cannot tell."""
    turns = normalise(messages)
    system = turns.pop(0)["content"] if turns[0]["role"] == "system" else None
    query = turns.pop()["content"] if len(turns) % 2 else None
    roles = [m["role"] for m in turns] + ["user"] * (query is not None)
    if roles != ["user", "assistant"] * (len(turns) // 2) + ["user"] * (query is not None):
        raise InvalidRequest(f"pairs need user and assistant in turn, got {', '.join(roles)}", param="messages")
    return [(turns[i]["content"], turns[i + 1]["content"]) for i in range(0, len(turns), 2)], query, system
