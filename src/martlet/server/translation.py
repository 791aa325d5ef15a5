"""Other APIs' requests as chat completions: one core reads them all, and each API keeps its own names for faults."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from pydantic import ValidationError

from martlet.errors import InvalidRequest, MartletError
from martlet.server.chat import chat_job
from martlet.server.errors import ApiError, describe_validation, unsupported
from martlet.server.generation import Job
from martlet.server.sampling import extra_fields
from martlet.server.schema import ChatBody, SamplingBody
from martlet.server.service import Service


def shared_fields(body: SamplingBody, refused: Mapping[str, tuple[Any, ...]]) -> dict[str, Any]:
    """The fields that mean the same everywhere, and those that `body` does not declare: the chat honours, refuses or
    names them. refused: fields this API cannot honour, with the values besides null that ask for nothing.
    """
    extra_fields(body, unsupported_fields=refused)
    shared = {name: value for name in SamplingBody.model_fields if (value := getattr(body, name)) is not None}
    return shared | {name: value for name, value in (body.model_extra or {}).items() if name not in refused}


async def translated_job(service: Service, chat: Mapping[str, Any], request_id: str, names: Mapping[str, str]) -> Job:
    """A job for a chat body made of another API's. names: what that API calls the chat's fields."""
    with told_as(names):
        return await chat_job(service, ChatBody.model_validate(chat), request_id)


@contextmanager
def told_as(names: Mapping[str, str]) -> Iterator[None]:
    """Errors about the chat's fields become errors about those that they were made of."""
    try:
        yield
    except ValidationError as error:
        found = describe_validation(error.errors()).body["error"]
        message, param = _retold(found["message"], found["param"], names)
        raise ApiError(400, message, param=param, code=found["code"]) from None
    except MartletError as error:
        error.message, error.param = _retold(error.message, error.param, names)
        raise


_TOOL = re.compile(r"(tools\[\d+\])\.function\b(?:\.(\w+))?(.*)")


def _retold(message: str, param: str | None, names: Mapping[str, str]) -> tuple[str, str | None]:
    """An error's message and param in the names of the other API. A field of a tool keeps its place: only chats have a
    tool's fields inside `function`."""
    if param is None:
        return message, None
    head = re.split(r"[.\[]", param, maxsplit=1)[0]
    if tool := _TOOL.fullmatch(param):
        place, field, rest = tool.groups()
        new = f"{place}.{names.get(f'tools.{field}', field)}{rest}" if field else place
    else:
        new = names.get(param) or names.get(head) or param
    for said in (param, head):
        if message.startswith(said) and (said == param or head in names):
            return new + message.removeprefix(said), new
    return message, new


def text_parts(content: Any, where: str, kinds: Mapping[str, str]) -> list[dict[str, str]]:
    """Content, a text or parts of the `kinds` (type -> field of its text), as text parts of a chat message."""
    if isinstance(content, str):
        return [{"type": "text", "text": content}]
    if not isinstance(content, list):
        raise InvalidRequest(f"{where} must be a text or a list of parts", param=where)
    return [{"type": "text", "text": _part_text(part, f"{where}[{i}]", kinds)} for i, part in enumerate(content)]


def _part_text(part: Any, where: str, kinds: Mapping[str, str]) -> str:
    kind = member(part, "type", str, where)
    if kind not in kinds:
        raise unsupported(where, f"is of type {kind[:40]!r}; this server reads {', '.join(kinds)}")
    return member(part, kinds[kind], str, where)


def member(value: Any, name: str, kind: type, where: str, default: Any = None) -> Any:
    """value[name], which must be a `kind`; without a default it must be there. Raises InvalidRequest with the place."""
    if not isinstance(value, dict):
        raise InvalidRequest(f"{where} must be an object", param=where)
    found = value.get(name, default)
    if not isinstance(found, kind):
        wanted = {str: "a text", dict: "an object", list: "a list", bool: "true or false"}[kind]
        raise InvalidRequest(f"{where}.{name} must be {wanted}", param=f"{where}.{name}")
    return found
