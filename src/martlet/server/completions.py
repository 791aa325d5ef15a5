"""POST /v1/completions: raw text or token ids, no chat template."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter
from fastapi import Request as HttpRequest
from starlette.responses import Response

from martlet.engine.request import Output, Request
from martlet.runners.base import TokenLogprobs
from martlet.server.answers import Completion, answers
from martlet.server.chunks import ChunkedShape
from martlet.server.generation import Choice, Job, answer
from martlet.server.logprobs import CompletionLogprobs
from martlet.server.prompts import completion_prompts
from martlet.server.routing import JsonRoute
from martlet.server.sampling import check_stream_options, completion_logprobs, extra_fields, sampling_params
from martlet.server.schema import CompletionBody
from martlet.server.service import Service
from martlet.server.structure import answer_grammar

router = APIRouter(route_class=JsonRoute)

DEFAULT_MAX_TOKENS = 16  # OpenAI's


@router.post("/v1/completions", summary="Continue a text", responses=answers(Completion, stream=True))
async def completions(body: CompletionBody, http: HttpRequest) -> Response:
    service: Service = http.app.state.service
    record = http.scope["martlet.record"]
    job = await completion_job(service, body, record.id)
    return await answer(service, job, record, http.receive)


async def completion_job(service: Service, body: CompletionBody, request_id: str) -> Job:
    model = service.model_name(body.model)
    ignored = extra_fields(body) + check_stream_options(body)
    echo = bool(body.echo)
    scoring = echo and body.max_tokens == 0  # only the prompt's log-probabilities are wanted
    logprobs = completion_logprobs(body, service.backend.max_logprobs)
    tokenizer = service.backend.tokenizer
    prompts = await completion_prompts(body.prompt, service)
    longest = max(len(ids) for ids, _ in prompts)
    max_tokens = 1 if scoring else body.max_tokens
    if max_tokens is None:
        max_tokens = max(1, body.min_tokens or 1, min(DEFAULT_MAX_TOKENS, service.backend.max_model_len - longest))
    params = sampling_params(
        body,
        service.defaults,
        max_tokens=max_tokens,
        logprobs=logprobs,
        prompt_logprobs=logprobs if echo else None,
        grammar=await answer_grammar(service.backend, body),
    )
    params.check_vocabulary(service.backend.vocab_size)
    service.check_sequences(len(prompts), params.n)
    service.check_length(longest, 0 if scoring else max_tokens, "prompt")
    name = f"cmpl-{request_id}"
    stream = bool(body.stream)
    requests = [
        Request(f"{name}-{at}", ids, params, body.priority or 0, stream, body.cache_salt, service.adapter(model))
        for at, (ids, _) in enumerate(prompts)
    ]
    hidden = tokenizer.special_ids if params.skip_special_tokens else frozenset()
    return Job(
        id=name,
        model=model,
        requests=requests,
        n=params.n,
        shape=CompletionShape(
            [CompletionLogprobs(tokenizer, logprobs, hidden) for _ in range(len(prompts) * params.n)]
            if logprobs is not None
            else None,
            [
                text
                for ids, given in prompts
                for text in [tokenizer.decode(ids, skip_special=params.skip_special_tokens) if given is None else given]
                * params.n
            ]
            if echo
            else None,
        ),
        stream=stream,
        include_usage=bool(body.stream_options and body.stream_options.include_usage),
        ignored=ignored,
        drop_output=scoring,
    )


class CompletionShape(ChunkedShape):
    """logprobs: one a choice, when asked for. echo: the prompts' texts, one a choice, when asked for."""

    object = "text_completion"
    chunk_object = "text_completion"

    def __init__(self, logprobs: list[CompletionLogprobs] | None, echo: list[str] | None):
        self._logprobs = logprobs
        self._echo = echo
        self._echoed: set[int] = set()

    def choice(self, choice: Choice) -> dict[str, Any]:
        tokens, entries = choice.token_ids, choice.logprobs
        return self._piece(choice, "".join(choice.text), tokens, entries, echo=self._echo is not None)

    def chunks(self, choice: Choice, output: Output) -> list[dict[str, Any]]:
        echo = self._echo is not None and choice.index not in self._echoed
        if not (echo or output.text or choice.finish_reason or (self._logprobs and output.token_ids)):
            return []
        self._echoed.add(choice.index)
        return [self._piece(choice, output.text, output.token_ids, output.logprobs or [], echo=echo)]

    def _piece(
        self, choice: Choice, text: str, tokens: list[int], entries: list[TokenLogprobs], *, echo: bool
    ) -> dict[str, Any]:
        if echo and self._echo is not None:
            text = self._echo[choice.index] + text
            if self._logprobs is not None:
                tokens = [*choice.request.prompt_token_ids, *tokens]
                entries = [*(choice.prompt_logprobs or ()), *entries]
        logprobs = None if self._logprobs is None else self._logprobs[choice.index].block(tokens, entries)
        piece = {"index": choice.index, "text": text, "logprobs": logprobs, "finish_reason": choice.finish_reason}
        return piece if choice.stop_reason is None else piece | {"stop_reason": choice.stop_reason}
