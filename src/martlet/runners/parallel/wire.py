"""What rank 0 tells the others, as bytes: a JSON head, then arrays as they lie in memory. No pickle.

A message is one of five: how to load ("load"), a step ("step"), the masks of the step before it ("masks"), an adapter
for a slot ("adapter"), that there is time to get something ready ("ready"). Both ends are the same program, so there is
no version in it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import orjson

from martlet.hub.card import ModelCard
from martlet.hub.peft import Lora
from martlet.model.adapters import Adapter
from martlet.runners.base import Batch, LoadOptions, NewRow
from martlet.sampling_params import SamplingParams

PLACES = 16  # arrays begin at multiples of this
STEP_ARRAYS = ("rows", "start", "count", "sample", "block_rows", "block_slots", "block_ids", "copies")
PARAMS = (  # of SamplingParams, those that a runner reads
    "temperature", "top_p", "top_k", "min_p", "presence_penalty", "frequency_penalty", "repetition_penalty",
    "min_tokens", "max_tokens", "logprobs", "prompt_logprobs", "allowed_token_ids",
)  # fmt: skip


@dataclasses.dataclass(frozen=True, slots=True)
class Message:
    """head: JSON, with the kind under "kind". arrays: in the order in which the sender gave them."""

    head: Mapping[str, Any]
    arrays: Sequence[np.ndarray]

    @property
    def kind(self) -> str:
        return self.head["kind"]


def pack(kind: str, arrays: Sequence[np.ndarray] = (), **head: Any) -> list[bytes | memoryview]:
    """A message in pieces, to be written one after another."""
    shapes = [(array.dtype.name, array.shape) for array in arrays]
    text = orjson.dumps({**head, "kind": kind, "arrays": shapes}, default=str)
    pieces: list[bytes | memoryview] = [len(text).to_bytes(8, "little"), text, bytes(-(8 + len(text)) % PLACES)]
    for array in arrays:
        raw = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
        pieces += [raw.data, bytes(-len(raw) % PLACES)]
    return pieces


def unpack(data: bytes | bytearray) -> Message:
    """The arrays are views of `data`."""
    length = int.from_bytes(data[:8], "little")
    head = orjson.loads(data[8 : 8 + length])
    at, arrays = 8 + length + -(8 + length) % PLACES, []
    for name, shape in head["arrays"]:
        dtype = np.dtype(ml_dtypes.bfloat16) if name == "bfloat16" else np.dtype(name)
        count = int(np.prod(shape))
        arrays.append(np.frombuffer(data, dtype, count, at).reshape(shape))
        at += count * dtype.itemsize + -(count * dtype.itemsize) % PLACES
    return Message(head, arrays)


def load(card: ModelCard, options: LoadOptions) -> list[bytes | memoryview]:
    return pack("load", card=dataclasses.asdict(card), options=dataclasses.asdict(options))


def loaded_from(message: Message) -> tuple[ModelCard, LoadOptions]:
    card = dict(message.head["card"])
    for name in ("capabilities", "lora_target_modules"):
        card[name] = tuple(card[name])
    card |= {"path": Path(card["path"]), "merge": None if card["merge"] is None else Path(card["merge"])}
    return ModelCard(**card), LoadOptions(**message.head["options"])


def step(batch: Batch) -> list[bytes | memoryview]:
    """A step; its masks follow in a message of their own."""
    arrays = [getattr(batch, name) for name in STEP_ARRAYS]
    masks = batch.masks
    if masks is not None:
        arrays.append(masks.entries)
    return pack(
        "step",
        [*arrays, *(new.tokens for new in batch.new_rows)],
        new=[_entering(new) for new in batch.new_rows],
        masked=masks is not None,
    )


def _entering(new: NewRow) -> dict[str, Any]:
    params = {name: getattr(new.params, name) for name in PARAMS}
    params["logit_bias"] = list(new.params.logit_bias.items())
    rest = {name: getattr(new, name) for name in ("row", "prompt_len", "seed", "end_ids", "adapter")}
    return {**rest, "params": params}


def step_from(message: Message) -> tuple[Batch, np.ndarray | None]:
    """The step, and which of its sequences get masks."""
    fields = dict(zip(STEP_ARRAYS, message.arrays, strict=False))
    rest = list(message.arrays[len(STEP_ARRAYS) :])
    entries = rest.pop(0) if message.head["masked"] else None
    new_rows = []
    for tokens, told in zip(rest, message.head["new"], strict=True):
        params = {**told["params"], "logit_bias": dict(told["params"]["logit_bias"])}
        settled = {**told, "params": SamplingParams(**params), "end_ids": tuple(told["end_ids"])}
        new_rows.append(NewRow(tokens=tokens, **settled))
    return Batch(**fields, new_rows=new_rows), entries


def masks(bits: np.ndarray) -> list[bytes | memoryview]:
    return pack("masks", [bits])


def ready() -> list[bytes | memoryview]:
    return pack("ready")


def adapter(slot: int, what: Adapter) -> list[bytes | memoryview]:
    told = [(name, lora.scale, lora.where) for name, lora in what.loras.items()]
    arrays = [side for lora in what.loras.values() for side in (lora.a, lora.b)]
    return pack("adapter", arrays, slot=slot, path=what.path, base=what.base, rank=what.rank, loras=told)


def adapter_from(message: Message) -> tuple[int, Adapter]:
    head, arrays = message.head, message.arrays
    loras = {
        name: Lora(arrays[2 * i], arrays[2 * i + 1], scale, where=tuple(where))
        for i, (name, scale, where) in enumerate(head["loras"])
    }
    return head["slot"], Adapter(Path(head["path"]), head["base"], head["rank"], loras)
