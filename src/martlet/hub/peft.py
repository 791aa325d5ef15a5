"""LoRA adapters as PEFT writes them: adapter_config.json and adapter_model.safetensors, in the checkpoint's own names.

A folder of SWIFT is read as well: its tuner may sit in `default/`, and args.json (3.x, 4.x) or sft_args.json (2.x)
beside it tells of the base model. What PEFT can do and a sum `W + scale * B A` cannot is refused by name.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from martlet.errors import CheckpointError, InvalidRequest
from martlet.hub.files import read_json
from martlet.hub.safetensors_file import SafetensorsCheckpoint

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_KEY = re.compile(r"(?:base_model\.model\.)?(?P<module>.+?)\.lora_(?P<part>A|B|magnitude_vector)(?:\.\w+)?")
_CHANGES_BASE = ("pissa", "olora", "corda", "loftq")
_UNREADABLE = {  # options of a LoraConfig that need more than the sum
    "alora_invocation_tokens": "activated LoRA",
    "layer_replication": "layer replication",
    "lora_bias": "biases of lora_B",
    "megatron_config": "Megatron",
    "target_parameters": "LoRA on bare parameters",
    "trainable_token_indices": "trained tokens",
    "use_qalora": "QA-LoRA",
}


@dataclass(frozen=True, slots=True, eq=False)
class Lora:
    """What an adapter adds to one module: y += scale * (x @ a.T) @ b.T.

    a [rank, in], b [out, rank], as stored; magnitude [out] with DoRA, whose norms need the base weights. where: names
    of the two tensors.
    """

    a: np.ndarray
    b: np.ndarray
    scale: float
    magnitude: np.ndarray | None = None
    where: tuple[str, str] = ("", "")


@dataclass(frozen=True, slots=True, eq=False)
class PeftAdapter:
    """A folder, read into memory: a file that is overwritten later changes nothing.

    loras: by the checkpoint's name of the module ("model.layers.0.self_attn.q_proj"). saved: whole tensors that replace
    the checkpoint's own (modules_to_save, trained biases), by their names there. base: what the model that it was
    trained on was called, None where nothing says.
    """

    folder: Path
    base: str | None
    loras: Mapping[str, Lora] = field(default_factory=dict)
    saved: Mapping[str, np.ndarray] = field(default_factory=dict)


def folder_of(path: str | Path) -> Path | None:
    """The folder that holds the adapter at `path`: itself, or its `default`; None when there is no adapter."""
    path = Path(path).expanduser()
    return next((folder for folder in (path, path / "default") if (folder / CONFIG).is_file()), None)


def find(path: str | Path) -> Path:
    """Like `folder_of`, but raises InvalidRequest that says what there is instead."""
    folder = folder_of(path)
    if folder is None:
        raise _bad(_no_adapter(Path(path).expanduser()))
    return folder


@dataclass(frozen=True, slots=True)
class Origin:
    """What a checkpoint folder says it was made from. base: a name or path; model_type, template: SWIFT's keys."""

    base: str | None = None
    model_type: str | None = None
    template: str | None = None


def origin(path: str | Path) -> Origin:
    """Where the adapter or SWIFT checkpoint at `path` comes from: SWIFT's own notes before PEFT's.

    Raises CheckpointError for files that are there and no JSON.
    """
    path = Path(path).expanduser()
    folder = folder_of(path) or path
    base = read_json(folder / CONFIG, missing={}).get("base_model_name_or_path")
    for beside in dict.fromkeys((path, folder, folder.parent)):
        for name in ("args.json", "sft_args.json"):
            if not (beside / name).is_file():
                continue
            args = read_json(beside / name)
            is_old = name == "sft_args.json"
            told = (args.get("model_id_or_path") if is_old else args.get("model")) or base
            template = args.get("template_type") or args.get("template")
            return Origin(_text(told), _text(args.get("model_type")) if is_old else None, _text(template))
    return Origin(_text(base))


def rank_of(path: str | Path) -> int:
    """The largest rank that the config at `path` speaks of; 0 where it does not say."""
    folder = folder_of(path)
    config = {} if folder is None else read_json(folder / CONFIG)
    patterns = config.get("rank_pattern")
    ranks = [config.get("r"), *(patterns.values() if isinstance(patterns, dict) else ())]
    return max((rank for rank in ranks if isinstance(rank, int)), default=0)


def read(path: str | Path) -> PeftAdapter:
    """The adapter at `path`, checked as far as it can be without a model.

    Raises InvalidRequest naming the file and what in it cannot be served, and what would work.
    """
    folder = find(path)
    try:
        config = read_json(folder / CONFIG)
        _check_config(folder, config)
        if not (folder / WEIGHTS).is_file():
            raise _bad(_no_weights(folder))
        checkpoint = SafetensorsCheckpoint(folder / WEIGHTS)
        tensors = {name: np.array(checkpoint.tensor(name)) for name in checkpoint.names()}
        checkpoint.close()
        base = origin(path).base
    except CheckpointError as error:
        raise _bad(str(error)) from None
    for name, tensor in tensors.items():
        if tensor.dtype.kind not in "fV" and tensor.dtype.name != "bfloat16":
            raise _bad(f"{folder / WEIGHTS}: tensor {name} holds {tensor.dtype.name}, not floating-point numbers")
        if not np.isfinite(tensor.astype(np.float32)).all():
            raise _bad(f"{folder / WEIGHTS}: tensor {name} holds NaN or infinity; the training went wrong")
    return _assemble(folder, config, base, tensors)


def _assemble(
    folder: Path, config: Mapping[str, Any], base: str | None, tensors: Mapping[str, np.ndarray]
) -> PeftAdapter:
    parts: dict[str, dict[str, tuple[str, np.ndarray]]] = {}
    saved: dict[str, np.ndarray] = {}
    for name, tensor in tensors.items():
        if found := _KEY.fullmatch(name.removesuffix(".weight")):
            parts.setdefault(found["module"], {})[found["part"]] = name, tensor
        elif "lora_embedding_" in name:
            raise _bad(f"{folder / WEIGHTS}: tensor {name}: LoRA on an embedding cannot be served; train without it")
        elif "lora_" in name:
            raise _bad(f"{folder / WEIGHTS}: tensor {name} is none of lora_A, lora_B and lora_magnitude_vector")
        else:
            saved[name.removeprefix("base_model.model.")] = tensor
    loras = {module: _lora(folder, config, module, found) for module, found in parts.items()}
    if not loras and not saved:
        raise _bad(f"{folder / WEIGHTS} holds no tensors")
    return PeftAdapter(folder, base, loras, saved)


def _lora(folder: Path, config: Mapping[str, Any], module: str, found: Mapping[str, tuple[str, np.ndarray]]) -> Lora:
    if missing := {"A", "B"} - found.keys():
        raise _bad(f"{folder / WEIGHTS}: {module} has no lora_{missing.pop()}")
    (a_name, a), (b_name, b) = found["A"], found["B"]
    if a.ndim != 2 or b.ndim != 2 or a.shape[0] != b.shape[1]:
        raise _bad(
            f"{folder / WEIGHTS}: {a_name} {list(a.shape)} and {b_name} {list(b.shape)} make no [rank, in] and "
            "[out, rank] of a linear layer"
        )
    rank = len(a)
    told = _by_pattern(folder, config.get("rank_pattern"), module, config.get("r"))
    if told is not None and told != rank:
        raise _bad(f"{folder / WEIGHTS}: {a_name} {list(a.shape)} has rank {rank}, but {CONFIG} says {told}")
    alpha = _by_pattern(folder, config.get("alpha_pattern"), module, config.get("lora_alpha", rank))
    if not rank or not isinstance(alpha, int | float):
        raise _bad(f"{folder}: {module} has rank {rank} and lora_alpha {alpha!r}; both must be numbers above 0")
    scale = alpha / (rank**0.5 if config.get("use_rslora") else rank)
    magnitude = found.get("magnitude_vector")
    if config.get("use_dora") and magnitude is None:
        raise _bad(f"{folder / WEIGHTS}: {module} has no lora_magnitude_vector, though {CONFIG} says use_dora")
    return Lora(a, b, scale, None if magnitude is None else magnitude[1].reshape(-1), (a_name, b_name))


def _by_pattern(folder: Path, patterns: Any, module: str, default: Any) -> Any:
    """PEFT's rule: a key is a regular expression for the end of a module's name; the first that fits counts."""
    for pattern, value in patterns.items() if isinstance(patterns, dict) else ():
        try:
            if re.match(rf"(.*\.)?({pattern})$", module):
                return value
        except re.error as error:
            raise _bad(f"{folder / CONFIG}: {pattern!r} is no regular expression: {error}") from None
    return default


def _check_config(folder: Path, config: Mapping[str, Any]) -> None:
    kind = str(config.get("peft_type", "")).upper()
    if kind != "LORA":
        raise _bad(f"{folder / CONFIG}: peft_type is {kind or 'missing'}; only LORA can be served")
    for option, what in _UNREADABLE.items():
        if config.get(option):
            raise _bad(f"{folder / CONFIG}: {option} is set, and {what} cannot be served")
    start = str(config.get("init_lora_weights", True)).lower()
    if start.startswith(_CHANGES_BASE):
        raise _bad(
            f"{folder / CONFIG}: init_lora_weights {start!r} changed the base weights too; save the adapter with "
            "save_pretrained(path_initial_model_for_weight_conversion=...), which makes a plain LoRA of it"
        )


def _no_adapter(path: Path) -> str:
    if not path.exists():
        return f"adapter {path}: there is no such folder"
    if (path / "config.json").is_file():
        return f"{path} is a whole model, not an adapter; give it as the model"
    names = ", ".join(sorted(file.name for file in path.iterdir())[:8]) if path.is_dir() else "a file"
    return f"adapter {path} has no {CONFIG}; it holds {names or 'nothing'}"


def _no_weights(folder: Path) -> str:
    if any(folder.glob("adapter_model.bin")):
        return (
            f"{folder} holds adapter_model.bin, a pickle, which is never read; "
            "model.save_pretrained(folder) of peft writes safetensors"
        )
    return f"{folder} has a {CONFIG} but no {WEIGHTS}"


def _text(value: Any) -> str | None:
    return value if isinstance(value, str) and value else None


def _bad(message: str) -> InvalidRequest:
    return InvalidRequest(message, param="adapters")
