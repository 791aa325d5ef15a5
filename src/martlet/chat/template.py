"""Messages to a prompt: the template's interface, and templates written in Jinja."""

from __future__ import annotations

import functools
import re
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import jinja2
from jinja2.sandbox import SecurityError

from martlet.chat import control, reasoning, sandbox, tool_formats
from martlet.chat.messages import Message, normalise, plain
from martlet.chat.reasoning import ReasoningFormat
from martlet.chat.tool_formats import ToolFormat
from martlet.chat.tool_prompt import RESULT_ROLES, as_text, shorten_ids
from martlet.errors import CheckpointError, InvalidRequest, MartletError
from martlet.hub.tokenizer import Tokenizer

# What a template is always given; a caller's extra arguments may not take their place.
_RESERVED = frozenset({"messages", "tools", "documents", "add_generation_prompt", "chat_template"})


class Template(ABC):
    """How one model wants a conversation written. Immutable; render from any thread.

    name: of the template. stop_ids, stop: control tokens, and where the tokenizer has none, strings, that end a
    turn besides the tokenizer's end tokens. default_system: system text of conversations that bring none, or None.
    tool_format: how the model is asked to write tool calls. reasoning: how it marks its thoughts, None without any.
    """

    name: str
    tokenizer: Tokenizer
    stop: tuple[str, ...] = ()
    stop_ids: tuple[int, ...] = ()
    default_system: str | None = None
    tool_format: ToolFormat
    reasoning: ReasoningFormat | None = None

    @abstractmethod
    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        /,
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        **template_kwargs: Any,
    ) -> list[int]:
        """Token ids of the prompt, ready for the model: begin-of-sequence is there if the model wants one.

        add_generation_prompt: end with the head of an answer. continue_final_message: end inside the last message
        instead, so that the model goes on with it. tools: JSON schemas as in OpenAI's API. template_kwargs: further
        variables that this template reads, by any name, as clients send them. No token id of a control token stems from
        a message's text.
        Raises InvalidRequest for messages that are malformed or that the template refuses.
        """

    @abstractmethod
    def render_text(self, messages: Sequence[Mapping[str, Any]], /, **options: Any) -> str:
        """The same prompt as text, for people to look at. Options as for `render`."""

    def _prepare(self, messages: Sequence[Mapping[str, Any]]) -> list[Message]:
        """Checked copies of the messages, with the default system text where the conversation has no system message."""
        messages = normalise(messages)
        if self.default_system and not any(m["role"] in ("system", "developer") for m in messages):
            messages.insert(0, {"role": "system", "content": self.default_system})
        return messages

    def _set_stops(self, strings: Sequence[str]) -> None:
        ids = {text: self.tokenizer.token_id(text) for text in strings}
        self.stop_ids = tuple(i for i in ids.values() if i in self.tokenizer.special_ids)
        self.stop = tuple(text for text, i in ids.items() if i not in self.tokenizer.special_ids)


class JinjaTemplate(Template):
    """A template in Jinja, as checkpoints bring it and as the named ones are written."""

    def __init__(
        self,
        name: str,
        source: str,
        tokenizer: Tokenizer,
        *,
        stop: Sequence[str] | None = None,
        default_system: str | None = None,
        tool_format: ToolFormat | None = None,
    ):
        """stop None: found out by rendering a short conversation. Raises CheckpointError if `source` is no template.

        tool_format: None for the template's own, or Hermes' where it has none. Where it has another one or none, tools
        are told, and past calls and results are written, in text by us.
        """
        self.name, self.tokenizer, self.default_system = name, tokenizer, default_system
        self._source = source
        own = tool_formats.detect(source)
        self.tool_format = tool_format or own or tool_formats.FORMATS["hermes"]
        self.reasoning = reasoning.detect(source)
        self._knows_tools = self._reads("tools") and (own is None or own is self.tool_format)
        try:
            self._template = sandbox.compile_template(source)
        except jinja2.TemplateError as error:
            raise CheckpointError(f"chat template {name!r} cannot be compiled: {error}") from error
        self._names = control.ControlNames.of(tokenizer)
        self._set_stops(self._find_stop() if stop is None else stop)

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        /,
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        **template_kwargs: Any,
    ) -> list[int]:
        text, sign = self._render(messages, tools, add_generation_prompt, continue_final_message, template_kwargs)
        return control.encode(text, self._names, sign, self.tokenizer)

    def render_text(
        self,
        messages: Sequence[Mapping[str, Any]],
        /,
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        **template_kwargs: Any,
    ) -> str:
        text, sign = self._render(messages, tools, add_generation_prompt, continue_final_message, template_kwargs)
        return text.replace(sign, "")

    def _render(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None,
        add_generation_prompt: bool,
        continue_final_message: bool,
        template_kwargs: Mapping[str, Any],
    ) -> tuple[str, str]:
        """The prompt's text with marks, and the mark (see chat.control)."""
        messages = self._prepare(messages)
        tools = plain(list(tools), "tools") if tools else None
        extra = plain(dict(template_kwargs), "chat_template_kwargs")
        self._check_read(extra)
        sign, end = control.choose_signs(messages, tools, extra)
        variables = {
            **self.tokenizer.special_tokens,
            "add_bos": self.tokenizer.add_bos,
            **control.mark(extra, self._names, sign),
            **self._told(control.mark(messages, self._names, sign), control.mark(tools, self._names, sign)),
            "documents": None,
            "add_generation_prompt": add_generation_prompt and not continue_final_message,
        }
        if continue_final_message:
            last = variables["messages"][-1]
            if last["content"] is None:
                raise InvalidRequest("the final message has no content to continue", param="continue_final_message")
            last["content"] += end + " "  # the space tells whether the template strips content
        text = self._run(variables)
        if continue_final_message:
            before, found, after = text.rpartition(end)
            if not found:
                raise InvalidRequest(
                    f"template {self.name!r} leaves out the final message, so it cannot be continued",
                    param="continue_final_message",
                )
            text = before if after.startswith(" ") else before.rstrip()
        return text, sign

    def _run(self, variables: dict[str, Any]) -> str:
        try:
            return sandbox.render(self._template, variables)
        except SecurityError as error:
            raise CheckpointError(f"chat template {self.name!r} does what templates may not: {error}") from error
        except jinja2.TemplateError as error:
            raise InvalidRequest(f"chat template {self.name!r}: {error.message}", param="messages") from error
        except Exception as error:
            if any(m["content"] is None for m in variables["messages"]):
                # Templates without tools do not expect None, which says no more than an empty text.
                return self._run(
                    variables | {"messages": [m | {"content": m["content"] or ""} for m in variables["messages"]]}
                )
            raise InvalidRequest(
                f"chat template {self.name!r} cannot render these messages: {type(error).__name__}: {error}",
                param="messages",
            ) from error

    def _told(self, messages: list[Message], tools: Any) -> dict[str, Any]:
        """Messages and tools as the template can read them. What is written here is written among marks."""
        if not self._knows_tools or not self._reads("tool_calls"):
            if tools or any(m.get("tool_calls") or m["role"] in RESULT_ROLES for m in messages):
                messages = as_text(messages, None if self._knows_tools else tools, self.tool_format)
                tools = tools if self._knows_tools else None
        elif self.tool_format.id_length:
            messages = shorten_ids(messages, self.tool_format.id_length)
        return {"messages": messages, "tools": tools}

    def _check_read(self, extra: Mapping[str, Any]) -> None:
        """Refuse what the template would drop without a word."""
        for name in extra:
            if name in _RESERVED or not self._reads(name):
                raise InvalidRequest(
                    f"chat template {self.name!r} reads no variable {name!r}", param=f"chat_template_kwargs.{name}"
                )

    @functools.cached_property
    def _words(self) -> frozenset[str]:
        return frozenset(re.findall(r"[A-Za-z_]\w*", self._source))

    def _reads(self, name: str) -> bool:
        return name in self._words

    def _find_stop(self) -> tuple[str, ...]:
        """The control token that this template writes after an assistant's words."""
        probe = "martlet"
        try:
            text = self.render_text(
                [{"role": "user", "content": "hi"}, {"role": "assistant", "content": probe}],
                add_generation_prompt=False,
            )
        except MartletError:
            return ()  # a template for one turn only: the tokenizer's end tokens must do
        rest = text.rpartition(probe)[2].lstrip()
        after = [rest[a:b] for a, b in self._names.spans(rest) if a == 0]
        return tuple(after[-1:])


def from_checkpoint(tokenizer: Tokenizer, tool_format: ToolFormat | None = None) -> Template:
    """The template that the checkpoint brought. Raises CheckpointError when it has none, or one that is no Jinja."""
    if not tokenizer.chat_template:
        raise CheckpointError("the checkpoint has no chat template; name one of martlet.chat.names()")
    return JinjaTemplate("checkpoint", tokenizer.chat_template, tokenizer, tool_format=tool_format)
