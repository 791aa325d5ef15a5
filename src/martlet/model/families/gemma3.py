"""Gemma 3 with vision (4B and larger): its language model, under other names. Images are not read."""

from __future__ import annotations

from martlet.model.families import gemma3_text
from martlet.model.families.family import Config, Family, need
from martlet.model.spec import DecoderSpec

# what the text part of a published config leaves to transformers' defaults
DEFAULTS = {
    "vocab_size": 262_208,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 131_072,
    "tie_word_embeddings": True,
}


def read(config: Config) -> DecoderSpec:
    return gemma3_text.read({**DEFAULTS, **need(config, "text_config")})


FAMILY = Family(
    "gemma3",
    read,
    "Gemma 3 with vision (4B to 27B), text only",
    example={
        "text_config": {
            "hidden_size": 64,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "head_dim": 16,
            "vocab_size": 128,
        }
    },
    hf={ours: f"language_model.{theirs}" for ours, theirs in gemma3_text.NAMES.items()},
    gguf=None,  # its GGUF files hold the text part alone, as gemma3_text
    norm_offset=1.0,
)
