"""From a request body to token ids. Long texts are tokenised off the event loop, so that streams keep flowing.

Longer ones than any prompt (/tokenize takes them) are seconds of work: they get a thread of their own, one after the
other, and of the processor only what nobody else wants.
"""

from __future__ import annotations

import asyncio
import os
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from martlet.errors import InvalidRequest
from martlet.server.errors import ApiError
from martlet.server.schema import ChatBody, TokenizeBody
from martlet.server.service import Service

T = TypeVar("T")

_LONG = 8192  # characters; tokenising fewer takes less than a thread switch is worth


_ENDLESS = 500_000  # characters; prompts of 128,000 tokens have so many


def _give_way() -> None:
    """Let all other threads go first. Linux alone has priorities of single threads, and none can be taken back."""
    if sys.platform == "linux":
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 19)
        # Else the tokenizer library gives a single text, too, to threads that it shares among all callers.
        os.environ["TOKENIZERS_PARALLELISM"] = "false"


_PATIENT = ThreadPoolExecutor(1, "martlet-tokenize", _give_way)


async def off_loop(size: int, work: Callable[..., T], *args: Any) -> T:
    if size > _ENDLESS:
        return await asyncio.get_running_loop().run_in_executor(_PATIENT, work, *args)
    return await asyncio.to_thread(work, *args) if size > _LONG else work(*args)


async def completion_prompts(
    prompt: Any, service: Service, param: str = "prompt"
) -> list[tuple[list[int], str | None]]:
    """(ids, text or None) of each prompt of "text", ["text"], [ids] or [[ids]]. param: the field it came in."""
    prompts = [prompt] if isinstance(prompt, str) or _is_ids(prompt) else prompt
    if not isinstance(prompts, list) or not prompts:
        raise InvalidRequest(f"{param} must be a text, a list of texts, token ids or a list of these", param=param)
    if len(prompts) > (most := service.limits.max_prompts):
        raise InvalidRequest(f"{param}: {len(prompts)} texts; at most {most} in one request", param=param)
    encode, vocab_size = service.backend.tokenizer.encode_prompt, service.backend.vocab_size
    read = []
    for at, item in enumerate(prompts):
        name = param if prompts is not prompt else f"{param}[{at}]"
        if isinstance(item, str):
            check_text(item, name)
            service.check_characters(len(item), name)
            ids, text = await off_loop(len(item), encode, item), item
        elif _is_ids(item):
            check_ids(item, vocab_size, name)
            ids, text = item, None
        else:
            raise InvalidRequest(f"{name} must be a text or a list of token ids", param=name)
        if not ids:
            raise InvalidRequest(f"{name} is empty; this model needs at least one token to continue", param=name)
        read.append((ids, text))
    return read


def chat_messages(body: ChatBody | TokenizeBody) -> list[dict[str, Any]]:
    """Messages for Template.render, which checks what they hold."""
    return [message.model_dump(exclude_unset=True) for message in body.messages]


def characters(value: Any) -> int:
    """Of all texts in JSON data."""
    if isinstance(value, str):
        return len(value)
    if isinstance(value, dict):
        return sum(len(name) + characters(item) for name, item in value.items())
    return sum(map(characters, value)) if isinstance(value, (list, tuple)) else 0


def prompt_style(body: ChatBody | TokenizeBody) -> dict[str, Any]:
    """Arguments of Template.render: a new answer, or more of the last message; and the template's own variables."""
    continues = bool(body.continue_final_message)
    if continues and body.add_generation_prompt:
        raise ApiError(
            400,
            "continue_final_message and add_generation_prompt cannot both be true",
            param="continue_final_message",
        )
    starts = not continues if body.add_generation_prompt is None else body.add_generation_prompt
    own = body.chat_template_kwargs or {}
    style = {"add_generation_prompt": starts, "continue_final_message": continues}
    if taken := [name for name in own if name in (*style, "messages", "tools")]:
        raise InvalidRequest(
            f"chat_template_kwargs.{taken[0]} is a field of the request itself",
            param=f"chat_template_kwargs.{taken[0]}",
        )
    return {**own, **style}


def _is_ids(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and type(value[0]) is int


def check_ids(ids: list[Any], vocab_size: int, name: str) -> None:
    if set(map(type, ids)) <= {int} and (not ids or (min(ids) >= 0 and max(ids) < vocab_size)):
        return
    for token in ids:
        if type(token) is not int or not 0 <= token < vocab_size:
            raise InvalidRequest(
                f"{name} must hold token ids from 0 to {vocab_size - 1}, not {str(token)[:40]}", param=name
            )


def check_text(text: str, name: str) -> None:
    """JSON can spell half of a surrogate pair, which no tokenizer can encode."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InvalidRequest(f"{name} holds a lone surrogate at character {error.start}", param=name) from None
