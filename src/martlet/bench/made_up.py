"""A model folder made from a config alone: with `--load_format dummy` it can be served, text and all, and measured."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any


def model_folder(folder: Path, config: dict[str, Any]) -> Path:
    """config.json and tokenizer.json in `folder`; the tokenizer has as many tokens as the config's vocabulary."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    (folder / "tokenizer.json").write_text(_tokenizer(config["vocab_size"]), encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}))
    return folder


def _tokenizer(size: int) -> str:
    """A byte-level vocabulary: the bytes, then made-up words, half of them with a space in front."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    numbers = random.Random(0)
    words = dict.fromkeys(sorted(pre_tokenizers.ByteLevel.alphabet()))
    while len(words) < size:
        letters = "".join(numbers.choices("aeinorstlhdcmu", k=numbers.randint(2, 8)))
        words["Ġ" * numbers.randint(0, 1) + letters] = None
    core = Tokenizer(models.BPE({word: number for number, word in enumerate(words)}, []))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    return core.to_str()
