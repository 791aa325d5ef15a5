"""What number formats cost in quality: log-probabilities of real text, against the same checkpoint in float32."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from martlet import hub, runners
from martlet.bench import workloads
from martlet.engine.engine import Engine, drain
from martlet.engine.options import EngineOptions
from martlet.engine.request import Request
from martlet.errors import UsageError
from martlet.hub.card import ModelCard
from martlet.runners.base import LoadOptions
from martlet.runners.quality import Quality
from martlet.sampling_params import SamplingParams

CONTEXT = 1024  # tokens a text is cut into at most


def passages(card: ModelCard, tokens: int, text: str | None = None) -> list[list[int]]:
    """Token ids of real text (W3's prompts, or `text`), of which `tokens` have one before them to be predicted from."""
    longest = min(CONTEXT, card.config.get("max_position_embeddings", CONTEXT) - 1)
    source = "\n\n".join(dict.fromkeys(workloads.load("W3").texts)) if text is None else text
    ids = hub.load_tokenizer(card).encode(source)
    found: list[list[int]] = []
    while tokens and len(ids) > 1:
        found.append(ids[: min(longest, tokens + 1)])
        tokens -= len(found[-1]) - 1
        ids = ids[len(found[-1]) :]
    if tokens:
        raise UsageError(f"the text is {tokens} tokens too short", param="tokens")
    return found


def measure(card: ModelCard, quants: Sequence[str], texts: Sequence[Sequence[int]], command: str) -> Iterator[Quality]:
    """A measurement for each of `quants`."""
    exact, _ = logprobs(card, "float32", texts)
    for quant in quants:
        scores, isa = logprobs(card, quant, texts)
        change, loss = float(np.abs(scores - exact).mean()), float((exact - scores).mean())
        yield Quality(card.name, card.format, quant, isa, len(scores), round(change, 4), round(loss, 4), command)


def logprobs(card: ModelCard, quant: str | None, texts: Sequence[Sequence[int]]) -> tuple[np.ndarray, str]:
    """Log-probability of every token that has one before it, float64 [n]; and the kernels' instruction set."""
    longest = max(map(len, texts)) + 1
    runner = runners.load(card, LoadOptions(device="cpu", quant=quant, max_model_len=longest, max_num_seqs=1))
    engine = Engine(runner, options=EngineOptions(enable_prefix_caching=False))
    try:
        params = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0)
        outputs = drain(engine, [Request(str(i), list(text), params) for i, text in enumerate(texts)])
        for output in outputs:
            if output.error is not None:
                raise output.error
        entries = [e for output in outputs for e in (output.prompt_logprobs or ()) if e is not None]
        executor = getattr(runner, "executor", None)
        return np.array([e.logprob for e in entries], np.float64), "torch" if executor is None else executor.isa
    finally:
        engine.close()
