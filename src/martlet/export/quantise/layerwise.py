"""The torch decoder one layer at a time: what flows into its linears, and what comes out at the end.

Only one layer's weights are in memory, in float32. A `_Tap` stands between the decoder and its operations: it hands in
the hidden states where an embedding would be looked up, keeps those that meet the norm behind, and sees every linear.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from martlet.hub.card import ModelCard
from martlet.hub.checkpoint import Checkpoint
from martlet.kernels import ops_for
from martlet.kernels.ops import Layout
from martlet.model import weights
from martlet.runners.torch_runner.decoder import Decoder, to_torch

BLOCK = 16  # tokens of a block of the cache
LINEARS = ("qkv", "o", "up", "down")  # of a layer, in the order in which they run
LOGIT_ROWS = 256

Watch = Callable[[str, torch.Tensor], None]


@dataclass(slots=True)
class Batch:
    """Some sequences between two layers. ids: of each. hidden: float32 [N, W], of all their tokens."""

    ids: list[list[int]]
    hidden: torch.Tensor

    def layout(self) -> Layout:
        count = np.array([len(ids) for ids in self.ids], np.int64)
        blocks = np.arange(len(count) * -(-count.max() // BLOCK), dtype=np.int32).reshape(len(count), -1)
        rows = np.repeat(np.arange(len(count)), count)
        positions = np.arange(count.sum()) - np.repeat(np.cumsum(count) - count, count)
        slots = blocks[rows, positions // BLOCK].astype(np.int64) * BLOCK + positions % BLOCK
        return Layout(np.zeros_like(count), count, blocks, positions, slots, BLOCK)


class _Tap:
    def __init__(self, ops):
        self._ops = ops
        self.hidden: torch.Tensor | None = (
            None  # what a sum in front of a norm was last, so in the end the last layer's
        )
        self.watch: Watch | None = None
        self._turn = 0

    def __getattr__(self, name: str):
        return getattr(self._ops, name)

    def embedding(self, tokens: torch.Tensor, table: torch.Tensor, scale: float = 1.0) -> torch.Tensor:
        self._turn = 0
        return self.hidden.clone()  # the decoder may write over it

    def linear(self, x: torch.Tensor, weight: object) -> torch.Tensor:
        if self.watch is not None:
            self.watch(LINEARS[self._turn], x)
        self._turn += 1
        return self._ops.linear(x, weight)

    def add_rms_norm(self, x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float):
        y, self.hidden = self._ops.add_rms_norm(x, residual, weight, eps)
        return y, self.hidden


class LayerWise:
    """A model whose layers are run one after another over all that flows through it."""

    def __init__(self, card: ModelCard, checkpoint: Checkpoint, device: str = "cpu"):
        self.card, self.checkpoint, self.device = card, checkpoint, device
        self.spec = weights.read_spec(card)
        self._homes: dict[str, list[weights.ParameterSpec]] = {}
        for parameter in weights.parameters(self.spec):
            self._homes.setdefault(_place(parameter.name), []).append(parameter)

    def fetch(self, place: str) -> dict[str, torch.Tensor]:
        """The parameters of "layers.7", "embed", "norm" or "head", float32, named without "layers.7."."""
        found = {}
        for parameter in self._homes[place]:
            tensor = weights.fetch(self.card, self.spec, self.checkpoint, parameter)
            found[parameter.name.removeprefix(place + ".")] = to_torch(tensor, self.device, torch.float32)
        return found

    @torch.inference_mode()
    def embed(self, batches: Iterable[Sequence[list[int]]]) -> list[Batch]:
        """Sequences that run together, in front of the first layer."""
        table, ops = self.fetch("embed")["embed"], ops_for(self.device)
        flat = [(list(ids), torch.tensor([t for one in ids for t in one], device=self.device)) for ids in batches]
        return [Batch(ids, ops.embedding(tokens, table, self.spec.embedding_scale)) for ids, tokens in flat]

    @torch.inference_mode()
    def run(
        self, number: int, parameters: dict[str, torch.Tensor], batches: Sequence[Batch], watch: Watch | None = None,
        *, keep: bool = True,
    ) -> None:  # fmt: skip
        """Layer `number`, of these parameters, over the batches; keep: they hold what comes out afterwards.

        watch(name, x): called with the input of each linear of LINEARS.
        """
        layer, tap = self.spec.layers[number], _Tap(ops_for(self.device))
        ones, nothing = np.ones(self.spec.width, np.float32), np.zeros((1, self.spec.width), np.float32)
        spec = self.spec._replace(layers=(layer,), tied=True)
        named = [("layers.0." + name, tensor.numpy(force=True)) for name, tensor in parameters.items()]
        stream = [("embed", nothing), *named, ("norm", ones)]
        decoder = Decoder(spec, stream, tap, self.device, torch.float32)
        mixer, tap.watch = layer.mixer, watch
        longest = max(max(map(len, batch.ids)) for batch in batches)
        rotation = tap.rotation(mixer.rope, longest, self.device)
        for batch in batches:
            layout = batch.layout()
            shape = (layout.blocks.size, BLOCK, 2, mixer.kv_heads, mixer.head_dim)
            cache = torch.zeros(shape, device=self.device)
            plans = {mixer: tap.plan(layout, mixer, rotation, torch.float32)}
            tokens = torch.zeros(len(batch.hidden), dtype=torch.long, device=self.device)
            tap.hidden = batch.hidden
            decoder.forward(tokens, plans, [cache], torch.arange(len(tokens), device=self.device))
            if keep:
                batch.hidden = tap.hidden

    @torch.inference_mode()
    def logits(self, batch: Batch) -> torch.Tensor:
        """Behind the last layer: float32 [N, vocab]."""
        ops = ops_for(self.device)
        head = ops.pack(self.fetch("embed")["embed"] if self.spec.tied else self.fetch("head")["head"])
        x = ops.rms_norm(batch.hidden, self.fetch("norm")["norm"], self.spec.eps)
        return torch.cat([ops.logits(part, head, self.spec.logit_softcap) for part in x.split(LOGIT_ROWS)])

    def run_all(self, texts: Sequence[list[int]]) -> list[torch.Tensor]:
        """The logits of each text by itself, [length, vocab]."""
        batches = self.embed([ids] for ids in texts)
        for number in range(len(self.spec.layers)):
            self.run(number, self.fetch(f"layers.{number}"), batches)
        return [self.logits(batch) for batch in batches]


def _place(name: str) -> str:
    return ".".join(name.split(".")[:2]) if name.startswith("layers.") else name
