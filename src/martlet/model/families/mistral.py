"""Mistral 7B and Zephyr: LLaMA's shape; the first version looks back through a sliding window."""

from __future__ import annotations

from martlet.model.families.family import Config, Family, need
from martlet.model.families.llama import decoder
from martlet.model.spec import DecoderSpec


def read(config: Config) -> DecoderSpec:
    return decoder("mistral", config, windows=[config.get("sliding_window", 4096)] * need(config, "num_hidden_layers"))


# GGUF stores Mistral under the architecture llama
FAMILY = Family("mistral", read, "Mistral 7B, Zephyr", gguf_interleaved=True)
