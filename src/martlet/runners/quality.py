"""What a number format costs in quality: measured, kept beside the command that measured it, and never guessed.

The measure: over some thousand tokens of real text, how much the log-probability of each token differs from the same
checkpoint in float32, in the mean (`change`), and how much of it is lost in the mean (`loss`). `martlet bench
precision` measures a model and keeps the figures in the user's cache; figures of one small model, on which formats
cost more than on large ones, come with the package and stand in for a model that nobody measured here.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from martlet.hub.cache import cache_dir
from martlet.hub.card import ModelCard
from martlet.hub.files import fingerprint

log = logging.getLogger("martlet")

MOST_CHANGE, MOST_LOSS = 0.15, 0.03  # nats a token: what "auto" accepts
SHIPPED = Path(__file__).with_name("quality.json")


@dataclass(frozen=True, slots=True)
class Quality:
    """A measurement. model: as it was called; format: of its checkpoint; isa: of the kernels that ran it."""

    model: str
    format: str
    quant: str
    isa: str
    tokens: int
    change: float
    loss: float
    command: str

    @property
    def good(self) -> bool:
        return self.change <= MOST_CHANGE and self.loss <= MOST_LOSS

    def __str__(self) -> str:
        return f"log-probabilities change by {self.change:.3f}, loss {self.loss:+.3f} over {self.tokens} tokens"


def choose(card: ModelCard, quants: Sequence[str]) -> str:
    """The first of `quants` that is good enough, else the last one. Says which and why."""
    for quant in quants:
        own, found = True, of_model(card, quant)
        if found is None:
            own, found = False, shipped(card.format, quant)
        if found is not None and found.good:
            break
    if found is None:
        told = "nobody measured what it costs"
    elif own:
        told = f"{found}, as `{found.command}` measured here"
    else:
        told = f"{found} of {found.model}; `martlet bench precision --model {card.name}` measures this model"
    log.info("quant auto is %s: %s", quant, told)
    return quant


def of_model(card: ModelCard, quant: str) -> Quality | None:
    """What was measured on this machine with the model's files as they are now."""
    if card.format == "dummy":
        return None
    return _read(_kept()).get((fingerprint(card.path), quant))


def shipped(format: str, quant: str) -> Quality | None:
    """What the package knows of a format, from a small model whose checkpoint has the same format."""
    return next((q for q in _read(SHIPPED).values() if (q.format, q.quant) == (format, quant)), None)


def keep(card: ModelCard, measured: Sequence[Quality]) -> Path:
    """Write measurements of a model for the next start. Returns the file."""
    import tempfile

    path, mark = _kept(), fingerprint(card.path)
    known = _read(path) | {(mark, one.quant): one for one in measured}
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, scratch = tempfile.mkstemp(dir=path.parent)
    with os.fdopen(handle, "w", encoding="utf-8") as file:
        json.dump([{"files": files, **asdict(one)} for (files, _), one in known.items()], file, indent=1)
    os.replace(scratch, path)
    return path


def _kept() -> Path:
    return cache_dir() / "quality.json"


def _read(path: Path) -> dict[tuple[str, str], Quality]:
    """Measurements by (fingerprint, quant); none when the file is not there or not ours to read."""
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))
        return {(row.pop("files"), row["quant"]): Quality(**row) for row in rows}
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return {}
