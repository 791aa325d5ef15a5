"""From a request body to SamplingParams: nulls are defaults, model defaults fill what the request leaves open."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from martlet.errors import InvalidRequest
from martlet.sampling_params import SamplingParams
from martlet.server.errors import ApiError, unsupported
from martlet.server.schema import UNSUPPORTED, Body, ChatBody, CompletionBody, GenerationBody

_MOST_BIASES = 4096
_SAME_NAME = (
    "n",
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "presence_penalty",
    "frequency_penalty",
    "repetition_penalty",
    "seed",
    "stop",
    "stop_token_ids",
    "include_stop_str_in_output",
    "ignore_eos",
    "min_tokens",
    "allowed_token_ids",
    "skip_special_tokens",
)


def sampling_params(
    body: GenerationBody,
    defaults: Mapping[str, Any],
    *,
    ends: tuple[Sequence[int], Sequence[str]] = ((), ()),
    **decided: Any,
) -> SamplingParams:
    """defaults: the model's own (generation_config.json). ends: tokens and texts that end a turn of the chat template.
    decided: fields whose meaning differs between the endpoints (max_tokens, logprobs, prompt_logprobs).
    """
    given = {name: value for name in _SAME_NAME if (value := getattr(body, name)) is not None}
    if not given.get("ignore_eos"):
        given["stop_token_ids"] = (*given.get("stop_token_ids", ()), *ends[0])
        given["stop"] = (*_texts(body.stop), *ends[1])
    if body.logit_bias is not None:
        given["logit_bias"] = _logit_bias(body.logit_bias)
    return SamplingParams(**{**defaults, **given, **decided})


def asked_stops(body: GenerationBody) -> frozenset[str | int]:
    """What the client itself wants to stop at."""
    return frozenset((*_texts(body.stop), *(body.stop_token_ids or ())))


def chat_logprobs(body: ChatBody, most: int) -> int | None:
    if not body.logprobs:
        if body.top_logprobs:
            raise InvalidRequest("top_logprobs needs logprobs: true", param="top_logprobs")
        return None
    return _bounded("top_logprobs", body.top_logprobs or 0, most)


def completion_logprobs(body: CompletionBody, most: int) -> int | None:
    return None if body.logprobs is None else _bounded("logprobs", body.logprobs, most)


def chat_max_tokens(body: ChatBody) -> int | None:
    """max_completion_tokens is the new name of max_tokens; two different wishes are a mistake."""
    old, new = body.max_tokens, body.max_completion_tokens
    if old is not None and new is not None and old != new:
        raise InvalidRequest(
            f"max_completion_tokens ({new}) and max_tokens ({old}) disagree; send only max_completion_tokens",
            param="max_completion_tokens",
        )
    name = "max_tokens" if new is None else "max_completion_tokens"
    limit = old if new is None else new
    if limit is not None and limit < 1:
        raise InvalidRequest(f"{name} must be at least 1, got {limit}", param=name)
    return limit


def extra_fields(
    body: Body, prefix: str = "", unsupported_fields: Mapping[str, tuple[Any, ...]] = UNSUPPORTED
) -> list[str]:
    """Names of fields that had no effect. Raises ApiError for one that we know and would have to honour.

    unsupported_fields: name -> values besides null that ask for nothing.
    """
    ignored = []
    for name, value in (body.model_extra or {}).items():
        if name not in unsupported_fields:
            ignored.append(prefix + name)
            continue
        idle = unsupported_fields[name]
        if value is not None and not any(type(value) is type(same) and value == same for same in idle):
            raise unsupported(prefix + name)
    return ignored


def check_stream_options(body: GenerationBody) -> list[str]:
    if body.stream_options is None:
        return []
    if not body.stream:
        raise ApiError(400, "stream_options is only allowed with stream: true", param="stream_options")
    return extra_fields(body.stream_options, "stream_options.")


def _texts(stop: str | Sequence[str] | None) -> Sequence[str]:
    return [stop] if isinstance(stop, str) else stop or ()


def _bounded(name: str, value: int, most: int) -> int:
    if not 0 <= value <= most:
        raise InvalidRequest(f"{name} must be from 0 to {most}, got {value}", param=name)
    return value


def _logit_bias(bias: Any) -> dict[int, float]:
    if not isinstance(bias, dict):
        raise InvalidRequest("logit_bias must be an object from token id to a number", param="logit_bias")
    if len(bias) > _MOST_BIASES:
        raise InvalidRequest(f"logit_bias has {len(bias)} entries; at most {_MOST_BIASES}", param="logit_bias")
    result = {}
    for token, value in bias.items():
        if not (isinstance(token, str) and token.isascii() and token.isdigit() and len(token) < 10):
            raise InvalidRequest(f"logit_bias: {str(token)[:40]!r} is not a token id", param="logit_bias")
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not -100 <= value <= 100:
            raise InvalidRequest(
                f"logit_bias: the bias of token {token} must be a number from -100 to 100", param="logit_bias"
            )
        result[int(token)] = float(value)
    return result
