"""Messages to prompts, and answers to messages.

Everything is imported when first used: a prompt in the terminal needs a template and no parser of tool calls.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

_PUBLIC = {
    "messages": ("ROLES", "history_to_messages", "messages_to_history", "normalise"),
    "catalogue": ("CHECKPOINT", "named", "names", "template_for"),
    "parser": ("Parser", "marks"),
    "reasoning": ("ReasoningFormat", "reasoning_format"),
    "reply": ("Call", "CallArguments", "CallStart", "Content", "Delta", "Reasoning", "Reply"),
    "template": ("JinjaTemplate", "Template", "from_checkpoint"),
    "tool_formats": ("ToolFormat", "tool_format"),
}

if TYPE_CHECKING:
    from martlet.chat.catalogue import CHECKPOINT, named, names, template_for
    from martlet.chat.messages import ROLES, history_to_messages, messages_to_history, normalise
    from martlet.chat.parser import Parser, marks
    from martlet.chat.reasoning import ReasoningFormat, reasoning_format
    from martlet.chat.reply import Call, CallArguments, CallStart, Content, Delta, Reasoning, Reply
    from martlet.chat.template import JinjaTemplate, Template, from_checkpoint
    from martlet.chat.tool_formats import ToolFormat, tool_format

__all__ = [
    "CHECKPOINT",
    "Call",
    "CallArguments",
    "CallStart",
    "Content",
    "Delta",
    "JinjaTemplate",
    "Parser",
    "ROLES",
    "Reasoning",
    "ReasoningFormat",
    "Reply",
    "Template",
    "ToolFormat",
    "from_checkpoint",
    "history_to_messages",
    "marks",
    "messages_to_history",
    "named",
    "names",
    "normalise",
    "reasoning_format",
    "template_for",
    "tool_format",
]


def __getattr__(name: str):
    for module, public in _PUBLIC.items():
        if name in public:
            return getattr(importlib.import_module(f"martlet.chat.{module}"), name)
    raise AttributeError(f"module 'martlet.chat' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
