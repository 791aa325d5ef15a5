"""Sampling settings that a model recommends (its generation_config.json), for requests that leave them open."""

from __future__ import annotations

from typing import Any

from martlet.errors import CheckpointError, InvalidRequest
from martlet.hub.card import ModelCard
from martlet.sampling_params import SamplingParams

_NAMES = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")


def generation_defaults(card: ModelCard) -> dict[str, Any]:
    """SamplingParams fields the model sets, without those that it sets to what SamplingParams has anyway.

    End tokens are not here: the tokenizer knows them. Raises CheckpointError when a value makes no sense.
    """
    neutral = SamplingParams()
    given = {name: value for name in _NAMES if (value := card.generation_config.get(name)) is not None}
    try:
        checked = SamplingParams(**given)
    except InvalidRequest as error:
        raise CheckpointError(f"generation_config.json of {card.name}: {error}", param=error.param) from None
    return {name: value for name in given if (value := getattr(checked, name)) != getattr(neutral, name)}
