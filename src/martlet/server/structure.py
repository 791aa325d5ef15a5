"""What an answer must look like: OpenAI's response_format, vLLM's structured_outputs and its older guided_ fields."""

from __future__ import annotations

import asyncio
import functools
import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from martlet.backends.base import Backend
from martlet.errors import InvalidRequest
from martlet.grammar import Grammar, choice, json_schema
from martlet.server.answering import Answering
from martlet.server.errors import unsupported
from martlet.server.schema import GenerationBody
from martlet.server.tools import Tools

# Compilers wait in line for one process: more threads than this would only wait, and the loop's own are for others.
_WAITERS = ThreadPoolExecutor(8, thread_name_prefix="martlet-grammar")


def _text(kind: Any) -> Callable[[Any], Grammar]:
    def make(value: Any) -> Grammar:
        if not isinstance(value, str):
            raise InvalidRequest(f"{kind} must be a string", param="grammar")
        return Grammar(kind, value)

    return make


def _schema(value: Any) -> Grammar:
    if not isinstance(value, (dict, str, bool)):
        raise InvalidRequest("a JSON Schema is an object", param="grammar")
    return json_schema(value)


def _choice(value: Any) -> Grammar:
    if not isinstance(value, list):
        raise InvalidRequest("choices are a list of strings", param="grammar")
    return choice(value)


_MAKERS: dict[str, Callable[[Any], Grammar]] = {
    "json": _schema,
    "regex": _text("regex"),
    "choice": _choice,
    "grammar": _text("lark"),
}


async def answer_grammar(backend: Backend, body: GenerationBody) -> Grammar | None:
    """The grammar that `body` asks for, compiled. Raises InvalidRequest about the field that asks for it."""
    found = {}
    for name, read in (("response_format", _response_format), ("structured_outputs", _structured_outputs)):
        if (value := getattr(body, name)) is not None:
            found[name] = _about(name, read, value)
    for name, make in _MAKERS.items():
        if (value := getattr(body, f"guided_{name}")) is not None:
            found[f"guided_{name}"] = _about(f"guided_{name}", make, value)
    found = {name: grammar for name, grammar in found.items() if grammar is not None}
    if len(found) > 1:
        raise InvalidRequest(f"{' and '.join(found)} exclude each other; send one of them", param=list(found)[1])
    for name, grammar in found.items():
        loop = asyncio.get_running_loop()
        await loop.run_in_executor(_WAITERS, _about, name, backend.check_grammar, grammar)
        return grammar
    return None


async def calls_grammar(backend: Backend, tools: Tools, reading: Answering, asked: Grammar | None) -> Grammar | None:
    """The grammar of answers that may or must call tools, compiled. asked: what answers of other kinds must be like.

    Where a call is required, raises InvalidRequest about the tool whose schema cannot be followed. Elsewhere such a
    schema, or a backend that follows no grammars, leaves calls to the model.
    """
    check = functools.partial(asyncio.get_running_loop().run_in_executor, _WAITERS, backend.check_grammar)
    content: dict[str, Any] | None = None
    if tools.choice != "required" and asked is not None:
        if asked.kind not in ("json_object", "json_schema"):
            raise InvalidRequest(f"a {asked.kind} for the answer and tools exclude each other", param="tools")
        schema = json.loads(asked.text) if asked.text else {"type": "object"}
        content = schema if isinstance(schema, dict) else {}
    grammar = _about("tools", lambda listed: reading.grammar(listed, content), tools.callable)
    try:
        await check(grammar)
    except InvalidRequest as error:
        if tools.choice != "required":
            return asked
        for tool in tools.callable:
            try:
                await check(reading.grammar([tool], None))
            except InvalidRequest as cause:
                raise InvalidRequest(f"{tools.where(tool[0])}: {cause.message}", param=tools.where(tool[0])) from cause
        raise InvalidRequest(f"tools: {error.message}", param="tools") from error
    return grammar


def _about(name: str, work: Callable[[Any], Any], value: Any) -> Any:
    try:
        return work(value)
    except InvalidRequest as error:
        inner = error.param if error.param and error.param.startswith(name) else name
        raise InvalidRequest(f"{name}: {error.message}", param=inner) from error


def _response_format(value: dict[str, Any]) -> Grammar | None:
    kind = value.get("type")
    if kind == "text":
        return None
    if kind == "json_object":
        return Grammar("json_object")
    if kind == "json_schema":
        inner = value.get("json_schema")
        if not isinstance(inner, dict) or not isinstance(inner.get("schema"), (dict, bool)):
            raise InvalidRequest("json_schema needs an object with a schema", param="response_format.json_schema")
        return json_schema(inner["schema"])
    if kind == "structural_tag":
        raise unsupported("response_format", "of type structural_tag is not supported by this server")
    raise InvalidRequest("type must be text, json_object or json_schema", param="response_format.type")


def _structured_outputs(value: dict[str, Any]) -> Grammar | None:
    given = {name: item for name, item in value.items() if item is not None and item is not False}
    for name in given:
        if name not in _MAKERS and name != "json_object":
            raise unsupported(f"structured_outputs.{name}")
    if len(given) > 1:
        raise InvalidRequest(f"{' and '.join(given)} exclude each other", param="structured_outputs")
    for name, item in given.items():
        return Grammar("json_object") if name == "json_object" else _MAKERS[name](item)
    return None
