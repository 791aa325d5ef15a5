"""An adapter merged into its base, as a folder that transformers, vLLM and we read; SWIFT's `CKPT-merged`."""

from __future__ import annotations

import hashlib
import logging
import shutil
from dataclasses import fields
from pathlib import Path

from martlet.errors import UsageError
from martlet.export import folder
from martlet.export.source import Source, tensors
from martlet.hub import peft
from martlet.train import layout
from martlet.train.arguments import TunerArguments

log = logging.getLogger("martlet")

DTYPES = {"AUTO": None, "bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}
ADAPTER_KEYS = {field.name for field in fields(TunerArguments)} | {"adapter", "adapters", "resume_from_checkpoint"}
HASH = "merged_adapter_sha256"


def merge(source: Source, target: Path, *, dtype: str = "AUTO", replace: bool = False) -> Path:
    """Write the merged model to `target`; nothing is done when it is there and of the same adapter, base and dtype.

    Sums are made in float64 and rounded once. Raises UsageError when the target is of another adapter and `replace`
    is off, or when there is no adapter.
    """
    if source.adapter is None:
        raise UsageError("--merge_lora needs --ckpt_dir with an adapter", param="ckpt_dir")
    digest = fingerprint(source, dtype)
    if target.exists() and not replace:
        if (target / "config.json").is_file() and layout.read_args(target).get(HASH) == digest:
            log.info("%s is this adapter merged already", target)
            return target
        raise UsageError(
            f"{target} exists and is not made of this adapter as it is now; --replace_if_exists true writes it anew",
            param="replace_if_exists",
        )
    with folder.staged(target, replace=replace) as beside:
        beside.mkdir()
        kinds = set()

        def counted():
            for name, values in tensors(source, DTYPES[dtype]):
                kinds.add(values.dtype.name)
                yield name, values

        folder.write_weights(beside, counted())
        kind = next((name for name in ("bfloat16", "float16") if name in kinds), "float32")
        folder.write_beside(beside, source.card, dtype=kind)
        said = {key: value for key, value in layout.read_args(source.adapter).items() if key not in ADAPTER_KEYS}
        told = said | {"sft_type": "full", "merged_from": str(source.adapter), HASH: digest}
        told.setdefault("base", source.card.name)
        told |= {"model_type": said.get("model_type") or source.card.model_type, "model": None}
        told["template_type"] = said.get("template_type") or said.get("template") or source.card.template
        for name in layout.ARGS:
            folder.write_json(beside / name, told)
    return target


def fingerprint(source: Source, dtype: str) -> str:
    """Of the adapter's two files, the base's path and the wanted type."""
    home = peft.folder_of(source.adapter)
    digest = hashlib.sha256(f"{source.card.path.resolve()}\n{dtype}\n".encode())
    for name in (peft.CONFIG, peft.WEIGHTS):
        if (home / name).is_file():
            digest.update(hashlib.sha256((home / name).read_bytes()).digest())
    return digest.hexdigest()


def to_peft(source: Source, target: Path, *, replace: bool = False) -> Path:
    """The adapter as a plain PEFT folder; where it is one already, its own folder."""
    if source.adapter is None:
        raise UsageError("--to_peft_format needs --ckpt_dir with an adapter", param="ckpt_dir")
    home = peft.folder_of(source.adapter)
    if home == source.adapter:
        log.info("%s is in PEFT's format already", home)
        return home
    peft.read(source.adapter)
    with folder.staged(target, replace=replace) as beside:
        shutil.copytree(home, beside)
        for name in layout.ARGS:
            if (source.adapter / name).is_file():
                shutil.copy2(source.adapter / name, beside / name)
    return target
