"""Mixtral: Mistral with a mixture of experts in every layer, two of them for each token."""

from __future__ import annotations

from martlet.model.families.experts import read_mlps
from martlet.model.families.family import HF, Config, Family, need
from martlet.model.families.llama import decoder
from martlet.model.spec import DecoderSpec


def read(config: Config) -> DecoderSpec:
    windows = [config.get("sliding_window")] * need(config, "num_hidden_layers")
    return decoder("mixtral", config, windows=windows, mlps=read_mlps(config, count=8, active=2, renormalise=True))


_MOE = "model.layers.{n}.block_sparse_moe."
NAMES = {
    **HF,
    "layers.router": _MOE + "gate",
    "layers.experts.gate": _MOE + "experts.{e}.w1",
    "layers.experts.down": _MOE + "experts.{e}.w2",
    "layers.experts.up": _MOE + "experts.{e}.w3",
}
FAMILY = Family(
    "mixtral",
    read,
    "Mixtral 8x7B and 8x22B",
    example={"num_local_experts": 4},
    hf=NAMES,
    gguf_interleaved=True,  # GGUF stores Mixtral under the architecture llama
)
