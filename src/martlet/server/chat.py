"""POST /v1/chat/completions."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter
from fastapi import Request as HttpRequest
from starlette.responses import Response

from martlet.chat import CallStart, Content, Delta, Reasoning, Template
from martlet.engine.request import Output, Request
from martlet.errors import InvalidRequest
from martlet.hub.tokenizer import Tokenizer
from martlet.server.answering import answering
from martlet.server.answers import ChatCompletion, answers
from martlet.server.chunks import ChunkedShape
from martlet.server.errors import ApiError
from martlet.server.generation import Choice, Job, answer
from martlet.server.logprobs import chat_entries
from martlet.server.prompts import characters, chat_messages, off_loop, prompt_style
from martlet.server.routing import JsonRoute
from martlet.server.sampling import (
    asked_stops,
    chat_logprobs,
    chat_max_tokens,
    check_stream_options,
    extra_fields,
    sampling_params,
)
from martlet.server.schema import ChatBody
from martlet.server.service import Service
from martlet.server.structure import answer_grammar, calls_grammar
from martlet.server.tools import Tools, read_tools

router = APIRouter(route_class=JsonRoute)


@router.post("/v1/chat/completions", summary="Continue a conversation", responses=answers(ChatCompletion, stream=True))
async def chat_completions(body: ChatBody, http: HttpRequest) -> Response:
    service: Service = http.app.state.service
    record = http.scope["martlet.record"]
    job = await chat_job(service, body, record.id)
    return await answer(service, job, record, http.receive)


async def chat_job(service: Service, body: ChatBody, request_id: str) -> Job:
    model = service.model_name(body.model)
    ignored = extra_fields(body) + check_stream_options(body)
    template = chat_template(service, model)
    logprobs = chat_logprobs(body, service.backend.max_logprobs)
    max_tokens = chat_max_tokens(body)
    tools = read_tools(body)
    ids = await chat_prompt(service, body, tools)
    tokenizer = service.backend.tokenizer
    reading = answering(template, tokenizer, ids, tools)
    stop = (*template.stop, *reading.stop)
    grammar = await answer_grammar(service.backend, body)
    if tools.callable and not (tools.choice == "auto" and body.ignore_eos):  # which no grammar can do
        grammar = await calls_grammar(service.backend, tools, reading, grammar)
    params = sampling_params(
        body,
        service.defaults,
        ends=(template.stop_ids, stop),
        max_tokens=max_tokens,
        logprobs=logprobs,
        shown_token_ids=reading.shown,
        grammar=grammar,
    )
    params.check_vocabulary(service.backend.vocab_size)
    service.check_length(len(ids), max_tokens, "messages")
    name = f"chatcmpl-{request_id}"
    stream = bool(body.stream)
    request = Request(name, ids, params, body.priority or 0, stream, body.cache_salt, service.adapter(model))
    return Job(
        id=name,
        model=model,
        requests=[request],
        n=params.n,
        shape=ChatShape(
            tokenizer,
            wants_logprobs=logprobs is not None,
            wants_reasoning=body.include_reasoning is not False,
            legacy=tools.legacy,
        ),
        parser=reading.parser,
        stream=stream,
        include_usage=bool(body.stream_options and body.stream_options.include_usage),
        ignored=ignored,
        own_stops=frozenset((*template.stop_ids, *stop)) - asked_stops(body),
    )


def chat_template(service: Service, model: str) -> Template:
    if service.template is None:
        raise ApiError(400, f"{model} has no chat template; use /v1/completions", param="model")
    return service.template


async def chat_prompt(service: Service, body: ChatBody, tools: Tools | None = None) -> list[int]:
    """Token ids of a conversation. tools: of the body, if they have been read."""
    listed = (tools or read_tools(body)).listed
    template = chat_template(service, service.model_name(body.model))
    messages = chat_messages(body)
    size = characters((messages, listed))
    service.check_characters(size, "messages")
    style = prompt_style(body)
    ids = await off_loop(size, lambda: template.render(messages, tools=listed, **style))
    if not ids:
        raise InvalidRequest("messages make an empty prompt", param="messages")
    return ids


class ChatShape(ChunkedShape):
    """legacy: calls are told as the one function_call of the API before tools."""

    object = "chat.completion"
    chunk_object = "chat.completion.chunk"

    def __init__(
        self, tokenizer: Tokenizer, *, wants_logprobs: bool, wants_reasoning: bool = True, legacy: bool = False
    ):
        self._tokenizer = tokenizer
        self._wants_logprobs = wants_logprobs
        self._wants_reasoning = wants_reasoning
        self._legacy = legacy
        self._started: set[int] = set()

    def choice(self, choice: Choice) -> dict[str, Any]:
        reply = choice.reply
        content = None if reply.calls and not reply.content else reply.content
        message = {"role": "assistant", "content": content, "refusal": None}
        if reply.reasoning and self._wants_reasoning:
            message |= _thoughts(reply.reasoning)
        if reply.calls and self._legacy:
            message["function_call"] = {"name": reply.calls[0].name, "arguments": reply.calls[0].arguments}
        elif reply.calls:
            message["tool_calls"] = [
                {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
                for call in reply.calls
            ]
        answer = {"index": choice.index, "message": message, "logprobs": self._logprobs(choice.logprobs)}
        return answer | self._finish(choice)

    def chunks(self, choice: Choice, output: Output) -> list[dict[str, Any]]:
        pieces = []
        if choice.index not in self._started:  # the role comes once, before the text
            self._started.add(choice.index)
            pieces.append(self._piece(choice, {"role": "assistant", "content": ""}, None))
        news = [self._delta(delta) for delta in choice.deltas if self._tells(delta)]
        if self._wants_logprobs and output.token_ids:  # they go with the text that their tokens brought, if any
            news = news or [{"content": ""}]
            pieces.append(self._piece(choice, news.pop(0), self._logprobs(output.logprobs)))
        pieces += [self._piece(choice, delta, None) for delta in news]
        if choice.finish_reason:  # clients print delta.content as it comes: empty text rather than none
            last = {} if choice.reply.calls else {"content": ""}
            pieces.append(self._piece(choice, last, None) | self._finish(choice))
        return pieces

    def _tells(self, delta: Delta) -> bool:
        return self._wants_reasoning or not isinstance(delta, Reasoning)

    def _delta(self, delta: Delta) -> dict[str, Any]:
        if isinstance(delta, Content):
            return {"content": delta.text}
        if isinstance(delta, Reasoning):
            return _thoughts(delta.text)
        starts = isinstance(delta, CallStart)
        function = {"name": delta.name, "arguments": ""} if starts else {"arguments": delta.text}
        if self._legacy:
            return {"function_call": function}
        head = {"id": delta.id, "type": "function"} if starts else {}
        return {"tool_calls": [{"index": delta.index, **head, "function": function}]}

    def _finish(self, choice: Choice) -> dict[str, Any]:
        calls = choice.finish_reason == "tool_calls"
        reason = {"finish_reason": "function_call" if calls and self._legacy else choice.finish_reason}
        return reason if choice.stop_reason is None else reason | {"stop_reason": choice.stop_reason}

    def _piece(self, choice: Choice, delta: dict[str, Any], logprobs: dict[str, Any] | None) -> dict[str, Any]:
        return {"index": choice.index, "delta": delta, "logprobs": logprobs, "finish_reason": None}

    def _logprobs(self, entries: Any) -> dict[str, Any] | None:
        if not self._wants_logprobs:
            return None
        return {"content": chat_entries(self._tokenizer, entries or ()), "refusal": None}


def _thoughts(text: str) -> dict[str, Any]:
    """Under both names that clients look for: DeepSeek's and vLLM's."""
    return {"reasoning_content": text, "reasoning": text}
