"""Templates by name, as data, for checkpoints that bring none and for SWIFT's template types."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path

from martlet.chat.chatglm3 import ChatGLM3
from martlet.chat.reasoning import reasoning_format
from martlet.chat.template import JinjaTemplate, Template, from_checkpoint
from martlet.chat.tool_formats import ToolFormat, tool_format
from martlet.errors import UsageError, did_you_mean
from martlet.hub.card import ModelCard
from martlet.hub.tokenizer import Tokenizer

CHECKPOINT = "checkpoint"  # the name of a checkpoint's own template

_ASSISTANT = "You are a helpful assistant."
# The system prompt published with Llama 2 chat.
_LLAMA2_SYSTEM = (
    "You are a helpful, respectful and honest assistant. Always answer as helpfully as possible, while being safe. "
    "Your answers should not include any harmful, unethical, racist, sexist, toxic, dangerous, or illegal content. "
    "Please ensure that your responses are socially unbiased and positive in nature.\n\n"
    "If a question does not make any sense, or is not factually coherent, explain why instead of answering something "
    "not correct. If you don't know the answer to a question, please don't share false information."
)


@dataclass(frozen=True, slots=True)
class Named:
    """file: under templates/, None for ChatGLM3, which is made of tokens. stop: what ends a turn, beside the
    tokenizer's own end tokens. needs: variables the tokenizer must give. tools: the tool format its models know."""

    file: str | None
    default_system: str | None = None
    stop: tuple[str, ...] = ()
    needs: tuple[str, ...] = ()
    tools: str = "hermes"


_CHATML = Named("chatml", _ASSISTANT, stop=("<|im_end|>",))
_LLAMA2 = Named("llama2", needs=("bos_token", "eos_token"))
NAMED: dict[str, Named] = {
    "chatml": _CHATML,
    "qwen": _CHATML,
    "yi": Named("chatml", stop=("<|im_end|>",)),
    "llama": Named("llama2", _LLAMA2_SYSTEM, needs=_LLAMA2.needs),
    "llama2": _LLAMA2,
    "llama3": Named("llama3", stop=("<|eot_id|>",), tools="llama3"),
    "chatglm3": Named(None, tools="chatglm3"),
    "zephyr": Named("zephyr", needs=("eos_token",)),
    "mistral": Named("mistral", needs=("bos_token", "eos_token")),
    "rwkv-world": Named("rwkv-world", stop=("\n\n",)),
    "default-generation": Named("default-generation"),
}


def names() -> list[str]:
    """The names that `named` knows, besides "checkpoint"."""
    return sorted(NAMED)


def named(
    name: str, tokenizer: Tokenizer, *, default_system: str | None = None, tools: ToolFormat | None = None
) -> Template:
    """The template called `name`; "checkpoint" is the one the checkpoint brought.

    tools: a tool format instead of the template's own. default_system replaces the template's own; "" gives none.
    Raises UsageError for an unknown name, or a tokenizer that lacks a token which the template cannot do without.
    """
    if name == CHECKPOINT:
        template = from_checkpoint(tokenizer, tools)
        template.default_system = default_system
        return template
    known = NAMED.get(name)
    if known is None:
        raise UsageError(f"unknown template {name!r}; there are {', '.join(names())}.{did_you_mean(name, NAMED)}")
    system = known.default_system if default_system is None else default_system
    tools = tools or tool_format(known.tools)
    if known.file is None:
        if tools.name != known.tools:
            raise UsageError(f"template {name!r} writes tool calls as {known.tools} alone", param="tool_format")
        return ChatGLM3(name, tokenizer, default_system=system)
    missing = [variable for variable in known.needs if not tokenizer.special_tokens.get(variable)]
    if missing:
        raise UsageError(f"template {name!r} needs {' and '.join(missing)}, which this tokenizer does not define")
    return JinjaTemplate(
        name, _source(known.file), tokenizer, stop=known.stop, default_system=system, tool_format=tools
    )


@functools.cache
def _source(file: str) -> str:
    return (Path(__file__).parent / "templates" / f"{file}.jinja").read_text(encoding="utf-8")


def template_for(
    card: ModelCard,
    tokenizer: Tokenizer,
    name: str | None = None,
    *,
    tools: str | None = None,
    reasoning: str | None = None,
) -> Template:
    """The template to prompt a model with: the one called `name`, else the one its card names, else the checkpoint's.

    tools: name of a tool format, else the card's, else the template's own. reasoning: name of a reasoning format,
    else the one that the template tells of. Raises UsageError for an unknown name, or when there is no template.
    """
    wanted = tools or (card.tool_format if not name else None)
    known = tool_format(wanted) if wanted else None
    if name or card.template:
        template = named(name or card.template or "", tokenizer, tools=known)
    elif tokenizer.chat_template:
        template = from_checkpoint(tokenizer, known)
    else:
        raise _no_template(card)
    if reasoning:
        template.reasoning = reasoning_format(reasoning)
    return template


def _no_template(card: ModelCard) -> UsageError:
    return UsageError(
        f"{card.name} has no chat template. Name one with --template_type ({', '.join(names())}), "
        "or send a plain prompt to the completions API"
    )
