"""ChatGLM3's prompt, made of tokens: its role tokens can be spelt by no text, so each piece is encoded for itself.

A message is role token, encode(metadata and a newline), encode(content), where metadata is an assistant's tool name.
The prompt is [gMASK] sop, the messages, and the token of the one who speaks next.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from martlet.chat.messages import Message, plain
from martlet.chat.template import Template
from martlet.chat.tool_formats import FORMATS
from martlet.errors import InvalidRequest, UsageError
from martlet.hub.tokenizer import Tokenizer

TOOLS_SYSTEM = "Answer the following questions as best as you can. You have access to the following tools:"
_PREFIX = ("[gMASK]", "sop")
_ROLES = {
    "system": "<|system|>",
    "developer": "<|system|>",
    "user": "<|user|>",
    "assistant": "<|assistant|>",
    "observation": "<|observation|>",
    "tool": "<|observation|>",
    "function": "<|observation|>",
}


class ChatGLM3(Template):
    """The token-level template of ChatGLM3-6B. Generating <|observation|> means a tool call was made."""

    tool_format = FORMATS["chatglm3"]

    def __init__(self, name: str, tokenizer: Tokenizer, *, default_system: str | None = None):
        self.name, self.tokenizer, self.default_system = name, tokenizer, default_system
        self._ids = {token: tokenizer.token_id(token) for token in (*_PREFIX, *_ROLES.values())}
        missing = [token for token, i in self._ids.items() if i is None]
        if missing:
            raise UsageError(f"template {name!r} needs tokens that this tokenizer has not: {', '.join(missing)}")
        self._set_stops(("<|user|>", "<|observation|>"))

    def render(self, messages: Sequence[Mapping[str, Any]], /, **options: Any) -> list[int]:
        ids: list[int] = []
        for control, text in self._pieces(messages, **options):
            ids += [self._ids[control]] if control else self.tokenizer.encode(text, special=False)
        return ids

    def render_text(self, messages: Sequence[Mapping[str, Any]], /, **options: Any) -> str:
        # A message's content is encoded with SentencePiece's leading space, which the text shows.
        pieces = list(self._pieces(messages, **options))
        return "".join(control or (text if text.endswith("\n") else f" {text}") for control, text in pieces)

    def _pieces(
        self,
        messages: Sequence[Mapping[str, Any]],
        /,
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        **template_kwargs: Any,
    ) -> Iterator[tuple[str, str]]:
        """The prompt in order: (control token, "") or ("", text to encode for itself)."""
        if template_kwargs:
            name = next(iter(template_kwargs))
            raise InvalidRequest(
                f"template {self.name!r} reads no variable {name!r}", param=f"chat_template_kwargs.{name}"
            )
        yield from ((token, "") for token in _PREFIX)
        for message in _with_tools(self._prepare(messages), tools):
            for metadata, content in _turns(message):
                yield _ROLES[message["role"]], ""
                yield "", f"{metadata}\n"
                yield "", content
        if add_generation_prompt and not continue_final_message:
            yield "<|assistant|>", ""


def _with_tools(messages: list[Message], tools: Sequence[Mapping[str, Any]] | None) -> list[Message]:
    """Tools go into the system message, after what it says, in ChatGLM3's flat form."""
    if not tools:
        return messages
    flat = [tool.get("function", tool) for tool in plain(list(tools), "tools")]
    text = f"{TOOLS_SYSTEM}\n{json.dumps(flat, indent=4, ensure_ascii=False)}"
    if messages[0]["role"] in ("system", "developer"):
        return [{**messages[0], "content": f"{messages[0]['content']}\n{text}"}, *messages[1:]]
    return [{"role": "system", "content": text}, *messages]


def _turns(message: Message) -> Iterator[tuple[str, str]]:
    """(metadata, content) of the turns one message becomes: its words, then a turn for each tool call."""
    calls = message.get("tool_calls") or ()
    if message["content"] or not calls:
        yield "", message["content"] or ""
    for call in calls:
        arguments = call["function"].get("arguments") or {}
        written = ", ".join(f"{key}={value!r}" for key, value in arguments.items())
        yield str(call["function"].get("name", "")), f"```python\ntool_call({written})\n```"
