"""POST /v1/responses: OpenAI's newer API, without its store: every request brings its whole conversation."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Annotated, Any

from fastapi import APIRouter
from fastapi import Request as HttpRequest
from pydantic import Field
from starlette.responses import Response

from martlet.errors import InvalidRequest
from martlet.server.answers import ResponseObject, answers
from martlet.server.errors import ApiError, unsupported
from martlet.server.generation import Job, answer
from martlet.server.response_items import ResponseShape
from martlet.server.routing import JsonRoute
from martlet.server.sampling import extra_fields
from martlet.server.schema import Body, SamplingBody, Strings
from martlet.server.service import Service
from martlet.server.translation import member, shared_fields, text_parts, translated_job

router = APIRouter(route_class=JsonRoute)


class Reasoning(Body):
    effort: str | None = None
    summary: str | None = None


class Text(Body):
    format: dict[str, Any] | None = None
    verbosity: str | None = None


class ResponsesBody(SamplingBody):
    input: str | Annotated[list[dict[str, Any]], Field(fail_fast=True)]
    instructions: str | None = None
    max_output_tokens: int | None = None
    tools: Annotated[list[dict[str, Any]], Field(fail_fast=True)] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    text: Text | None = None
    reasoning: Reasoning | None = None
    include: Strings | None = None
    top_logprobs: int | None = None
    metadata: dict[str, str] | None = None
    session_id: str | None = None
    user: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None


# What this server cannot honour, with the values besides null that ask for nothing.
_UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "store": (False,),
    "previous_response_id": (),
    "conversation": (),
    "prompt": (),
    "background": (False,),
    "background_options": (),
    "truncation": ("disabled",),
    "max_tool_calls": (),
    "service_tier": ("auto", "default"),
    "context_management": ([],),
    "moderation": (),
    "image": (),
    "access_programs": (),
    "prompt_cache_options": (),
    "prompt_cache_retention": ("in_memory",),
    "stream_options": ({}, {"include_obfuscation": False}),
    "verbosity": ("medium",),  # of text
    "generate_summary": (),  # of reasoning
    "n": (1,),
    "max_tokens": (),
    "max_completion_tokens": (),
    "response_format": (),
    "logprobs": (),
    "messages": (),
}
_LOGPROBS = "message.output_text.logprobs"
# Reasoning items tell their text openly, so that a client that keeps them has all there is to keep.
_INCLUDE = (_LOGPROBS, "reasoning.encrypted_content")
_NAMES = {
    "messages": "input",
    "max_completion_tokens": "max_output_tokens",
    "response_format": "text.format",
    "reasoning_effort": "reasoning.effort",
    "logprobs": "include",
}
_PARTS = {"input_text": "text", "output_text": "text", "text": "text", "refusal": "refusal", "summary_text": "text"}
_PARTS |= {"reasoning_text": "text"}


@router.post(
    "/v1/responses", summary="Answer a text or a conversation, in items", responses=answers(ResponseObject, stream=True)
)
async def responses(body: ResponsesBody, http: HttpRequest) -> Response:
    service: Service = http.app.state.service
    record = http.scope["martlet.record"]
    job = await response_job(service, body, record.id)
    return await answer(service, job, record, http.receive)


async def response_job(service: Service, body: ResponsesBody, request_id: str) -> Job:
    ignored: list[str] = []
    job = await translated_job(service, _chat(body, ignored), request_id, _NAMES)
    told = _told(body, job)
    shape = ResponseShape(service.backend.tokenizer, told, wants_logprobs=_wants_logprobs(body))
    return dataclasses.replace(job, id=f"resp_{request_id}", shape=shape, ignored=ignored + job.ignored)


def _chat(body: ResponsesBody, ignored: list[str]) -> dict[str, Any]:
    chat = shared_fields(body, _UNSUPPORTED)
    system = [{"role": "system", "content": body.instructions}] if body.instructions else []
    chat["messages"] = system + _messages(body.input)
    if body.max_output_tokens is not None:
        chat["max_completion_tokens"] = body.max_output_tokens
    if _wants_logprobs(body):
        chat |= {"logprobs": True, "top_logprobs": body.top_logprobs or 0}
    elif body.top_logprobs:
        raise InvalidRequest(f'top_logprobs needs include: ["{_LOGPROBS}"]', param="top_logprobs")
    if body.reasoning is not None:
        ignored += extra_fields(body.reasoning, "reasoning.", _UNSUPPORTED)
        if body.reasoning.summary not in (None, "auto"):
            raise unsupported("reasoning.summary", "is not made here: reasoning items tell all of their text")
        if body.reasoning.effort is not None:
            chat["reasoning_effort"] = body.reasoning.effort
    if body.text is not None:
        ignored += extra_fields(body.text, "text.", _UNSUPPORTED)
        if body.text.verbosity not in (None, "medium"):
            raise unsupported("text.verbosity")
        if body.text.format is not None:
            chat["response_format"] = _format(body.text.format)
    if body.tools:
        chat["tools"] = [_tool(tool, f"tools[{i}]") for i, tool in enumerate(body.tools)]
    if body.tool_choice is not None:
        chat["tool_choice"] = _tool_choice(body.tool_choice)
    if body.parallel_tool_calls is not None and body.tools:
        chat["parallel_tool_calls"] = body.parallel_tool_calls
    return chat


def _wants_logprobs(body: ResponsesBody) -> bool:
    for name in body.include or ():
        if name not in _INCLUDE:
            raise unsupported("include", f"may hold {' or '.join(_INCLUDE)} here, not {name[:60]!r}")
    return _LOGPROBS in (body.include or ())


def _format(given: dict[str, Any]) -> dict[str, Any]:
    """text.format to response_format, which has the schema one level deeper."""
    if member(given, "type", str, "text.format") != "json_schema":
        return given
    return {"type": "json_schema", "json_schema": {name: value for name, value in given.items() if name != "type"}}


def _tool(tool: dict[str, Any], where: str) -> dict[str, Any]:
    kind = member(tool, "type", str, where)
    if kind != "function":
        raise unsupported(f"{where}.type", f"is {kind[:40]!r}; this server runs no tools, it only calls functions")
    return {"type": "function", "function": {k: v for k, v in tool.items() if k != "type" and v is not None}}


def _tool_choice(choice: str | dict[str, Any]) -> Any:
    if isinstance(choice, str):
        return choice
    kind = member(choice, "type", str, "tool_choice")
    if kind != "function":
        raise unsupported("tool_choice", f"of type {kind[:40]!r} is not supported by this server")
    return {"type": "function", "function": {"name": member(choice, "name", str, "tool_choice")}}


def _messages(given: str | list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Items to messages. What the model said and called in one turn stands in one message, as templates expect it."""
    if isinstance(given, str):
        return [{"role": "user", "content": given}]
    messages: list[dict[str, Any]] = []
    thoughts = ""

    def turn(*, new: bool = False) -> dict[str, Any]:
        """The model's message at the end; a new one if somebody else spoke last, or it has thought again."""
        nonlocal thoughts
        if new or thoughts or not messages or messages[-1]["role"] != "assistant":
            messages.append({"role": "assistant", "content": None})
        if thoughts:
            messages[-1]["reasoning_content"], thoughts = thoughts, ""
        return messages[-1]

    for i, item in enumerate(given):
        where = f"input[{i}]"
        kind = item.get("type", "message")
        if kind == "message":
            role, parts = member(item, "role", str, where), text_parts(item.get("content"), f"{where}.content", _PARTS)
            content: Any = parts[0]["text"] if len(parts) == 1 else parts
            if role == "assistant":
                turn(new=bool(messages) and messages[-1].get("content") is not None)["content"] = content
            else:
                messages.append({"role": role, "content": content})
        elif kind == "reasoning":
            told = item.get("content") or member(item, "summary", list, where, [])
            thoughts += "".join(part["text"] for part in text_parts(told, f"{where}.content", _PARTS))
        elif kind == "function_call":
            function = {name: member(item, name, str, where) for name in ("name", "arguments")}
            call = {"id": member(item, "call_id", str, where), "type": "function", "function": function}
            turn().setdefault("tool_calls", []).append(call)
        elif kind == "function_call_output":
            output = text_parts(item.get("output"), f"{where}.output", _PARTS)
            text = "".join(part["text"] for part in output)
            messages.append({"role": "tool", "tool_call_id": member(item, "call_id", str, where), "content": text})
        else:
            raise unsupported(f"{where}.type", f"is {str(kind)[:40]!r}, which this server cannot read")
    if thoughts:
        raise InvalidRequest("a reasoning item must be followed by what the model then said", param="input")
    return messages


def _told(body: ResponsesBody, job: Job) -> Mapping[str, Any]:
    """What a response repeats of its request."""
    params = job.requests[0].params
    return {
        "instructions": body.instructions,
        "max_output_tokens": body.max_output_tokens,
        "max_tool_calls": None,
        "metadata": body.metadata or {},
        "parallel_tool_calls": body.parallel_tool_calls is not False,
        "previous_response_id": None,
        "reasoning": {"effort": body.reasoning.effort if body.reasoning else None, "summary": None},
        "background": False,
        "store": False,
        "temperature": params.temperature,
        "top_p": params.top_p,
        "top_logprobs": body.top_logprobs or 0,
        "text": {"format": (body.text and body.text.format) or {"type": "text"}},
        "tool_choice": body.tool_choice or "auto",
        "tools": body.tools or [],
        "truncation": "disabled",
        "service_tier": "default",
        "user": body.user,
        "safety_identifier": body.safety_identifier,
        "prompt_cache_key": body.prompt_cache_key,
    }


@router.get("/v1/responses/{response_id}", summary="Not here: nothing is stored")
@router.delete("/v1/responses/{response_id}", summary="Not here: nothing is stored", include_in_schema=False)
async def stored_response(response_id: str) -> Response:
    raise ApiError(404, "no responses are stored on this server", param="response_id", code="not_found")
