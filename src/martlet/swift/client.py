"""SWIFT's client functions, for any OpenAI-compatible server."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any

from martlet.errors import UsageError

if TYPE_CHECKING:
    from martlet.client import AsyncClient, Client, ModelList

History = Sequence[Sequence[str]]


@dataclass
class XRequestConfig:
    """How to generate; None, and the values below, leave a setting to the server. Fields may be set later too."""

    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    repetition_penalty: float | None = None
    n: int = 1
    seed: int | None = None
    stop: list[str] = field(default_factory=list)
    stream: bool = False
    best_of: int | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    length_penalty: float = 1.0
    num_beams: int = 1
    top_k: int | None = None
    logprobs: bool = False
    top_logprobs: int | None = None

    def body(self, *, chat: bool) -> dict[str, Any]:
        """Fields of a request: only what differs from the defaults, so that plain servers are not asked for more."""
        plain = XRequestConfig()
        names = [item.name for item in fields(self) if item.name != "stream"]
        body = {name: getattr(self, name) for name in names if getattr(self, name) != getattr(plain, name)}
        if not chat and body.pop("logprobs", False):
            body["logprobs"] = body.pop("top_logprobs", None) or 1  # a number in the completions API
        return body


def get_model_list_client(
    host: str = "127.0.0.1", port: str | int = "8000", api_key: str = "EMPTY", url: str | None = None
) -> ModelList:
    """What a server serves: `.data[0].id` is the first model. url: a base URL with /v1, instead of host and port."""
    with _client(host, port, api_key, url) as client:
        return client.models()


async def get_model_list_client_async(
    host: str = "127.0.0.1", port: str | int = "8000", api_key: str = "EMPTY", url: str | None = None
) -> ModelList:
    async with _async_client(host, port, api_key, url) as client:
        return await client.models()


def inference_client(
    model_type: str,
    query: str,
    history: History | None = None,
    system: str | None = None,
    *,
    request_config: XRequestConfig | None = None,
    tools: Sequence[Mapping[str, Any]] | None = None,
    tool_choice: str | Mapping[str, Any] = "auto",
    host: str = "127.0.0.1",
    port: str | int = "8000",
    adapter_name: str | None = None,
    is_chat_request: bool | None = None,
    api_key: str = "EMPTY",
    url: str | None = None,
) -> Any:
    """Ask a server: a ChatCompletion or Completion of martlet.client, or with request_config.stream an iterator.

    adapter_name: the adapter to use in place of the model. is_chat_request: True for the chat API, False for the
    completions API. None: chat if there is a history, system text or tools; else what the server says of the model, or
    the registry, or chat. Raises MartletError with the server's words, for a stream when it is first read.
    """
    ask = _Ask(adapter_name or model_type, query, history, system, tools, tool_choice, request_config, is_chat_request)
    client = _client(host, port, api_key, url)
    if ask.stream:
        return _stream(client, ask)
    with client:
        chat = ask.is_chat() if ask.decided else ask.is_chat(client.models())
        return client.chat(**ask.chat_body()) if chat else client.completions(**ask.text_body())


def _stream(client: Client, ask: _Ask) -> Iterator[Any]:
    with client:
        chat = ask.is_chat() if ask.decided else ask.is_chat(client.models())
        yield from client.chat(**ask.chat_body()) if chat else client.completions(**ask.text_body())


async def inference_client_async(
    model_type: str,
    query: str,
    history: History | None = None,
    system: str | None = None,
    *,
    request_config: XRequestConfig | None = None,
    tools: Sequence[Mapping[str, Any]] | None = None,
    tool_choice: str | Mapping[str, Any] = "auto",
    host: str = "127.0.0.1",
    port: str | int = "8000",
    adapter_name: str | None = None,
    is_chat_request: bool | None = None,
    api_key: str = "EMPTY",
    url: str | None = None,
) -> Any:
    """Like `inference_client`; a stream is an asynchronous iterator."""
    ask = _Ask(adapter_name or model_type, query, history, system, tools, tool_choice, request_config, is_chat_request)
    client = _async_client(host, port, api_key, url)
    if ask.stream:
        return _stream_async(client, ask)
    async with client:
        chat = ask.is_chat() if ask.decided else ask.is_chat(await client.models())
        return await (client.chat(**ask.chat_body()) if chat else client.completions(**ask.text_body()))


async def _stream_async(client: AsyncClient, ask: _Ask) -> AsyncIterator[Any]:
    async with client:
        chat = ask.is_chat() if ask.decided else ask.is_chat(await client.models())
        chunks = await (client.chat(**ask.chat_body()) if chat else client.completions(**ask.text_body()))
        async for chunk in chunks:
            yield chunk


class _Ask:
    """One question to a server. The configuration is copied: its owner may change it while a stream is being read."""

    def __init__(
        self,
        model: str,
        query: str,
        history: History | None,
        system: str | None,
        tools: Sequence[Mapping[str, Any]] | None,
        tool_choice: str | Mapping[str, Any],
        config: XRequestConfig | None,
        is_chat: bool | None,
    ):
        self.model, self.query, self.history, self.system = model, query, history, system
        self.tools, self.tool_choice = tools, tool_choice
        self.config = replace(config) if config else XRequestConfig()
        self._chat = True if is_chat is None and (history or system or tools) else is_chat

    @property
    def stream(self) -> bool:
        return self.config.stream

    @property
    def decided(self) -> bool:
        return self._chat is not None

    def is_chat(self, served: ModelList | None = None) -> bool:
        if self._chat is not None:
            return self._chat
        said = [model.is_chat for model in served.data if model.id == self.model] if served else []
        if said and said[0] is not None:
            return said[0]
        from martlet import hub

        known = [entry for entry in hub.registered() if self.model in (entry.name, entry.model_type)]
        return "chat" in known[0].capabilities if known else True

    def chat_body(self) -> dict[str, Any]:
        from martlet.chat.messages import history_to_messages

        messages = history_to_messages(self.history, self.query, self.system)
        tools = {"tools": list(self.tools), "tool_choice": self.tool_choice} if self.tools else {}
        return {"messages": messages, **self._body(chat=True), **tools}

    def text_body(self) -> dict[str, Any]:
        if self.history or self.system or self.tools:
            raise UsageError("the completions API takes a query alone, without history, system text or tools")
        return {"prompt": self.query, **self._body(chat=False)}

    def _body(self, *, chat: bool) -> dict[str, Any]:
        return {"model": self.model, "stream": self.stream, **self.config.body(chat=chat)}


def _client(host: str, port: str | int, api_key: str, url: str | None) -> Client:
    from martlet.client import Client

    return Client(url or f"http://{host}:{port}/v1", api_key=api_key)


def _async_client(host: str, port: str | int, api_key: str, url: str | None) -> AsyncClient:
    from martlet.client import AsyncClient

    return AsyncClient(url or f"http://{host}:{port}/v1", api_key=api_key)
