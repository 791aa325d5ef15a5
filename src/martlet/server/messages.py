"""POST /v1/messages and /v1/messages/count_tokens: Anthropic's API over the same core."""

from __future__ import annotations

import dataclasses
import json
from typing import Annotated, Any, Literal

from fastapi import APIRouter
from fastapi import Request as HttpRequest
from pydantic import Field
from starlette.responses import Response

from martlet.errors import InvalidRequest
from martlet.server.answers import Message, TokenCount, answers
from martlet.server.chat import chat_prompt
from martlet.server.errors import unsupported
from martlet.server.generation import answer
from martlet.server.message_blocks import MessageShape
from martlet.server.routing import JsonRoute, json_answer
from martlet.server.sampling import extra_fields
from martlet.server.schema import MAX_MESSAGES, Body, ChatBody, SamplingBody, Strings
from martlet.server.service import Service
from martlet.server.translation import member, shared_fields, text_parts, told_as, translated_job

router = APIRouter(route_class=JsonRoute)

Blocks = Annotated[list[dict[str, Any]], Field(fail_fast=True)]


class Turn(Body):
    role: Literal["user", "assistant", "system"]
    content: str | Blocks


class CountBody(SamplingBody):
    messages: Annotated[list[Turn], Field(fail_fast=True, max_length=MAX_MESSAGES)]
    system: str | Blocks | None = None
    tools: Blocks | None = None
    tool_choice: dict[str, Any] | None = None
    metadata: dict[str, Any] | None = None
    thinking: dict[str, Any] | None = None
    cache_control: dict[str, Any] | None = None  # prefixes are cached anyway


class MessagesBody(CountBody):
    max_tokens: int
    stop_sequences: Strings | None = None


# What this server cannot honour, with the values besides null that ask for nothing.
_UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "container": (),
    "context_management": (),
    "diagnostics": (),
    "inference_geo": (),
    "mcp_servers": ([],),
    "output_config": ({},),
    "service_tier": ("auto", "standard_only"),
    "speed": ("standard",),
    "user_profile_id": (),
    "workspace_id": (),
    "n": (1,),
    "stop": (),
    "stream_options": (),
    "logprobs": (False,),
    "top_logprobs": (),
    "max_completion_tokens": (),
}
_NAMES = {
    "stop": "stop_sequences",
    "chat_template_kwargs": "thinking",
    "max_completion_tokens": "max_tokens",
    "tools.parameters": "input_schema",
}


@router.post(
    "/v1/messages", summary="Answer a conversation, in Anthropic's shape", responses=answers(Message, stream=True)
)
async def messages(body: MessagesBody, http: HttpRequest) -> Response:
    service: Service = http.app.state.service
    record = http.scope["martlet.record"]
    chat = _chat(service, body) | {"max_completion_tokens": body.max_tokens}
    if body.stop_sequences:
        chat["stop"] = body.stop_sequences
    job = await translated_job(service, chat, record.id, _NAMES)
    shape = MessageShape(tuple(body.stop_sequences or ()))
    return await answer(service, dataclasses.replace(job, id=f"msg_{record.id}", shape=shape), record, http.receive)


@router.post(
    "/v1/messages/count_tokens", summary="How many tokens a conversation is to the model", responses=answers(TokenCount)
)
async def count_tokens(body: CountBody, http: HttpRequest) -> Response:
    service: Service = http.app.state.service
    with told_as(_NAMES):
        chat = ChatBody.model_validate(_chat(service, body))
        ignored = extra_fields(chat)
        ids = await chat_prompt(service, chat)
    return json_answer({"input_tokens": len(ids)}, ignored=ignored)


def _chat(service: Service, body: CountBody) -> dict[str, Any]:
    chat = shared_fields(body, _UNSUPPORTED)
    if body.thinking is not None:
        thinks = service.template is not None and service.template.reasoning is not None
        kind = member(body.thinking, "type", str, "thinking")
        if kind == "disabled" and thinks:
            chat["chat_template_kwargs"] = {"enable_thinking": False}
        elif kind != "disabled" and not (kind == "adaptive" and thinks):
            raise unsupported("thinking", "may be disabled, or adaptive where the model thinks, on this server")
    turns = _turns(body)
    chat["messages"] = turns
    if turns and turns[-1]["role"] == "assistant":  # what the answer is to begin with
        chat["continue_final_message"] = True
    if body.tools:
        chat["tools"] = [_tool(tool, f"tools[{i}]") for i, tool in enumerate(body.tools)]
    if body.tool_choice is not None:
        chat["tool_choice"] = _tool_choice(body.tool_choice)
        if member(body.tool_choice, "disable_parallel_tool_use", bool, "tool_choice", False):
            chat["parallel_tool_calls"] = False
    return chat


def _turns(body: CountBody) -> list[dict[str, Any]]:
    turns: list[dict[str, Any]] = []
    if body.system:
        turns.append({"role": "system", "content": _text(body.system, "system")})
    for i, turn in enumerate(body.messages):
        where = f"messages[{i}].content"
        if isinstance(turn.content, str) or turn.role == "system":
            turns.append({"role": turn.role, "content": _text(turn.content, where)})
        else:
            turns += _said(turn.content, where) if turn.role == "assistant" else _heard(turn.content, where)
    return turns


def _said(blocks: list[dict[str, Any]], where: str) -> list[dict[str, Any]]:
    """A turn of the model: text, thoughts and calls."""
    text: list[dict[str, Any]] = []
    thoughts, calls = "", []
    for at, block in _placed(blocks, where):
        kind = member(block, "type", str, at)
        if kind == "thinking":
            thoughts += member(block, "thinking", str, at)
        elif kind == "tool_use":
            arguments = json.dumps(member(block, "input", dict, at), ensure_ascii=False)
            function = {"name": member(block, "name", str, at), "arguments": arguments}
            calls.append({"id": member(block, "id", str, at), "type": "function", "function": function})
        else:
            text.append(block)
    turn: dict[str, Any] = {"role": "assistant", "content": _text(text, where) if text else None}
    if thoughts:
        turn["reasoning_content"] = thoughts
    if calls:
        turn["tool_calls"] = calls
    return [turn]


def _heard(blocks: list[dict[str, Any]], where: str) -> list[dict[str, Any]]:
    """A turn of the user: results of calls first, each a message of its own, then the text."""
    results, text = [], []
    for at, block in _placed(blocks, where):
        if member(block, "type", str, at) == "tool_result":
            said = _text(block.get("content") or "", f"{at}.content")
            said = f"Error: {said}" if member(block, "is_error", bool, at, False) else said
            results.append({"role": "tool", "tool_call_id": member(block, "tool_use_id", str, at), "content": said})
        else:
            text.append(block)
    return results + ([{"role": "user", "content": _text(text, where)}] if text or not results else [])


def _placed(blocks: list[dict[str, Any]], where: str) -> list[tuple[str, dict[str, Any]]]:
    return [(f"{where}[{i}]", block) for i, block in enumerate(blocks)]


def _text(content: str | list[dict[str, Any]], where: str) -> Any:
    parts = text_parts(content, where, {"text": "text"})
    return parts[0]["text"] if len(parts) == 1 else parts


def _tool(tool: dict[str, Any], where: str) -> dict[str, Any]:
    kind = member(tool, "type", str, where, "custom")
    if kind != "custom":
        raise unsupported(f"{where}.type", f"is {kind[:40]!r}; this server runs no tools, it only calls the client's")
    function = {"name": member(tool, "name", str, where), "parameters": member(tool, "input_schema", dict, where)}
    if tool.get("description") is not None:
        function["description"] = member(tool, "description", str, where)
    if tool.get("strict") is not None:
        function["strict"] = member(tool, "strict", bool, where)
    return {"type": "function", "function": function}


def _tool_choice(choice: dict[str, Any]) -> Any:
    kind = member(choice, "type", str, "tool_choice")
    if kind == "tool":
        return {"type": "function", "function": {"name": member(choice, "name", str, "tool_choice")}}
    words = {"auto": "auto", "any": "required", "none": "none"}
    if kind not in words:
        raise InvalidRequest("tool_choice.type must be auto, any, tool or none", param="tool_choice.type")
    return words[kind]
