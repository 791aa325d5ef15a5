"""Baichuan 7B and Baichuan2 7B: LLaMA's shape with q, k and v in one tensor; the second normalises the head's rows.

The 13B models have ALiBi in place of rotary embedding, which no kernel here has.
"""

from __future__ import annotations

from martlet.errors import CheckpointError
from martlet.model.families.family import HF, Config, Family, fused, need
from martlet.model.families.llama import decoder
from martlet.model.spec import DecoderSpec

VOCAB_OF_TWO = 125_696  # the one thing by which a config tells Baichuan2 from Baichuan


def read(config: Config) -> DecoderSpec:
    if config.get("max_position_embeddings") is None or need(config, "num_hidden_layers") == 40:
        raise CheckpointError("Baichuan 13B uses ALiBi, which is not supported; Baichuan and Baichuan2 7B are")
    return decoder("baichuan", config)


FAMILY = Family(
    "baichuan",
    read,
    "Baichuan 7B, Baichuan2 7B",
    hf=HF | fused("model.layers.{n}.self_attn.W_pack", "q", "k", "v"),
    gguf_interleaved=True,
    unit_head=lambda spec: spec.vocab_size == VOCAB_OF_TWO,
)
