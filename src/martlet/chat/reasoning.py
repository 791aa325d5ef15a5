"""How models set apart what they think before they answer, as data."""

from __future__ import annotations

from dataclasses import dataclass

from martlet.errors import UsageError, did_you_mean


@dataclass(frozen=True, slots=True)
class ReasoningFormat:
    """begin, end: marks around the thoughts, at the start of an answer. Some templates write `begin` themselves."""

    name: str
    begin: str
    end: str

    @property
    def marks(self) -> tuple[str, str]:
        return self.begin, self.end


_FORMATS = (
    ReasoningFormat("think", "<think>", "</think>"),
    ReasoningFormat("magistral", "[THINK]", "[/THINK]"),
    ReasoningFormat("granite", "<|think|>", "<|/think|>"),
    ReasoningFormat("seed", "<seed:think>", "</seed:think>"),
)
REASONING: dict[str, ReasoningFormat] = {reasoning.name: reasoning for reasoning in _FORMATS}
NONE = "none"


def reasoning_format(name: str) -> ReasoningFormat | None:
    """The format called `name`; None for "none". Raises UsageError for an unknown one."""
    if name == NONE:
        return None
    if name not in REASONING:
        names = ", ".join((*REASONING, NONE))
        raise UsageError(
            f"unknown reasoning format {name!r}; there are {names}.{did_you_mean(name, REASONING)}",
            param="reasoning_format",
        )
    return REASONING[name]


def detect(template: str) -> ReasoningFormat | None:
    """The format whose marks a Jinja template mentions, None when it knows no thoughts."""
    return next((known for known in _FORMATS if known.end in template or known.begin in template), None)
