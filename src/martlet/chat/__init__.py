"""Messages to prompts."""

from martlet.chat.messages import ROLES, history_to_messages, messages_to_history, normalise
from martlet.chat.named import CHECKPOINT, named, names, template_for
from martlet.chat.template import JinjaTemplate, Template, from_checkpoint

__all__ = [
    "CHECKPOINT",
    "JinjaTemplate",
    "ROLES",
    "Template",
    "from_checkpoint",
    "history_to_messages",
    "messages_to_history",
    "named",
    "names",
    "normalise",
    "template_for",
]
