"""How to sample, in the words of transformers' GenerationConfig, as SWIFT has it for vLLM."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

from martlet.errors import UsageError, did_you_mean

if TYPE_CHECKING:
    from martlet.chat import Template
    from martlet.sampling_params import SamplingParams


@dataclass
class VllmGenerationConfig:
    """max_new_tokens defaults to 64, as in SWIFT 2.x; None means up to the model's length. do_sample False is greedy.

    A field that is not here raises UsageError when it is set, so that a misspelt one is not lost.
    """

    max_new_tokens: int | None = 64
    temperature: float = 1.0
    top_k: int = 50
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    do_sample: bool = True
    num_beams: int = 1
    n: int = 1
    length_penalty: float = 1.0
    stop: str | Sequence[str] = ()
    stop_token_ids: Sequence[int] = ()
    seed: int | None = None
    ignore_eos: bool = False
    skip_special_tokens: bool = False

    def __setattr__(self, name: str, value: Any) -> None:
        if name not in _FIELDS:
            if name == "max_length":
                raise UsageError("max_length counts the prompt too; set max_new_tokens", param=name)
            known = [*_FIELDS, "max_tokens"]
            if name != "max_tokens":
                raise UsageError(f"a generation config has no {name!r}.{did_you_mean(name, known)}", param=name)
            name = "max_new_tokens"
        if name in _FIXED and value != _FIXED[name]:
            raise UsageError(f"{name}={value!r}: {_WHY[name]}", param=name)
        object.__setattr__(self, name, value)

    @property
    def max_tokens(self) -> int | None:
        """vLLM's name of max_new_tokens; may be set too."""
        return self.max_new_tokens

    @classmethod
    def from_model(cls, settings: Mapping[str, Any]) -> VllmGenerationConfig:
        """The defaults with what a model's generation_config.json says about sampling."""
        names = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "max_new_tokens", "do_sample")
        return cls(**{name: settings[name] for name in names if settings.get(name) is not None})

    def sampling_params(self, template: Template) -> SamplingParams:
        """Settings of one request; the template's stops join those asked for. Raises InvalidRequest naming a field."""
        from martlet.sampling_params import SamplingParams

        stop = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())
        return SamplingParams(
            temperature=self.temperature if self.do_sample else 0.0,
            top_k=self.top_k,
            top_p=self.top_p,
            min_p=self.min_p,
            repetition_penalty=self.repetition_penalty,
            presence_penalty=self.presence_penalty,
            frequency_penalty=self.frequency_penalty,
            max_tokens=self.max_new_tokens,
            seed=self.seed,
            stop=(*stop, *template.stop),
            stop_token_ids=(*self.stop_token_ids, *template.stop_ids),
            ignore_eos=self.ignore_eos,
            skip_special_tokens=self.skip_special_tokens,
        )


_FIELDS = frozenset(field.name for field in fields(VllmGenerationConfig))
_FIXED = {"num_beams": 1, "length_penalty": 1.0, "n": 1}
_WHY = {
    "num_beams": "there is no beam search here; sample, or set temperature to 0",
    "length_penalty": "it weighs beams, and there is no beam search here",
    "n": "an answer here is one response; use martlet.LLM for several",
}
