"""What the endpoints answer, for the OpenAPI document: the fields that are always there, and their types."""

from __future__ import annotations

from typing import Any, Literal

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel


class Answer(BaseModel):
    """More fields may stand beside those named."""


class Usage(Answer):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class ChatMessage(Answer):
    role: Literal["assistant"]
    content: str | None


class ChatChoice(Answer):
    index: int
    message: ChatMessage
    logprobs: dict[str, Any] | None
    finish_reason: Literal["stop", "length", "tool_calls", "function_call"]


class ChatCompletion(Answer):
    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage


class CompletionChoice(Answer):
    index: int
    text: str
    logprobs: dict[str, Any] | None
    finish_reason: Literal["stop", "length"]


class Completion(Answer):
    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage


class ResponseUsage(Answer):
    input_tokens: int
    input_tokens_details: dict[str, int]
    output_tokens: int
    output_tokens_details: dict[str, int]
    total_tokens: int


class Item(Answer):
    id: str
    type: Literal["message", "reasoning", "function_call"]
    status: Literal["completed", "incomplete"]


class ResponseObject(Answer):
    id: str
    object: Literal["response"]
    created_at: int
    status: Literal["completed", "incomplete"]
    model: str
    output: list[Item]
    usage: ResponseUsage


class Block(Answer):
    type: Literal["text", "thinking", "tool_use"]


class MessageUsage(Answer):
    input_tokens: int
    output_tokens: int


class Message(Answer):
    id: str
    type: Literal["message"]
    role: Literal["assistant"]
    model: str
    content: list[Block]
    stop_reason: Literal["end_turn", "max_tokens", "stop_sequence", "tool_use"]
    stop_sequence: str | None
    usage: MessageUsage


class TokenCount(Answer):
    input_tokens: int


class Embedding(Answer):
    object: Literal["embedding"]
    index: int
    embedding: list[float] | str


class Embeddings(Answer):
    object: Literal["list"]
    data: list[Embedding]
    model: str


class ModelCard(Answer):
    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    root: str
    parent: str | None
    max_model_len: int


class ModelList(Answer):
    object: Literal["list"]
    data: list[ModelCard]


class Tokens(Answer):
    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None


class Text(Answer):
    prompt: str


class State(Answer):
    status: str


class Version(Answer):
    version: str


class Error(Answer):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorAnswer(Answer):
    error: Error


class AnthropicError(Answer):
    type: str
    message: str


class AnthropicErrorAnswer(Answer):
    type: Literal["error"]
    error: AnthropicError
    request_id: str


_STREAM = {"text/event-stream": {"schema": {"type": "string"}}}


def answers(model: type[Answer], *, stream: bool = False) -> dict[int | str, dict[str, Any]]:
    """`responses` of a route: its answer, as one object or also as events."""
    return {200: {"model": model} | ({"content": _STREAM} if stream else {})}


def document(app: FastAPI) -> dict[str, Any]:
    """The application's OpenAPI document, with our errors instead of FastAPI's."""
    if app.openapi_schema is None:
        found = get_openapi(title=app.title, version=app.version, routes=app.routes)
        schemas = found["components"]["schemas"]
        for unused in ("HTTPValidationError", "ValidationError"):
            schemas.pop(unused, None)
        for path, methods in found["paths"].items():
            shape = AnthropicErrorAnswer if path.startswith("/v1/messages") else ErrorAnswer
            schemas[shape.__name__] = shape.model_json_schema(ref_template="#/components/schemas/{model}")
            schemas |= schemas[shape.__name__].pop("$defs", {})
            ref = {"schema": {"$ref": f"#/components/schemas/{shape.__name__}"}}
            for operation in methods.values():
                operation["responses"].pop("422", None)
                operation["responses"] |= {
                    status: {"description": text, "content": {"application/json": ref}}
                    for status, text in (("4XX", "The request is at fault"), ("5XX", "The server is"))
                    if status not in operation["responses"]
                }
        app.openapi_schema = found
    return app.openapi_schema
