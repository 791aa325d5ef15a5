"""Which runners can run a decoder: asked by `runners.load` in practice, and by `martlet models families`. No torch."""

from __future__ import annotations

from martlet.errors import BackendUnavailable
from martlet.model.spec import DecoderSpec
from martlet.runners.base import LoadOptions
from martlet.runners.cpu_runner.decoder import check


def runners_for(spec: DecoderSpec) -> tuple[str, ...]:
    """Some of "c++", "cuda" and "torch"; torch runs everything, on any device, more slowly."""
    try:
        check(spec, LoadOptions().block_size)
        native: tuple[str, ...] = ("c++",)
    except BackendUnavailable:
        native = ()
    return (*native, *(("cuda",) if cuda_lacks(spec) is None else ()), "torch")


def cuda_lacks(spec: DecoderSpec) -> str | None:
    """What the CUDA runner cannot do of this decoder, in words."""
    if spec.recurrent:
        return "recurrences"
    return "mixtures of experts" if any(layer.mlp.experts for layer in spec.layers) else None
