"""A small typed client for any server that speaks OpenAI's API; it needs no field that only ours has.

client = Client("http://127.0.0.1:8000/v1")
model = client.models().data[0].id
print(client.chat([{"role": "user", "content": "Hello!"}], model=model).choices[0].message.content)
for chunk in client.chat([...], model=model, stream=True):
    print(chunk.choices[0].delta.content, end="")
"""

from __future__ import annotations

import functools
import json
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any, Literal, TypeVar, get_args, get_type_hints, overload

import httpx

from martlet.errors import InvalidRequest, MartletError, ModelNotFound, Overloaded, UsageError

DEFAULT_URL = "http://127.0.0.1:8000/v1"
_ERRORS = {
    400: InvalidRequest,
    401: UsageError,
    403: UsageError,
    404: ModelNotFound,
    422: InvalidRequest,
    429: Overloaded,
}


@dataclass(slots=True)
class Model:
    """is_chat: whether the model takes messages; some servers say, most do not (None)."""

    id: str = ""
    object: str = "model"
    created: int = 0
    owned_by: str = ""
    max_model_len: int | None = None
    is_chat: bool | None = None


@dataclass(slots=True)
class ModelList:
    data: list[Model] = field(default_factory=list)
    object: str = "list"


@dataclass(slots=True)
class Usage:
    prompt_tokens: int = 0
    completion_tokens: int = 0
    total_tokens: int = 0


@dataclass(slots=True)
class CalledFunction:
    """arguments: JSON text. In a delta: the name comes once, the arguments piece by piece."""

    name: str = ""
    arguments: str = ""


@dataclass(slots=True)
class ToolCall:
    """index: of the call in its message; only deltas have one."""

    index: int | None = None
    id: str = ""
    type: str = "function"
    function: CalledFunction = field(default_factory=CalledFunction)


@dataclass(slots=True)
class Delta:
    """What a chunk adds to a message. content is "" in chunks without text, so that it can always be printed."""

    role: str | None = None
    content: str = ""
    tool_calls: list[ToolCall] | None = None
    reasoning_content: str | None = None


@dataclass(slots=True)
class Message:
    """content is None only beside tool_calls."""

    role: str = "assistant"
    content: str | None = None
    tool_calls: list[ToolCall] | None = None
    reasoning_content: str | None = None

    def add(self, delta: Delta) -> None:
        """Put a delta behind what is there: Message() and all deltas of a choice make its message."""
        if delta.content:
            self.content = (self.content or "") + delta.content
        if delta.reasoning_content:
            self.reasoning_content = (self.reasoning_content or "") + delta.reasoning_content
        for piece in delta.tool_calls or ():
            self.tool_calls = self.tool_calls or []
            if piece.index is None or piece.index >= len(self.tool_calls):
                self.tool_calls.append(ToolCall(None, piece.id, piece.type))
            call = self.tool_calls[-1 if piece.index is None else piece.index]
            call.id = call.id or piece.id
            call.function.name += piece.function.name
            call.function.arguments += piece.function.arguments

    def told(self) -> dict[str, Any]:
        """As a message of the next request."""
        told: dict[str, Any] = {"role": self.role, "content": self.content}
        if self.tool_calls:
            told["tool_calls"] = [
                {"id": c.id, "type": c.type, "function": {"name": c.function.name, "arguments": c.function.arguments}}
                for c in self.tool_calls
            ]
        return told


@dataclass(slots=True)
class _Choice:
    index: int = 0
    finish_reason: str | None = None
    logprobs: dict[str, Any] | None = None


@dataclass(slots=True)
class ChatChoice(_Choice):
    message: Message = field(default_factory=Message)


@dataclass(slots=True)
class ChunkChoice(_Choice):
    delta: Delta = field(default_factory=Delta)


@dataclass(slots=True)
class TextChoice(_Choice):
    text: str = ""


@dataclass(slots=True)
class _Answer:
    """usage: None where it was not told; of streams, the last chunk tells it when asked to."""

    id: str = ""
    model: str = ""
    created: int = 0
    usage: Usage | None = None


@dataclass(slots=True)
class ChatCompletion(_Answer):
    choices: list[ChatChoice] = field(default_factory=list)
    object: str = "chat.completion"


@dataclass(slots=True)
class ChatChunk(_Answer):
    choices: list[ChunkChoice] = field(default_factory=list)
    object: str = "chat.completion.chunk"


@dataclass(slots=True)
class Completion(_Answer):
    """An answer of the completions API, or one chunk of its stream."""

    choices: list[TextChoice] = field(default_factory=list)
    object: str = "text_completion"


T = TypeVar("T")
Prompt = str | Sequence[str] | Sequence[int] | Sequence[Sequence[int]]
Messages = Sequence[Mapping[str, Any]]


class _Connection:
    """What both clients share: where the server is, and reading what it says."""

    def __init__(self, base_url: str = DEFAULT_URL, *, api_key: str | None = None, timeout: float = 300.0):
        """base_url: as in OpenAI's client, with /v1. timeout: seconds without a byte from the server."""
        self.base_url = base_url.rstrip("/")
        self._headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        self._timeout = httpx.Timeout(timeout, connect=10.0)

    def _url(self, path: str) -> str:
        return f"{self.base_url}/{path}"

    def _fault(self, error: Exception) -> MartletError:
        if isinstance(error, httpx.ConnectError):
            return MartletError(
                f"no server answers at {self.base_url}; `martlet deploy --model NAME --port PORT` starts one"
            )
        if isinstance(error, httpx.TimeoutException):
            return MartletError(f"{self.base_url} did not answer within {self._timeout.read:g} s")
        return MartletError(f"talking to {self.base_url} failed: {type(error).__name__}: {error}")


class Client(_Connection):
    """A blocking client. Every method raises MartletError with the server's own words when it refuses.

    Further keyword arguments of chat and completions are fields of the request (temperature, max_tokens, ...).
    """

    def __init__(self, base_url: str = DEFAULT_URL, *, api_key: str | None = None, timeout: float = 300.0):
        super().__init__(base_url, api_key=api_key, timeout=timeout)
        self._http = httpx.Client(headers=self._headers, timeout=self._timeout)

    def models(self) -> ModelList:
        return _read(ModelList, self._send("GET", "models"))

    @overload
    def chat(
        self, messages: Messages, *, model: str, stream: Literal[False] = ..., **fields: Any
    ) -> ChatCompletion: ...
    @overload
    def chat(self, messages: Messages, *, model: str, stream: Literal[True], **fields: Any) -> Iterator[ChatChunk]: ...
    def chat(self, messages: Messages, *, model: str, stream: bool = False, **fields: Any) -> Any:
        """Answer a conversation; with stream=True an iterator of what comes, which may be left early."""
        body = {"model": model, "messages": list(messages), **fields}
        if stream:
            return self._stream(ChatChunk, "chat/completions", body)
        return _read(ChatCompletion, self._send("POST", "chat/completions", body))

    @overload
    def completions(self, prompt: Prompt, *, model: str, stream: Literal[False] = ..., **fields: Any) -> Completion: ...
    @overload
    def completions(
        self, prompt: Prompt, *, model: str, stream: Literal[True], **fields: Any
    ) -> Iterator[Completion]: ...
    def completions(self, prompt: Prompt, *, model: str, stream: bool = False, **fields: Any) -> Any:
        """Go on with a text (or token ids, or a list of either), without a chat template."""
        body = {"model": model, "prompt": prompt, **fields}
        if stream:
            return self._stream(Completion, "completions", body)
        return _read(Completion, self._send("POST", "completions", body))

    def close(self) -> None:
        self._http.close()

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _send(self, method: str, path: str, body: Any = None) -> Any:
        try:
            response = self._http.request(method, self._url(path), json=body)
        except httpx.HTTPError as error:
            raise self._fault(error) from error
        return _payload(response, response.content)

    def _stream(self, kind: type[T], path: str, body: dict[str, Any]) -> Iterator[T]:
        events = _Events()
        try:
            with self._http.stream("POST", self._url(path), json={**body, "stream": True}) as response:
                if response.is_error:
                    _payload(response, response.read())
                for piece in response.iter_bytes():
                    for data in events.feed(piece):
                        yield _read(kind, data)
                    if events.done:
                        return
        except httpx.HTTPError as error:
            raise self._fault(error) from error
        events.end()


class AsyncClient(_Connection):
    """The same for asyncio; with stream=True, chat and completions give an asynchronous iterator."""

    def __init__(self, base_url: str = DEFAULT_URL, *, api_key: str | None = None, timeout: float = 300.0):
        super().__init__(base_url, api_key=api_key, timeout=timeout)
        self._http = httpx.AsyncClient(headers=self._headers, timeout=self._timeout)

    async def models(self) -> ModelList:
        return _read(ModelList, await self._send("GET", "models"))

    async def chat(
        self, messages: Messages, *, model: str, stream: bool = False, **fields: Any
    ) -> ChatCompletion | AsyncIterator[ChatChunk]:
        body = {"model": model, "messages": list(messages), **fields}
        if stream:
            return self._stream(ChatChunk, "chat/completions", body)
        return _read(ChatCompletion, await self._send("POST", "chat/completions", body))

    async def completions(
        self, prompt: Prompt, *, model: str, stream: bool = False, **fields: Any
    ) -> Completion | AsyncIterator[Completion]:
        body = {"model": model, "prompt": prompt, **fields}
        if stream:
            return self._stream(Completion, "completions", body)
        return _read(Completion, await self._send("POST", "completions", body))

    async def close(self) -> None:
        await self._http.aclose()

    async def __aenter__(self) -> AsyncClient:
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.close()

    async def _send(self, method: str, path: str, body: Any = None) -> Any:
        try:
            response = await self._http.request(method, self._url(path), json=body)
        except httpx.HTTPError as error:
            raise self._fault(error) from error
        return _payload(response, response.content)

    async def _stream(self, kind: type[T], path: str, body: dict[str, Any]) -> AsyncIterator[T]:
        events = _Events()
        try:
            async with self._http.stream("POST", self._url(path), json={**body, "stream": True}) as response:
                if response.is_error:
                    _payload(response, await response.aread())
                async for piece in response.aiter_bytes():
                    for data in events.feed(piece):
                        yield _read(kind, data)
                    if events.done:
                        return
        except httpx.HTTPError as error:
            raise self._fault(error) from error
        events.end()


class _Events:
    """Server-sent events out of pieces of bytes. A line ends at a newline alone: JSON may hold U+2028 and the like.

    Older SWIFT servers leave out the space after `data:`, and some servers the closing [DONE].
    """

    def __init__(self) -> None:
        self.done = False
        self._finished = False
        self._rest = b""

    def feed(self, piece: bytes) -> Iterator[dict[str, Any]]:
        *lines, self._rest = (self._rest + piece).split(b"\n")
        for line in lines:
            data = line[len(b"data:") :].strip() if line.startswith(b"data:") else b""
            if data == b"[DONE]":
                self.done = True
                return
            if data:
                event = _parse(data)
                _raise_error(event, 500)
                self._finished |= any(choice.get("finish_reason") for choice in event.get("choices") or ())
                yield event

    def end(self) -> None:
        """The connection has ended: that may not be in mid-answer."""
        if not self.done and not self._finished:
            raise MartletError("the server broke off in the middle of its answer")


def _payload(response: httpx.Response, content: bytes) -> Any:
    """The JSON a server answered, or its error as ours."""
    if response.is_success:
        data = _parse(content)
        _raise_error(data, response.status_code)
        return data
    try:
        data = json.loads(content)
    except ValueError:
        data = {}
    _raise_error(data, response.status_code)
    text = content.decode(errors="replace").strip()[:500] or response.reason_phrase
    raise _error(response.status_code, f"the server answered {response.status_code}: {text}", None)


def _parse(text: bytes) -> dict[str, Any]:
    try:
        data = json.loads(text)
    except ValueError as error:
        raise MartletError(f"the server's answer is not JSON: {text[:200]!r}") from error
    if not isinstance(data, dict):
        raise MartletError(f"the server's answer is not a JSON object: {text[:200]!r}")
    return data


def _raise_error(data: Any, status: int) -> None:
    """Raise for a body that tells of an error: OpenAI's form, SWIFT's {"object": "error"}, FastAPI's {"detail"}."""
    if not isinstance(data, dict):
        return
    error = data.get("error")
    if data.get("object") == "error":
        error = data
    elif status >= 400 and error is None and "detail" in data:
        error = {"message": data["detail"]}
    if error is None:
        return
    error = error if isinstance(error, dict) else {"message": error}
    code = error.get("code")
    status = status if status >= 400 and status != 500 else code if isinstance(code, int) else status
    raise _error(status, str(error.get("message") or error), error.get("param"))


def _error(status: int, message: str, param: Any) -> MartletError:
    error = _ERRORS.get(status, MartletError)(message, param=param if isinstance(param, str) else None)
    error.http_status = max(status, 400)
    return error


def _read(kind: type[T], data: Mapping[str, Any]) -> T:
    """A dataclass from JSON: unknown fields are passed over, missing and null ones keep their default."""
    values = {}
    for name, part in _parts(kind):
        value = data.get(name)
        if part is not None and isinstance(value, list):
            value = [_read(part, v) for v in value]
        elif part is not None and value is not None:
            value = _read(part, value)
        if value is not None:
            values[name] = value
    return kind(**values)


@functools.cache
def _parts(kind: type) -> list[tuple[str, type | None]]:
    """Field names, and for fields that hold one of our dataclasses or a list of it, which."""
    hints = get_type_hints(kind)
    of = {name: next((t for t in _types(hint) if is_dataclass(t)), None) for name, hint in hints.items()}
    return [(item.name, of[item.name]) for item in fields(kind)]


def _types(hint: Any) -> Iterator[Any]:
    yield hint
    for inner in get_args(hint):
        yield from _types(inner)
