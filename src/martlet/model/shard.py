"""Tensor parallelism as data: which part of a decoder each of several ranks holds.

Matrices are cut so that a layer needs two sums over the ranks: q, k, v, gate and up by rows (each rank has some of the
heads and some of the hidden units), o and down by columns (each rank has a share of every output, to be added up).
Embedding and head are cut by tokens. What is small and read by all (norms, routers) is whole on every rank. Where there
are fewer key heads than ranks, neighbouring ranks hold the same one. (Megatron-LM, Shoeybi et al. 2019.)

RWKV goes the same way: whatever belongs to a head of the time mix is with the head, its output and the channel mix's v
are summed. What the token shift and the first halves of low-rank maps read is the whole input, so these are whole, and
so is the channel mix's r, whose gate comes after the sum.

A rank's DecoderSpec tells of its own heads and hidden units, so a runner allocates and computes as ever; its `part`
says which they are, and `martlet.model.weights` cuts tensors accordingly while they are still views of the file.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from martlet.errors import UsageError
from martlet.hub.checkpoint import PackedTensor, Tensor
from martlet.model.families.family import split_name
from martlet.model.spec import Attention, Recurrence

if TYPE_CHECKING:
    from martlet.model.spec import DecoderSpec, Layer

MOST = 64  # ranks that are tried for what would work
HEADWISE = {  # parts of a time mix that have rows for heads
    *("r", "k", "v", "g", "decay", "decay_up", "bonus", "log_bonus", "norm"),
    *("removal", "renewal", "rate", "rate_up", "gate_up", "value", "value_up"),
}


@dataclass(frozen=True, slots=True)
class Part:
    """Rank `rank` of `size`, 0 <= rank < size, of the decoder `whole`."""

    rank: int
    size: int
    whole: DecoderSpec = field(repr=False)

    @property
    def vocabulary(self) -> slice:
        """Tokens whose rows of the embedding and the head this rank holds; the last rank may have fewer."""
        each, total = self.most_tokens, self.whole.vocab_size
        return slice(self.rank * each, min((self.rank + 1) * each, total))

    @property
    def most_tokens(self) -> int:
        """Tokens that the first rank holds: the vocabulary in equal parts, rounded up."""
        return -(-self.whole.vocab_size // self.size)

    def rows(self, name: str) -> slice | None:
        """Which rows of the parameter `name` (a bias: which entries) this rank holds; None: all."""
        part, number, _, _ = split_name(name)
        if part in ("embed", "head"):
            return self.vocabulary
        if not part.startswith("layers."):
            return None
        layer = self.whole.layers[number]
        match part.split(".")[1:]:
            case ["time", one]:
                return self._head_rows(one, layer.mixer)
            case ["channel", "k"]:
                return self._share(layer.mlp.hidden)
            case ["channel", _]:
                return None
        match part.rpartition(".")[2]:
            case "q":
                return self._share(layer.mixer.q_size)
            case "k" | "v":
                return self._key_rows(layer.mixer)
            case "gate" | "up":
                return self._share(_hidden(layer, part))
        return None

    def columns(self, name: str) -> slice | None:
        """Which columns of the matrix `name` this rank holds; None: all."""
        part, number, _, suffix = split_name(name)
        if suffix == ".bias" or not name.startswith("layers."):
            return None
        layer = self.whole.layers[number]
        match part.split(".")[1:]:
            case ["time", "o"]:
                return self._share(layer.mixer.width)
            case ["channel", "v"]:
                return self._share(layer.mlp.hidden)
        match part.rpartition(".")[2]:
            case "o":
                return self._share(layer.mixer.q_size)
            case "down":
                return self._share(_hidden(layer, part))
        return None

    def cut(self, name: str, tensor: Tensor) -> Tensor:
        """What this rank holds of the whole tensor of `name`: a view where the layout allows, packed where it can be.

        Packed blocks run along rows; columns that do not end between two blocks are unpacked. A bias of o or down is
        added once, by rank 0; the others have zeros.
        """
        part, *_, suffix = split_name(name)
        if suffix == ".bias" and part.endswith((".o", ".down")) and self.rank:
            return np.zeros_like(tensor)
        if (rows := self.rows(name)) is not None:
            return tensor.rows(rows) if isinstance(tensor, PackedTensor) else tensor[rows]
        if (columns := self.columns(name)) is not None:
            return tensor.columns(columns) if isinstance(tensor, PackedTensor) else tensor[:, columns]
        return tensor

    def _share(self, total: int) -> slice:
        each = total // self.size
        return slice(self.rank * each, (self.rank + 1) * each)

    def _head_rows(self, part: str, mixer: Recurrence) -> slice | None:
        """Of a part of a time mix whose rows belong to heads, or to their channels."""
        if part not in HEADWISE:
            return None
        by_head = part in ("bonus", "log_bonus") or (part == "decay" and mixer.generation == 5)
        return self._share(mixer.heads if by_head else mixer.width)

    def _key_rows(self, attention: Attention) -> slice:
        if attention.kv_heads % self.size == 0:
            return self._share(attention.kv_size)
        head = self.rank * attention.kv_heads // self.size
        return slice(head * attention.head_dim, (head + 1) * attention.head_dim)


def split(spec: DecoderSpec, rank: int, size: int) -> DecoderSpec:
    """What rank `rank` of `size` runs. Raises UsageError, naming what would work, where it cannot be cut evenly."""
    if size == 1:
        return spec
    if reason := misfit(spec, size):
        *others, last = map(str, fitting(spec))
        raise UsageError(
            f"tensor_parallel_size {size}: this model has {reason}; "
            f"{', '.join(others) + ' or ' if others else ''}{last} would work",
            param="tensor_parallel_size",
        )

    def layer(whole: Layer) -> Layer:
        mixer, mlp = whole.mixer, whole.mlp
        if isinstance(mixer, Recurrence):
            mixer, mlp = mixer._replace(heads=mixer.heads // size), mlp._replace(hidden=mlp.hidden // size)
            return whole._replace(mixer=mixer, mlp=mlp)
        experts = mlp.experts
        if experts is not None:
            experts = experts._replace(shared=experts.shared // size)
        return whole._replace(
            mixer=mixer._replace(heads=mixer.heads // size, kv_heads=max(mixer.kv_heads // size, 1)),
            mlp=mlp._replace(hidden=mlp.hidden // size, experts=experts),
        )

    return spec._replace(layers=tuple(map(layer, spec.layers)), part=Part(rank, size, spec))


def fitting(spec: DecoderSpec) -> list[int]:
    """Numbers of ranks that can share a decoder evenly, 1 among them."""
    return [size for size in range(1, MOST + 1) if misfit(spec, size) is None]


def misfit(spec: DecoderSpec, size: int) -> str | None:
    """What of a decoder cannot be shared evenly by `size` ranks, in words; None: all can."""
    for layer in spec.layers:
        mixer, experts = layer.mixer, None if layer.recurrent else layer.mlp.experts
        if mixer.heads % size:
            return f"{mixer.heads} {'' if layer.recurrent else 'attention '}heads"
        if isinstance(mixer, Attention) and mixer.kv_heads % size and size % mixer.kv_heads:
            return f"{mixer.kv_heads} key heads"
        if layer.mlp.hidden % size:
            return f"feed-forwards of {layer.mlp.hidden} units"
        if experts is not None and experts.shared % size:
            return f"a shared expert of {experts.shared} units"
    each = -(-spec.vocab_size // size)
    return None if each * (size - 1) < spec.vocab_size else f"{spec.vocab_size} tokens"


def _hidden(layer: Layer, part: str) -> int:
    """Units of the feed-forward that a linear belongs to."""
    return layer.mlp.experts.shared if layer.mlp.experts is not None and ".shared." in part else layer.mlp.hidden
