"""A LoRA adapter in our names, checked against the decoder it is to run on. PEFT's files: martlet.hub.peft."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from martlet.errors import InvalidRequest, MartletError
from martlet.hub import peft, registry
from martlet.hub.card import ModelCard
from martlet.model import families
from martlet.model.families.family import Source, split_name
from martlet.model.shard import Part
from martlet.model.spec import TARGETS, DecoderSpec
from martlet.model.weights import ParameterSpec, parameters, read_spec


@dataclass(frozen=True, slots=True, eq=False)
class Delta:
    """What an adapter adds to one linear: y += (x @ a.T) @ b.T. a [rank, in], b [out, rank], the scale in it; f32."""

    a: np.ndarray
    b: np.ndarray


@dataclass(frozen=True, slots=True, eq=False)
class Adapter:
    """An adapter in host memory. loras: by our name of the linear, "layers.3.q". rank: the largest of them.

    `delta` gives what runners want; the tensors themselves stay in the dtype of the file.
    """

    path: Path
    base: str | None
    rank: int
    loras: Mapping[str, peft.Lora]

    def delta(self, name: str) -> Delta | None:
        """Of the linear called `name`; None where the adapter leaves it alone."""
        lora = self.loras.get(name)
        if lora is None:
            return None
        scaled = lora.b.astype(np.float32) * np.float32(lora.scale)
        return Delta(np.ascontiguousarray(lora.a, np.float32), np.ascontiguousarray(scaled))

    @property
    def nbytes(self) -> int:
        return sum(lora.a.nbytes + lora.b.nbytes for lora in self.loras.values())

    @property
    def is_idle(self) -> bool:
        """Whether it changes nothing: every B is zero, as before the first step of training."""
        return not any(lora.b.any() for lora in self.loras.values())


def read(path: str | Path, card: ModelCard, spec: DecoderSpec, max_rank: int) -> Adapter:
    """The adapter at `path` for the decoder `spec` of `card`.

    Raises InvalidRequest naming the tensor and the shapes when it was trained on another model, is of a higher rank
    than `max_rank`, or does what only a merged model can.
    """
    found = peft.read(path)
    _check_kind(found)
    _check_base(found, card)
    homes = _homes(card, spec)
    loras: dict[str, peft.Lora] = {}
    for module, lora in found.loras.items():
        if module not in homes:
            raise _bad(found, f"tensor {lora.where[0]}: {card.name} has no linear {module}{_near(homes)}")
        parts = homes[module]
        if any(split_name(part.name)[0].removeprefix("layers.") not in TARGETS for part, _ in parts):
            raise _bad(
                found,
                f"tensor {lora.where[0]}: LoRA on {module} is served merged only (--ckpt_dir PATH --merge_lora true); "
                f"beside others it may be on {', '.join(TARGETS)}",
            )
        part, source = parts[0]
        outputs, inputs = source.shape(part.shape)
        if lora.a.shape[1] != inputs or len(lora.b) != outputs:
            raise _bad(
                found,
                f"tensors {lora.where[0]} {list(lora.a.shape)} and {lora.where[1]} {list(lora.b.shape)} fit a matrix "
                f"{[len(lora.b), lora.a.shape[1]]}, but {module} of {card.name} is {[outputs, inputs]}; it was trained "
                f"on another model ({found.base or 'unnamed'})",
            )
        for part, source in parts:
            b = lora.b if source.rows is None else lora.b[source.rows]
            loras[part.name] = peft.Lora(lora.a, b, lora.scale, where=lora.where)
    largest = max(loras.values(), key=lambda lora: len(lora.a))
    rank = len(largest.a)
    if rank > max_rank:
        raise _bad(
            found,
            f"tensor {largest.where[0]} {list(largest.a.shape)} has rank {rank}, and ranks up to {max_rank} are "
            f"served; --max_lora_rank {rank} takes it",
        )
    return Adapter(found.folder, found.base, rank, loras)


def cut(adapter: Adapter, part: Part | None) -> Adapter:
    """What one rank of several needs of an adapter: rows of B where rows of the linear are cut, columns of A where
    columns are, so that what it adds is the rank's share of what the whole adapter adds."""
    if part is None:
        return adapter

    def share(name: str, lora: peft.Lora) -> peft.Lora:
        rows, columns = part.rows(name), part.columns(name)
        a = lora.a if columns is None else lora.a[:, columns]
        return replace(lora, a=a, b=lora.b if rows is None else lora.b[rows])

    return replace(adapter, loras={name: share(name, lora) for name, lora in adapter.loras.items()})


def check(path: str | Path, card: ModelCard, max_rank: int) -> None:
    """For runners that are not ours: what `read` asks where we know the model, else what can be told from the files."""
    try:
        spec = read_spec(card)
    except MartletError:
        peft.read(path)
    else:
        read(path, card, spec, max_rank)


def _homes(card: ModelCard, spec: DecoderSpec) -> dict[str, list[tuple[ParameterSpec, Source]]]:
    """Hugging Face's name of a module -> our matrices in it and where each lies; several where theirs are fused."""
    family = families.get(card.family)
    homes: dict[str, list[tuple[ParameterSpec, Source]]] = {}
    for parameter in parameters(spec):
        if len(parameter.shape) == 2:
            source = family.source(spec, parameter.name, "safetensors")
            homes.setdefault(source.name.removesuffix(".weight"), []).append((parameter, source))
    return homes


def _check_kind(found: peft.PeftAdapter) -> None:
    merged = "; serve it merged: --ckpt_dir PATH --merge_lora true"
    if any(lora.magnitude is not None for lora in found.loras.values()):
        raise _bad(found, f"it is a DoRA, which needs the base weights{merged}")
    if found.saved:
        name = next(iter(found.saved))
        raise _bad(found, f"tensor {name}: whole modules (modules_to_save, trained biases) replace the base's{merged}")


def _check_base(found: peft.PeftAdapter, card: ModelCard) -> None:
    """Only names that the registry knows to be different models are at odds; folders are called anything."""
    theirs = registry.find(found.base) if found.base else None
    ours = registry.find(card.name)
    if theirs is not None and ours is not None and theirs.name != ours.name:
        raise _bad(found, f"it was trained on {found.base}, and the model here is {card.name}")


def _near(homes: Mapping[str, object]) -> str:
    kinds = dict.fromkeys(name.rpartition(".")[2] for name in homes)
    return f", which has {', '.join(kinds)}"


def _bad(found: peft.PeftAdapter, message: str) -> InvalidRequest:
    return InvalidRequest(f"adapter {found.folder}: {message}", param="adapters")
