"""What a conversion lost: logits before and after, by transformers; of quantised models by us."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from martlet import hub
from martlet.backends.transformers_model import load_model
from martlet.errors import MartletError
from martlet.export.quantise.layerwise import LayerWise
from martlet.export.source import Source, merged_in_float32
from martlet.hub.card import ModelCard
from martlet.hub.checkpoint import Checkpoint
from martlet.runners.base import LoadOptions
from martlet.train import console

log = logging.getLogger("martlet")

EXACT = 1e-4
TEXTS = (
    "The capital of France is",
    "def fibonacci(n):\n    ",
    "Who are you?",
    "A martlet is a small bird of heraldry. It has no feet, for it never comes to rest; so it stands for whoever "
    "learns and moves on. Younger sons carried it on their shields, because they had no land to stand upon.",
)


@dataclass(frozen=True, slots=True)
class Difference:
    """largest: of any logit; scale: the largest logit there is. logprob: mean change of the log-probability of the
    text's own tokens, absolute. divergence: mean KL divergence from before to after, in nats. perplexities: of the
    texts, before and after."""

    largest: float
    scale: float
    logprob: float
    divergence: float
    perplexities: tuple[float, float]

    def __str__(self) -> str:
        return (
            f"logits (up to {self.scale:.2g}) differ by at most {self.largest:.2g}; log-probabilities of the text by "
            f"{self.logprob:.2g} on average; KL divergence {self.divergence:.2g} nats a token; perplexity "
            f"{self.perplexities[0]:.4g} before, {self.perplexities[1]:.4g} after"
        )


def difference(before: Callable, after: Callable, texts: list[list[int]]) -> Difference:
    """before, after: ids [1, length] -> logits [1, length, vocab]. Texts of a single token say nothing of tokens.

    They are compared in float64, so that what is told is of them and not of the comparison.
    """
    largest = scale = 0.0
    divergences, told = [], []
    with torch.no_grad():
        for ids in texts:
            batch = torch.tensor([ids])
            old, new = before(batch)[0].double(), after(batch)[0].double()
            largest, scale = max(largest, (old - new).abs().max().item()), max(scale, old.abs().max().item())
            p, q = old.log_softmax(-1), new.log_softmax(-1)
            divergences.append((p.exp() * (p - q)).sum(-1))
            nexts = batch[0, 1:, None]
            told.append(torch.cat([p[:-1].gather(1, nexts), q[:-1].gather(1, nexts)], 1))
    before_after = torch.cat(told)
    changes = (before_after[:, 0] - before_after[:, 1]).abs()
    perplexities = tuple((-before_after).mean(0).exp().tolist())
    return Difference(largest, scale, changes.mean().item(), torch.cat(divergences).mean().item(), perplexities)


def compare(source: Source, result: Path, dtype: torch.dtype = torch.float32) -> Difference:
    """Log and return what the file or folder at `result` lost against its source.

    dtype: what both are computed in; quantised ones always in float32.
    """
    console.quiet()
    ids, card = _texts(source), hub.resolve(str(result))
    if card.config.get("quantization_config"):
        found = difference(_by_us(*merged_in_float32(source), ids), _by_us(card, hub.open_checkpoint(card), ids), ids)
    else:
        found = difference(_unmerged(source, dtype), _logits(card, dtype), ids)
    log.info("%s, computed in %s: %s", result.name, str(dtype).removeprefix("torch."), found)
    return found


def check_merged(source: Source, result: Path) -> Difference:
    """Like `compare`. Raises MartletError when a merge in float32 moved a logit by EXACT or more.

    Weights of 16 bits are rounded when they are written, so there the difference is only told. Two orders of the same
    sums in float32 can move a logit of 30 by more than EXACT, so where they do, float64 decides.
    """
    found = compare(source, result)
    if hub.resolve(str(result)).config.get("dtype") != "float32":
        return found
    if not found.largest < EXACT:
        log.info("float32 may round the sums of the two by as much: once more in float64, which decides")
        found = compare(source, result, torch.float64)
    if not found.largest < EXACT:
        raise MartletError(f"{result} is not the adapter on its base: {found}; wanted less than {EXACT}")
    log.info("%s is the adapter on its base: no logit differs by %g or more", result.name, EXACT)
    return found


def _texts(source: Source) -> list[list[int]]:
    tokenizer = hub.load_tokenizer(source.card)
    return [tokenizer.encode_prompt(text) for text in TEXTS]


def _logits(card: ModelCard, dtype: torch.dtype) -> Callable:
    model = load_model(card, LoadOptions(device="cpu", dtype="float32")).to(dtype)
    return lambda ids: model(ids).logits


def _by_us(card: ModelCard, checkpoint: Checkpoint, texts: list[list[int]]) -> Callable:
    """By our own decoder: transformers reads quantised layouts through a library for each."""
    try:
        known = LayerWise(card, checkpoint).run_all(texts)
    finally:
        checkpoint.close()
    return lambda ids: known[texts.index(ids[0].tolist())][None]


def _unmerged(source: Source, dtype: torch.dtype) -> Callable:
    """The source as it is: the adapter beside the base, by peft."""
    if source.adapter is None:
        return _logits(source.card, dtype)
    from peft import PeftModel

    from martlet.hub.peft import folder_of

    base = load_model(source.card, LoadOptions(device="cpu", dtype="float32"))
    model = PeftModel.from_pretrained(base, str(folder_of(source.adapter))).eval().to(dtype)
    return lambda ids: model(ids).logits
