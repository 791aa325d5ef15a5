"""What is exported: a model, or an adapter and the base that it belongs to."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from martlet import hub
from martlet.errors import UsageError
from martlet.export.arguments import ExportArguments
from martlet.hub import peft
from martlet.hub.card import ModelCard
from martlet.hub.checkpoint import Checkpoint, PackedTensor, Tensor
from martlet.hub.merged import MergedCheckpoint
from martlet.model import families, weights


@dataclass(frozen=True, slots=True)
class Source:
    """card: the model, or the base of `adapter` (a checkpoint folder). place: what results are written beside."""

    card: ModelCard
    adapter: Path | None
    place: Path


def find(arguments: ExportArguments) -> Source:
    """Raises UsageError for flags that name nothing, or an adapter whose base nobody knows."""
    name = arguments.model or arguments.model_id_or_path
    adapter = None
    place = None
    if arguments.ckpt_dir is not None:
        place = Path(arguments.ckpt_dir).expanduser().resolve()
        if not place.is_dir():
            raise UsageError(f"--ckpt_dir: there is no folder {place}", param="ckpt_dir")
        if peft.folder_of(place) is None:
            name = str(place)
        else:
            adapter = place
    model_type = arguments.model_type
    if adapter is not None:
        origin = peft.origin(adapter)
        name = name or (None if model_type else origin.base or origin.model_type)
        if name is None and model_type is None:
            raise UsageError(f"{adapter} does not say what it was trained on; --model NAME does", param="model")
    if name is None and model_type is None:
        raise UsageError("what is to be exported? --ckpt_dir DIR, or --model NAME", param="ckpt_dir")
    card = hub.resolve(name or model_type, model_type=model_type if name else None, revision=arguments.model_revision)
    if card.config.get("quantization_config"):
        raise UsageError(f"{card.path} is quantised already; give the model it was made of", param="model")
    return Source(card, adapter, place or _beside(card))


def _beside(card: ModelCard) -> Path:
    """A model that the user keeps: results lie beside it. One of a cache: in the current folder, under its name."""
    if Path(card.source).exists():
        path = card.path.resolve()
        return path.with_suffix("") if path.suffix == ".gguf" else path
    return Path.cwd() / card.name.replace("/", "--")


class HuggingFaceNames:
    """A GGUF checkpoint under the names, and in the order of rows, that Hugging Face's checkpoints have."""

    def __init__(self, card: ModelCard):
        self._card, self._spec, self._checkpoint = card, weights.read_spec(card), hub.open_checkpoint(card)
        family = families.get(card.family)
        self._homes = {}
        for parameter in weights.parameters(self._spec):
            source = family.source(self._spec, parameter.name, "safetensors")
            if source.rows is not None or source.item is not None:
                raise UsageError(
                    f"{card.name}: matrices of family {card.family} are fused in Hugging Face's layout and apart in "
                    "GGUF; give its safetensors checkpoint with --model",
                    param="model",
                )
            self._homes[source.name] = parameter, source

    def names(self) -> list[str]:
        return list(self._homes)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._homes[name][0].shape

    def where(self, name: str) -> str:
        return str(self._card.path)

    def tensor(self, name: str) -> Tensor:
        parameter, source = self._homes[name]
        tensor = weights.fetch(self._card, self._spec, self._checkpoint, parameter)
        if isinstance(tensor, PackedTensor) or not source.add:
            return tensor
        return tensor.astype(np.float32) - np.float32(source.add)

    def close(self) -> None:
        self._checkpoint.close()


def open_source(source: Source) -> Checkpoint:
    """The weights in Hugging Face's names, the adapter merged in."""
    base = HuggingFaceNames(source.card) if source.card.format == "gguf" else hub.open_checkpoint(source.card)
    return base if source.adapter is None else MergedCheckpoint(base, source.adapter)


def tensors(source: Source, dtype: str | None) -> Iterator[tuple[str, np.ndarray]]:
    """Every tensor in Hugging Face's names. dtype: numpy's name, None for the checkpoint's own (GGUF: float32)."""
    import ml_dtypes

    kind = {None: None, "bfloat16": ml_dtypes.bfloat16}.get(dtype, dtype)
    if source.card.format == "gguf" and kind is None:
        kind = np.float32
    if source.card.format == "gguf" or source.adapter is None or kind is None:
        checkpoint = open_source(source)
    else:  # the sum is rounded once, to the wanted type
        checkpoint = MergedCheckpoint(_Float32(hub.open_checkpoint(source.card)), source.adapter)
    try:
        for name in checkpoint.names():
            tensor = checkpoint.tensor(name)
            tensor = tensor.dequantise() if isinstance(tensor, PackedTensor) else tensor
            yield name, tensor if kind is None else tensor.astype(kind)
    finally:
        checkpoint.close()


class _Float32:
    """A checkpoint whose numbers are float32."""

    def __init__(self, checkpoint: Checkpoint):
        self._checkpoint = checkpoint
        self.names, self.shape, self.where = checkpoint.names, checkpoint.shape, checkpoint.where
        self.close = checkpoint.close

    def tensor(self, name: str) -> Tensor:
        return self._checkpoint.tensor(name).astype(np.float32)


def merged_in_float32(source: Source) -> tuple[ModelCard, Checkpoint]:
    """The weights under the names that a card's format has, the adapter merged in; sums are not rounded.

    A GGUF base that is merged gets Hugging Face's names.
    """
    card = source.card
    if source.adapter is None:
        return card, hub.open_checkpoint(card)
    base = HuggingFaceNames(card) if card.format == "gguf" else _Float32(hub.open_checkpoint(card))
    return replace(card, format="safetensors"), MergedCheckpoint(base, source.adapter)
