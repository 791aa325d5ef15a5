"""Adapters to measure with: random ones, since how long a step takes does not depend on what they hold."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from martlet.hub.peft import Lora
from martlet.model.adapters import TARGETS, Adapter
from martlet.model.spec import DecoderSpec
from martlet.model.weights import parameters


def random_adapter(spec: DecoderSpec, rank: int, seed: int) -> Adapter:
    """On every linear of attention and of dense feed-forwards."""
    rng, loras = np.random.default_rng(seed), {}
    for parameter in parameters(spec):
        if parameter.kind == "linear" and parameter.name.removeprefix("layers.").partition(".")[2] in TARGETS:
            rows, columns = parameter.shape
            a, b = (rng.standard_normal(shape, np.float32) * 0.01 for shape in ((rank, columns), (rows, rank)))
            loras[parameter.name] = Lora(a, b, 1.0)
    return Adapter(Path("random"), None, rank, loras)
