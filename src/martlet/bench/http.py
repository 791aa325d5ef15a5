"""Streaming clients against any OpenAI-compatible server, timed piece by piece."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Coroutine, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import httpx

from martlet.bench.timeline import Timeline
from martlet.bench.workloads import Workload
from martlet.errors import MartletError

LIMIT = httpx.Timeout(600.0, connect=10.0)
# A connection each request, for every engine: llama-server closes some after a stream without saying so, and a request
# that goes out on such a one is lost.
ALONE = httpx.Limits(max_connections=None, max_keepalive_connections=0)


@dataclass(frozen=True, slots=True)
class Endpoint:
    """A server. url: up to and with /v1. extra: fields that its requests get beside the standard ones."""

    url: str
    model: str
    api_key: str | None = None
    extra: Mapping[str, Any] = field(default_factory=dict)

    @property
    def headers(self) -> dict[str, str]:
        return {"Authorization": f"Bearer {self.api_key}"} if self.api_key else {}


def measure(endpoint: Endpoint, workload: Workload, salt: str = "") -> list[Timeline]:
    """Run a workload once: questions go to /chat/completions, texts to /completions.

    salt: sent as cache_salt, so that runs do not share prefixes; '' sends none, for servers that refuse the field.
    """
    return asyncio.run(_measure(endpoint, workload, {"cache_salt": salt} if salt else {}))


def warm_up(endpoint: Endpoint, workload: Workload, salt: str = "") -> None:
    """One short request, so that what cannot work fails at once and what is loaded lazily is loaded."""
    measure(endpoint, workload._replace(new_tokens=4, chats=workload.chats[:1], texts=workload.texts[:1]), salt)


async def _measure(endpoint: Endpoint, workload: Workload, more: dict[str, Any]) -> list[Timeline]:
    common = {
        "model": endpoint.model,
        "max_tokens": workload.new_tokens,
        "temperature": 0,
        "stream": True,
        "stream_options": {"include_usage": True},
        **endpoint.extra,
        **more,
    }
    if workload.chats:
        path = "chat/completions"
        bodies = [{**common, "messages": [{"role": "user", "content": chat}]} for chat in workload.chats]
    else:
        path, bodies = "completions", [{**common, "prompt": text} for text in workload.texts]
    url = f"{endpoint.url.rstrip('/')}/{path}"
    turn = asyncio.Semaphore(workload.concurrency)
    async with httpx.AsyncClient(timeout=LIMIT, limits=ALONE, headers=endpoint.headers) as client:

        async def one(body: dict[str, Any]) -> Timeline:
            async with turn:
                return await stream(client, url, body)

        return await together(one(body) for body in bodies)


async def together(jobs: Iterable[Coroutine[Any, Any, Timeline]]) -> list[Timeline]:
    """Results of all jobs, in their order; the first error cancels the others and is raised."""
    tasks = [asyncio.ensure_future(job) for job in jobs]
    try:
        return list(await asyncio.gather(*tasks))
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def stream(client: httpx.AsyncClient, url: str, body: dict[str, Any]) -> Timeline:
    """One request. Each event with text counts as one token until the server's usage corrects the sum."""
    timeline = Timeline(time.monotonic(), 0)
    async for event in events(client, url, body):
        now = time.monotonic()
        if event.get("error"):
            raise MartletError(f"{url} failed in mid-stream: {event['error']}")
        for choice in event.get("choices") or ():
            if choice.get("text") or (choice.get("delta") or {}).get("content"):
                timeline.add(now, 1)
        if usage := event.get("usage"):
            timeline.prompt_tokens = usage["prompt_tokens"]
            if timeline.counts:
                timeline.counts[-1] += usage["completion_tokens"] - timeline.new_tokens
    return timeline


async def events(client: httpx.AsyncClient, url: str, body: dict[str, Any]) -> AsyncIterator[dict[str, Any]]:
    """The JSON objects of a server-sent stream. Raises MartletError when the server refuses or cannot be reached."""
    try:
        async with client.stream("POST", url, json=body) as response:
            if response.status_code != 200:
                text = (await response.aread()).decode(errors="replace")
                raise MartletError(f"{url} answered {response.status_code}: {text[:500]}")
            async for line in response.aiter_lines():
                data = line.removeprefix("data:").strip() if line.startswith("data:") else ""
                if data and data != "[DONE]":
                    yield json.loads(data)
    except httpx.HTTPError as error:
        raise MartletError(f"{url}: {type(error).__name__} {error}") from None


def check(timelines: Sequence[Timeline], workload: Workload) -> str | None:
    """What differs from the workload's lengths, or None. Foreign servers need not know ignore_eos."""
    lengths = [t.new_tokens for t in timelines]
    if all(n == workload.new_tokens for n in lengths):
        return None
    mean = sum(lengths) / len(lengths)
    return f"answers had {min(lengths)}-{max(lengths)} tokens (mean {mean:.1f}), not {workload.new_tokens}"
