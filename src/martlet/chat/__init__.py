"""Messages to prompts."""

from martlet.chat.messages import ROLES, history_to_messages, messages_to_history, normalise
from martlet.chat.named import CHECKPOINT, named, names, template_for
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
