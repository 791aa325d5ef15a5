"""A config for RWKV checkpoints in their authors' names, which come without one: the shapes tell it all."""

from __future__ import annotations

from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

from martlet.errors import CheckpointError

CONVERT = (
    'Convert it to safetensors once, where you trust it: python -c "import torch; from safetensors.torch import '
    "save_file; save_file({k: v.contiguous() for k, v in torch.load('model.pth', map_location='cpu', "
    "weights_only=True).items()}, 'folder/model.safetensors')\", and give the folder as the model"
)
"""What to do with a .pth file."""


def read_config(folder: Path) -> dict[str, Any] | None:
    """The config of a folder that holds a config-less RWKV checkpoint; None when it holds something else."""
    if (folder / "adapter_config.json").is_file() or not any(folder.glob("*.safetensors")):
        return None
    from martlet.hub.safetensors_file import SafetensorsCheckpoint

    checkpoint = SafetensorsCheckpoint(folder)
    try:
        names = set(checkpoint.names())
        return config_from(names, checkpoint.shape) if is_original(names) else None
    finally:
        checkpoint.close()


def is_original(names: Collection[str]) -> bool:
    return "emb.weight" in names and "blocks.0.att.key.weight" in names


def config_from(names: Collection[str], shape: Callable[[str], tuple[int, ...]]) -> dict[str, Any]:
    """What config.json would say. Raises CheckpointError for version 4."""

    def has(name: str) -> bool:
        return f"blocks.0.att.{name}" in names

    def sizes(name: str) -> list[int]:
        return [size for size in shape(f"blocks.0.att.{name}") if size != 1]

    if not has("ln_x.weight"):
        raise CheckpointError("this is an RWKV of version 4 or before; versions 5, 6 and 7 can be run")
    vocabulary, width = shape("emb.weight")
    config: dict[str, Any] = {
        "hidden_size": width,
        "vocab_size": vocabulary,
        "num_hidden_layers": 1 + max(int(name.split(".")[1]) for name in names if name.startswith("blocks.")),
        "intermediate_size": shape("blocks.0.ffn.key.weight")[0],
        "eos_token_id": 0,
    }
    if has("r_k"):
        maps = {"decay": "w1", "a": "a1", "gate": "g1"}
        ranks = {f"{name}_low_rank_dim": sizes(tensor)[-1] for name, tensor in maps.items()}
        value = "blocks.1.att.v1"  # the first layer's, where it has one, does nothing
        ranks["v_low_rank_dim"] = shape(value)[-1] if value in names else 1
        config |= {"model_type": "rwkv7", "head_dim": sizes("r_k")[-1], "group_norm_epsilon": 64e-5}
        return config | ranks
    bonus = "time_faaaa" if has("time_faaaa") else "time_first"
    config |= {"head_size": width // shape(f"blocks.0.att.{bonus}")[0]}
    if has("time_maa_x"):
        ranks = {"mix_low_rank_dim": sizes("time_maa_w1")[-1] // 5, "decay_low_rank_dim": sizes("time_decay_w1")[-1]}
        return config | ranks | {"model_type": "rwkv6"}
    version = "5_2" if len(sizes("time_decay")) > 1 else "5_1" if has("gate.weight") else "5_0"
    return config | {"model_type": "rwkv5", "model_version": version, "log_bonus": bonus == "time_first"}
