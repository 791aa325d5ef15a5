"""An assistant's message as it grows: the deltas that a parser gives, and what they add up to."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TypeAlias


@dataclass(frozen=True, slots=True)
class Content:
    """More of the answer's text."""

    text: str


@dataclass(frozen=True, slots=True)
class Reasoning:
    """More of what the model thinks before it answers."""

    text: str


@dataclass(frozen=True, slots=True)
class CallStart:
    """A tool call begins. index: 0 for the first call of the message. name: complete."""

    index: int
    id: str
    name: str


@dataclass(frozen=True, slots=True)
class CallArguments:
    """More of the arguments of call `index`, as JSON text to be put behind what came before."""

    index: int
    text: str


Delta: TypeAlias = Content | Reasoning | CallStart | CallArguments


@dataclass(slots=True)
class Call:
    """arguments: JSON text; an object, unless the model broke off or broke the rules of JSON inside it."""

    id: str
    name: str
    arguments: str = ""


@dataclass(slots=True)
class Reply:
    """Everything said so far."""

    content: str = ""
    reasoning: str = ""
    calls: list[Call] = field(default_factory=list)

    def add(self, deltas: Iterable[Delta]) -> None:
        content, reasoning = [], []
        for delta in deltas:
            if isinstance(delta, Content):
                content.append(delta.text)
            elif isinstance(delta, Reasoning):
                reasoning.append(delta.text)
            elif isinstance(delta, CallStart):
                self.calls.append(Call(delta.id, delta.name))
            else:
                self.calls[delta.index].arguments += delta.text
        self.content += "".join(content)
        self.reasoning += "".join(reasoning)
