"""SWIFT's names of models and templates."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from martlet.errors import UsageError, did_you_mean

if TYPE_CHECKING:
    from martlet.chat import Template
    from martlet.hub import Entry, Tokenizer


def _attribute(name: str) -> str:
    return "".join(c if c.isalnum() else "_" for c in name)


class _Names(type):
    """A class whose attributes are names: dashes and dots written as underscores, looked up when asked for."""

    def _values(cls) -> list[str]:
        raise NotImplementedError

    def __getattr__(cls, attribute: str) -> str:
        known = {} if attribute.startswith("__") else {_attribute(value): value for value in cls._values()}
        if attribute in known:
            return known[attribute]
        raise AttributeError(f"{cls.__name__} has no {attribute!r}.{did_you_mean(attribute, known)}")

    def __dir__(cls) -> list[str]:
        return [*super().__dir__(), *map(_attribute, cls._values())]


class _ModelNames(_Names):
    def _values(cls) -> list[str]:
        from martlet import hub

        return list(dict.fromkeys(name for entry in hub.registered() for name in (entry.model_type, entry.name)))


class _TemplateNames(_Names):
    def _values(cls) -> list[str]:
        from martlet import chat

        return [*chat.names(), chat.CHECKPOINT]


class ModelType(metaclass=_ModelNames):
    """Registered models as strings: `ModelType.qwen_7b_chat == 'qwen-7b-chat'`."""

    @classmethod
    def get_model_name_list(cls) -> list[str]:
        return cls._values()


class TemplateType(metaclass=_TemplateNames):
    """Chat templates as strings: `TemplateType.default_generation == 'default-generation'`."""

    @classmethod
    def get_template_name_list(cls) -> list[str]:
        return cls._values()


def entry_of(model_type: str) -> Entry:
    """The registry's entry. UsageError with the nearest names for an unknown model type."""
    from martlet import hub

    entries = {name: entry for entry in reversed(hub.registered()) for name in (entry.name, entry.model_type)}
    if model_type not in entries:
        raise UsageError(f"unknown model_type {model_type!r}.{did_you_mean(model_type, entries)}", param="model_type")
    return entries[model_type]


def get_default_template_type(model_type: str) -> str:
    """The template a model was trained with; "checkpoint" for one that comes with the weights."""
    from martlet import chat

    entry = entry_of(model_type)
    if entry.template is not None:
        return entry.template
    return chat.CHECKPOINT if "chat" in entry.capabilities else "default-generation"


def get_template(
    template_type: str,
    tokenizer: Tokenizer,
    default_system: str | None = None,
    max_length: int | None = None,
    truncation_strategy: str = "delete",
    **kwargs: Any,
) -> Template:
    """The template, bound to a tokenizer. default_system: None keeps the template's own, "" gives none.

    Raises UsageError for max_length and truncation: a prompt is never cut; one that is too long is refused by name.
    """
    from martlet import chat

    refused = dict(kwargs)
    if max_length is not None:
        refused["max_length"] = max_length
    if truncation_strategy != "delete":
        refused["truncation_strategy"] = truncation_strategy
    if refused:
        name = next(iter(refused))
        raise UsageError(
            f"get_template cannot take {name}={refused[name]!r}: prompts are not cut or changed here; "
            "max_model_len of get_vllm_engine bounds them",
            param=name,
        )
    return chat.named(template_type, tokenizer, default_system=default_system)
