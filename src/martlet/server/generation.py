"""The core that every generating endpoint shares: requests into the backend, outputs into choices, usage at the end.

An endpoint brings a Job: engine requests and a Shape, which knows how its JSON and its events look. Whatever
happens to the HTTP request (its client leaves, a prompt fails, the server is told to stop), `Running.close` frees what
is left.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from martlet.chat import Delta, Parser, Reply
from martlet.engine.request import Output, Request
from martlet.runners.base import TokenLogprobs
from martlet.server.errors import ApiError, Problem, describe
from martlet.server.record import Record
from martlet.server.routing import gone, ignored_header, json_answer, leaves
from martlet.server.service import Service


class ClientGone(Exception):
    """The client closed its connection; nobody is left to answer."""


@dataclass(slots=True)
class Choice:
    """One continuation as far as it has come. index counts over all prompts: prompt number times n plus sequence.

    Of an answer in a conversation: deltas, what the last output brought; reply, everything so far; and a finish_reason
    of "stop" that ends with tool calls is "tool_calls". Of other texts: text.
    """

    index: int
    request: Request
    parser: Parser | None = None
    deltas: list[Delta] = field(default_factory=list)
    reply: Reply = field(default_factory=Reply)
    text: list[str] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    prompt_logprobs: list[TokenLogprobs | None] | None = None
    finish_reason: str | None = None
    stop_reason: str | int | None = None
    begun: bool = False
    last_time: float = 0.0


class Shape(Protocol):
    """How an endpoint's answers look: a whole `body`, or the bytes of a stream, from `begin` to `end` or `failed`."""

    def body(self, job: Job, choices: list[Choice], usage: Usage) -> dict[str, Any]: ...

    def begin(self, job: Job) -> bytes:
        """Before anything has come."""
        ...

    def news(self, job: Job, choice: Choice, output: Output) -> bytes:
        """What `output` adds to `choice`; may be nothing."""
        ...

    def end(self, job: Job, choices: list[Choice], usage: Usage) -> bytes:
        """After the last output of all choices."""
        ...

    def failed(self, job: Job, problem: Problem) -> bytes:
        """Instead of the rest."""
        ...


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens. cached: those of the prompt that the prefix cache gave. reasoning: those of the output's thoughts."""

    prompt: int
    output: int
    cached: int
    reasoning: int = 0


@dataclass(slots=True)
class Job:
    """A validated request: what to run, and how to answer. parser: makes one for each answer of a conversation."""

    id: str
    model: str
    requests: list[Request]
    n: int
    shape: Shape
    parser: Callable[[], Parser] | None = None
    stream: bool = False
    include_usage: bool = False
    ignored: list[str] = field(default_factory=list)
    own_stops: frozenset[str | int] = frozenset()  # stops that the template added: no stop_reason for the client
    drop_output: bool = False  # max_tokens 0: one token had to be computed, nobody asked for it
    created: int = field(default_factory=lambda: int(time.time()))


class Running:
    """A job in the backend, read by one coroutine."""

    def __init__(self, service: Service, job: Job, record: Record, receive: Receive):
        self.job = job
        self.choices = [
            Choice(r * job.n + s, request, job.parser and job.parser())
            for r, request in enumerate(job.requests)
            for s in range(job.n)
        ]
        self._service = service
        self._record = record
        self._numbers = {request.id: r for r, request in enumerate(job.requests)}
        self._open = set(self._numbers)
        self._prompt_logprobs: dict[int, list[TokenLogprobs | None]] = {}
        params = job.requests[0].params  # but for their prompts, all requests of a job are alike
        record.model, record.stream, record.n, record.prompts = job.model, job.stream, job.n, len(job.requests)
        record.max_tokens = params.max_tokens
        record.prompt_tokens = sum(len(request.prompt_token_ids) for request in job.requests)
        eos = () if params.ignore_eos else service.backend.tokenizer.eos_ids
        self._ends = frozenset((*eos, *params.stop_token_ids))
        self._inbox = service.dispatcher.open(self._open)
        try:
            service.backend.submit(job.requests, service.dispatcher)
        except BaseException:
            service.dispatcher.forget(self._open)
            self._open.clear()
            raise
        self._watcher = asyncio.ensure_future(self._watch(receive))
        self._deadline: asyncio.TimerHandle | None = None
        if (seconds := service.limits.request_seconds) is not None:
            self._deadline = asyncio.get_running_loop().call_later(seconds, self._inbox.fail, _too_slow(seconds))

    @property
    def open(self) -> bool:
        """Some choices have not ended."""
        return bool(self._open)

    def outputs(self) -> Awaitable[list[Output]]:
        """What has come, to be taken one by one. Raises ClientGone, or that the request took too long."""
        return self._inbox.get()

    def close(self) -> None:
        """Idempotent."""
        reasons = {choice.finish_reason or "stop" for choice in self.choices}
        self._record.finish = self._record.finish or ("abort" if self._open else "+".join(sorted(reasons)))
        if self._open:
            self._service.backend.abort(list(self._open))
            self._open.clear()
        self._service.dispatcher.forget(self._numbers)
        self._watcher.cancel()
        if self._deadline is not None:
            self._deadline.cancel()

    def usage(self) -> Usage:
        record, encode = self._record, self._service.backend.tokenizer.encode
        reasoning = sum(len(encode(choice.reply.reasoning)) for choice in self.choices if choice.reply.reasoning)
        return Usage(record.prompt_tokens, record.output_tokens, record.cached_tokens, reasoning)

    def take(self, output: Output) -> Choice:
        """The choice that `output` belongs to, with what it brings. Raises what went wrong in the backend."""
        number = self._numbers[output.request_id]
        choice = self.choices[number * self.job.n + output.index]
        if output.last:
            self._open.discard(output.request_id)
        if output.finish_reason == "error":
            raise output.error or RuntimeError("the backend gave an error without a cause")
        if output.finish_reason == "abort":
            raise ApiError(503, "The request was stopped: the server is shutting down.", code="shutting_down")
        if not choice.begun:
            self._begin(choice, number, output)
        choice.finish_reason = output.finish_reason
        choice.stop_reason = None if output.stop_reason in self.job.own_stops else output.stop_reason
        if self.job.drop_output:
            output.token_ids, output.text, output.logprobs = [], "", output.logprobs and []
            choice.finish_reason = choice.finish_reason and "length"
        self._record.output_tokens += len(output.token_ids)
        if output.finish_reason == "stop" and output.token_ids and output.token_ids[-1] in self._ends:
            # Generated and counted, but no part of the text: OpenAI's log-probabilities end with the text.
            del output.token_ids[-1:]
            output.logprobs = output.logprobs and output.logprobs[:-1]
        if choice.parser is not None:
            self._parse(choice, choice.parser, output.text)
        if self.job.stream:
            self._time(choice, output)
        else:
            choice.text.append(output.text)
            choice.token_ids += output.token_ids
            choice.logprobs += output.logprobs or ()
        return choice

    def _begin(self, choice: Choice, number: int, output: Output) -> None:
        """Take what the first output of a choice tells of its prompt."""
        choice.begun = True
        if output.queued is not None:
            self._record.queued = max(self._record.queued or 0.0, output.queued)
        if output.index == 0:  # what the others share with it is not the cache's merit
            self._record.cached_tokens += output.cached_tokens
        if output.prompt_logprobs is not None:  # with the first output of a request, for all its sequences
            self._prompt_logprobs[number] = output.prompt_logprobs
        choice.prompt_logprobs = self._prompt_logprobs.get(number)

    @staticmethod
    def _parse(choice: Choice, parser: Parser, text: str) -> None:
        choice.deltas = parser.feed(text)
        if choice.finish_reason:
            choice.deltas += parser.finish()
        choice.reply.add(choice.deltas)
        if choice.finish_reason == "stop" and choice.reply.calls:
            choice.finish_reason = "tool_calls"

    def _time(self, choice: Choice, output: Output) -> None:
        if not output.token_ids:
            return
        now = time.perf_counter()
        if self._record.first_token is None:
            self._record.first_token = now
        if choice.last_time:
            self._service.metrics.inter_token.observe((now - choice.last_time) / len(output.token_ids))
        choice.last_time = now

    async def _watch(self, receive: Receive) -> None:
        await leaves(receive)
        self._inbox.fail(ClientGone())


async def answer(service: Service, job: Job, record: Record, receive: Receive) -> Response:
    """Run a job and answer it: at once as one JSON object, or as a stream of events."""
    running = Running(service, job, record, receive)
    if job.stream:
        return EventStream(running, record)
    try:
        while running.open:
            for output in await running.outputs():
                running.take(output)
    except ClientGone:
        return gone()
    except Exception:
        record.finish = "error"
        raise
    finally:
        running.close()
    return json_answer(job.shape.body(job, running.choices, running.usage()), ignored=job.ignored)


class EventStream(Response):
    """Server-sent events: one write a wake-up, an error as an event of its own, the end only after a whole answer.

    The head waits for the first event, so that what fails before it has a status of its own.
    """

    def __init__(self, running: Running, record: Record):
        headers = {"cache-control": "no-cache"} | ignored_header(running.job.ignored)
        super().__init__(None, headers=headers, media_type="text/event-stream")
        del self.headers["content-length"]
        self._running = running
        self._record = record

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        running, job = self._running, self._running.job
        shape = job.shape
        began = False
        send_body = scope.get("martlet.send", send)  # nobody in between has a say in the middle of an answer

        async def write(events: bytes, *, last: bool = False) -> None:
            nonlocal began
            if events and not began:
                began = True
                await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            if events or last:
                await send_body({"type": "http.response.body", "body": events, "more_body": not last})

        try:
            events = shape.begin(job)
            while running.open:
                await write(events)
                news = await running.outputs()
                events = b"".join([shape.news(job, running.take(output), output) for output in news])
            await write(events + shape.end(job, running.choices, running.usage()), last=True)
        except ClientGone:
            return
        except Exception as error:
            self._record.finish = "error"
            if not began:
                raise
            await write(shape.failed(job, describe(error, self._record.id)), last=True)
        finally:
            running.close()


def _too_slow(seconds: float) -> ApiError:
    return ApiError(
        503,
        f"The request took longer than the {seconds:g} s that this server gives; ask for fewer tokens, or try later.",
        code="deadline_exceeded",
        headers={"retry-after": "5"},
    )
