"""Folders and files that appear whole or not at all: written beside their place, then renamed."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from uuid import uuid4

import numpy as np
import torch
from safetensors.torch import save_file

from martlet.errors import MartletError, UsageError
from martlet.hub.card import ModelCard
from martlet.hub.files import INDEX
from martlet.train import layout

SHARD_BYTES = 4 << 30


@contextmanager
def staged(target: Path, *, replace: bool = False) -> Iterator[Path]:
    """A path beside `target` to write to; it becomes `target` when the block ends well and vanishes when it does not.

    Raises UsageError when there is something already and `replace` is off; MartletError when the disk is full.
    """
    if target.exists() and not replace:
        raise UsageError(f"{target} exists; --replace_if_exists true writes over it", param="replace_if_exists")
    if not target.parent.is_dir():
        raise UsageError(f"there is no folder {target.parent} to write {target.name} to", param="output")
    beside = target.with_name(f".{uuid4().hex[:8]}.{target.name}")  # the suffix tells what it is
    try:
        yield beside
        _remove(target)
        beside.rename(target)
    except Exception as error:  # safetensors raises its own error for a full disk
        if why := layout.no_room(error, target.parent):
            raise MartletError(why) from error
        raise
    finally:
        _remove(beside)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def write_weights(folder: Path, tensors: Iterable[tuple[str, np.ndarray]]) -> None:
    """model.safetensors, or shards of SHARD_BYTES and their index."""
    shards: list[list[str]] = []
    held: dict[str, torch.Tensor] = {}
    total = size = 0

    def flush() -> None:
        save_file(held, str(folder / f"part-{len(shards)}"), metadata={"format": "pt"})
        shards.append(list(held))
        held.clear()

    for name, values in tensors:
        if held and size + values.nbytes > SHARD_BYTES:
            flush()
            size = 0
        held[name] = _as_torch(values)
        size, total = size + values.nbytes, total + values.nbytes
    flush()
    if len(shards) == 1:
        (folder / "part-0").rename(folder / "model.safetensors")
        return
    homes = {}
    for i, names in enumerate(shards):
        file = f"model-{i + 1:05}-of-{len(shards):05}.safetensors"
        (folder / f"part-{i}").rename(folder / file)
        homes |= dict.fromkeys(names, file)
    write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": homes})


def _as_torch(values: np.ndarray) -> torch.Tensor:
    if values.dtype.name == "bfloat16":
        return torch.from_numpy(values.view(np.int16).copy()).view(torch.bfloat16)
    return torch.from_numpy(np.array(values, order="C"))


def write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, ensure_ascii=False, indent=2, default=str) + "\n", encoding="utf-8")


def write_beside(folder: Path, card: ModelCard, **changes: Any) -> None:
    """config.json (with `changes`), generation_config.json and the tokenizer of `card`."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as CLASSES

    from martlet import hub

    config = {key: value for key, value in card.config.items() if key not in ("torch_dtype", "quantization_config")}
    if config.get("model_type") in CLASSES:
        config.setdefault("architectures", [CLASSES[config["model_type"]]])
    write_json(folder / "config.json", config | changes)
    if card.generation_config:
        write_json(folder / "generation_config.json", card.generation_for_transformers())
    hub.load_tokenizer(card).save(folder)
