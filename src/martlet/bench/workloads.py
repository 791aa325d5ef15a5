"""The workloads as data: what is asked, how much of it at once, and how long the answers are."""

from __future__ import annotations

import json
from pathlib import Path
from typing import NamedTuple

from martlet.errors import UsageError, did_you_mean

NAMES = ("W1", "W2", "W3", "W4", "W5", "start")


class Workload(NamedTuple):
    """prompts: token ids of each request (SmolLM2's), and texts: the same as text; or chats: questions for /v1/chat.

    Every answer has exactly new_tokens tokens: greedy, the end token ignored. At most `concurrency` run at once.
    """

    name: str
    about: str
    new_tokens: int
    concurrency: int
    prompts: tuple[tuple[int, ...], ...] = ()
    texts: tuple[str, ...] = ()
    chats: tuple[str, ...] = ()

    @property
    def size(self) -> int:
        return len(self.prompts or self.chats)


def load(name: str) -> Workload:
    """The workload of that name. Raises UsageError with the nearest names."""
    if name not in NAMES:
        raise UsageError(
            f"no workload {name!r}; there are {', '.join(NAMES)}.{did_you_mean(name, NAMES)}", param="workloads"
        )
    if name == "start":
        first = load("W1")
        about = "process start to first token, model on disk"
        return Workload("start", about, 1, 1, (first.prompts[0][:16],), (first.texts[0][:64],))
    data = json.loads((Path(__file__).parent / "workloads" / f"{name}.json").read_text(encoding="utf-8"))
    prefix, text = tuple(data.get("prefix", ())), data.get("prefix_text", "")
    return Workload(
        name=data["name"],
        about=data["about"],
        new_tokens=data["new_tokens"],
        concurrency=data["concurrency"],
        prompts=tuple((*prefix, *prompt) for prompt in data.get("prompts", ())),
        texts=tuple(text + own for own in data.get("texts", ())),
        chats=tuple(data.get("chats", ())),
    )
