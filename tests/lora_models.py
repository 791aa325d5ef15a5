"""A small random model on disk and adapters for it, made by plain PEFT, with PEFT's own answers to compare with."""

from __future__ import annotations

import copy
import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import peft
import torch
import transformers

from martlet.hub.card import ModelCard

torch.set_num_threads(1)  # for matrices this small a second thread only waits
VOCAB = 97
SHAPE = {
    "vocab_size": VOCAB,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 256,
    "initializer_range": 0.15,
    "tie_word_embeddings": True,
}
KINDS = [  # of adapters, as LoraConfig takes them
    {},
    {"r": 8, "target_modules": ["q_proj", "v_proj"]},
    {"r": 2, "use_rslora": True},
    {"r": 16, "target_modules": ["gate_proj", "up_proj", "down_proj"]},
    {"rank_pattern": {"o_proj": 3}},
    {"target_modules": r".*layers\.1\..*_proj"},
]


def make_base(folder: Path, kind: str = "Qwen3", **changes) -> tuple[ModelCard, torch.nn.Module]:
    torch.manual_seed(5)
    config = getattr(transformers, kind + "Config")(**(SHAPE | changes))
    model = getattr(transformers, kind + "ForCausalLM")(config).eval()
    model.generation_config = transformers.GenerationConfig(eos_token_id=None)
    model.save_pretrained(folder)
    return ModelCard("tiny", folder, "safetensors", kind.lower(), config=model.config.to_dict()), model


@dataclass(frozen=True, slots=True)
class Tuned:
    """An adapter on disk. model: PEFT's own, with it on top of the base."""

    path: Path
    model: torch.nn.Module

    def logprobs(self, tokens) -> np.ndarray:
        """After the last token, float32 [vocab]."""
        with torch.no_grad():
            logits = self.model(torch.tensor([list(tokens)])).logits
        return logits[0, -1].float().log_softmax(-1).numpy()

    def merged(self) -> torch.nn.Module:
        return copy.deepcopy(self.model).merge_and_unload()


def tune(model: torch.nn.Module, folder: Path, *, seed: int = 0, size: float = 0.15, **config) -> Tuned:
    """As if trained: random A and B. config: of peft.LoraConfig."""
    settings = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear"} | config
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tuned = peft.get_peft_model(copy.deepcopy(model), peft.LoraConfig(**settings)).eval()
        torch.manual_seed(seed)
        with torch.no_grad():
            for name, parameter in tuned.named_parameters():
                if "lora_B" in name:
                    parameter.normal_(0, size)
                elif "magnitude" in name or "modules_to_save" in name:
                    parameter.mul_(1 + 0.3 * torch.rand_like(parameter))
        tuned.save_pretrained(folder)
    return Tuned(folder, tuned)


def greedy(model: torch.nn.Module, prompts: list[list[int]], count: int) -> list[list[int]]:
    """What transformers answers to each. Padding stands to the right, where no earlier token sees it."""
    lengths = torch.tensor([len(prompt) for prompt in prompts])
    ids = torch.zeros(len(prompts), int(lengths.max()) + count, dtype=torch.long)
    for row, prompt in zip(ids, prompts, strict=True):
        row[: len(prompt)] = torch.tensor(prompt)
    every = torch.arange(len(prompts))
    with torch.no_grad():
        for step in range(count):
            logits = model(ids[:, : int(lengths.max()) + step]).logits
            ids[every, lengths + step] = logits[every, lengths + step - 1].argmax(-1)
    return [row[n : n + count].tolist() for row, n in zip(ids, lengths.tolist(), strict=True)]
