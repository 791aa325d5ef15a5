"""The tools of a chat request: which may be called, and whether one must be."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from martlet.errors import InvalidRequest, did_you_mean
from martlet.server.schema import ChatBody, Function, FunctionName, Message, NamedTool, Tool

_NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")
NO_PARAMETERS = {"type": "object", "properties": {}, "additionalProperties": False}


@dataclass(frozen=True, slots=True)
class Tools:
    """listed: what the template is told, in OpenAI's form. callable: those that an answer may call, (name, schema of
    the parameters) each. choice: whether it may or must. parallel: whether it may make several calls.
    legacy: the client knows functions and no tools, and is answered so.
    """

    listed: tuple[dict[str, Any], ...] = ()
    callable: tuple[tuple[str, dict[str, Any]], ...] = ()
    choice: Literal["none", "auto", "required"] = "none"
    parallel: bool = True
    legacy: bool = False

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(name for name, _ in self.callable)

    def where(self, name: str) -> str:
        """The field that holds the schema of a tool's parameters."""
        at = [tool["function"]["name"] for tool in self.listed].index(name)
        return f"functions[{at}].parameters" if self.legacy else f"tools[{at}].function.parameters"

    @property
    def max_calls(self) -> int | None:
        return None if self.parallel else 1


def read_tools(body: ChatBody) -> Tools:
    """Raises InvalidRequest naming the field at fault."""
    check_history(body.messages)
    if body.functions is not None or body.function_call is not None:
        return _read_functions(body)
    listed = [tool.function for tool in body.tools or ()]
    schemas = _check(listed, "tools", ".function")
    chosen = body.tool_choice
    named = chosen.function.name if isinstance(chosen, NamedTool) else None
    if not listed:
        if named or chosen == "required":
            raise InvalidRequest("tool_choice needs tools to choose from", param="tool_choice")
        if body.parallel_tool_calls is not None:
            raise InvalidRequest("parallel_tool_calls is only allowed with tools", param="parallel_tool_calls")
        return Tools()
    mode = chosen if isinstance(chosen, str) else "auto"
    return _tools(listed, schemas, mode, named, "tool_choice", parallel=body.parallel_tool_calls is not False)


def _read_functions(body: ChatBody) -> Tools:
    if body.tools is not None or body.tool_choice is not None:
        raise InvalidRequest("functions and tools cannot be mixed; functions are the old form", param="functions")
    listed, chosen = body.functions or [], body.function_call
    schemas = _check(listed, "functions", "")
    named = chosen.name if isinstance(chosen, FunctionName) else None
    if not listed:
        if named:
            raise InvalidRequest("function_call needs functions to choose from", param="function_call")
        return Tools(legacy=True)
    mode = chosen if isinstance(chosen, str) else "auto"
    return _tools(listed, schemas, mode, named, "function_call", parallel=False, legacy=True)


def read_listed(tools: Sequence[Tool] | None) -> tuple[dict[str, Any], ...]:
    """Checked, and as the template is told them."""
    functions = [tool.function for tool in tools or ()]
    _check(functions, "tools", ".function")
    return tuple({"type": "function", "function": _plain(function)} for function in functions)


def _tools(
    listed: Sequence[Function],
    schemas: Sequence[dict[str, Any]],
    mode: str,
    named: str | None,
    param: str,
    *,
    parallel: bool,
    legacy: bool = False,
) -> Tools:
    told = tuple({"type": "function", "function": _plain(function)} for function in listed)
    names = [function.name for function in listed]
    may = tuple(zip(names, schemas, strict=True))
    if mode == "none":
        return Tools(told, (), "none", legacy=legacy)
    if named is None:
        return Tools(told, may, "required" if mode == "required" else "auto", parallel, legacy)
    if named not in names:
        raise InvalidRequest(
            f"{param} names {named[:100]!r}, which is not among the tools.{did_you_mean(named, names)}", param=param
        )
    return Tools(told, tuple(each for each in may if each[0] == named), "required", False, legacy)


def _plain(function: Function) -> dict[str, Any]:
    given = {"name": function.name, "description": function.description, "parameters": function.parameters}
    return {key: value for key, value in given.items() if value is not None}


def _check(functions: Sequence[Function], field: str, inner: str) -> list[dict[str, Any]]:
    """Schemas of the parameters."""
    seen: set[str] = set()
    schemas = []
    for at, function in enumerate(functions):
        where = f"{field}[{at}]{inner}"
        if not _NAME.fullmatch(function.name):
            raise InvalidRequest(
                f"{where}.name must be 1 to 64 letters, digits, underscores or dashes", param=f"{where}.name"
            )
        if function.name in seen:
            raise InvalidRequest(f"{where}.name: there are two {field} named {function.name}", param=f"{where}.name")
        seen.add(function.name)
        schema = NO_PARAMETERS if function.parameters is None else function.parameters
        if schema.get("type", "object") != "object":
            raise InvalidRequest(
                f"{where}.parameters must be a JSON Schema of an object (type: object)", param=f"{where}.parameters"
            )
        if not isinstance(schema.get("properties", {}), dict):
            raise InvalidRequest(
                f"{where}.parameters.properties must be an object", param=f"{where}.parameters.properties"
            )
        schemas.append({"type": "object", **schema})
    return schemas


def check_history(messages: Sequence[Message]) -> None:
    """Results say which call they answer, and the calls are there."""
    known: set[str] = set()
    for at, message in enumerate(messages):
        where = f"messages[{at}]"
        if message.role != "assistant":
            for field in ("tool_calls", "function_call"):
                if getattr(message, field):
                    raise InvalidRequest(f"{where}.{field}: only an assistant calls tools", param=f"{where}.{field}")
        known.update(call.id for call in message.tool_calls or ())
        if message.role == "tool":
            if message.tool_call_id is None:
                raise InvalidRequest(
                    f"{where}.tool_call_id is required: the id of the call that this is the result of",
                    param=f"{where}.tool_call_id",
                )
            if message.tool_call_id not in known:
                raise InvalidRequest(
                    f"{where}.tool_call_id is {message.tool_call_id[:100]!r}; no message before has such a call",
                    param=f"{where}.tool_call_id",
                )
        if message.role == "function" and message.name is None:
            raise InvalidRequest(f"{where}.name is required: the function's", param=f"{where}.name")
