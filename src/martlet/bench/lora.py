"""Adapters to measure with: random ones, since how long a step takes does not depend on what they hold."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

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


def peft_folder(folder: Path, config: dict[str, Any], rank: int) -> Path:
    """A random adapter as PEFT writes it, for a model of llama's names, on every linear of its layers."""
    from safetensors.numpy import save_file

    width, hidden, heads = config["hidden_size"], config["intermediate_size"], config["num_attention_heads"]
    dim = config.get("head_dim") or width // heads
    q, kv = heads * dim, config["num_key_value_heads"] * dim
    shapes = {
        "self_attn.q_proj": (width, q), "self_attn.k_proj": (width, kv), "self_attn.v_proj": (width, kv),
        "self_attn.o_proj": (q, width), "mlp.gate_proj": (width, hidden), "mlp.up_proj": (width, hidden),
        "mlp.down_proj": (hidden, width),
    }  # fmt: skip
    rng, tensors = np.random.default_rng(0), {}
    for layer in range(config["num_hidden_layers"]):
        for name, (inputs, outputs) in shapes.items():
            at = f"base_model.model.model.layers.{layer}.{name}"
            for part, shape in (("A", (rank, inputs)), ("B", (outputs, rank))):
                tensors[f"{at}.lora_{part}.weight"] = (rng.standard_normal(shape, np.float32) * 0.01).astype(np.float16)
    save_file(tensors, str(folder / "adapter_model.safetensors"))
    told = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": rank, "lora_alpha": rank, "bias": "none"}
    told |= {"base_model_name_or_path": "", "target_modules": [name.partition(".")[2] for name in shapes]}
    (folder / "adapter_config.json").write_text(json.dumps(told), encoding="utf-8")
    return folder
