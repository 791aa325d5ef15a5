"""LoRA adapters on the GPU: stacks of slots, allocated once, so that graphs may hold their addresses."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch

from martlet.kernels.cuda import few_rows, few_rows_lora, layers
from martlet.kernels.cuda.linear import Linear, product
from martlet.kernels.cuda.lora import (
    BESIDE,
    UNIT,
    Groups,
    Low,
    Stack,
    finish,
    finish_activated,
    group,
    lora,
    low_ranks,
    parted,
)
from martlet.model.adapters import Adapter
from martlet.model.spec import DecoderSpec, FeedForward, Layer
from martlet.runners.cuda_runner.weights import Block


def padded(rank: int) -> int:
    return -(-rank // UNIT) * UNIT


def beside(slots: int, rank: int) -> int:
    """Rows of A, for each part of a linear, that are to lie behind its matrix."""
    ranks = slots * padded(rank)
    return ranks if ranks <= BESIDE else 0


def sizes(spec: DecoderSpec, layer: Layer) -> Iterator[tuple[str, list[tuple[str, int]], int]]:
    """(fused linear, its parts with their outputs, its inputs) of a layer."""
    attention, mlp = layer.mixer, layer.mlp
    yield "qkv", [("q", attention.q_size), ("k", attention.kv_size), ("v", attention.kv_size)], spec.width
    yield "o", [("o", spec.width)], attention.q_size
    yield "up", [("gate", mlp.hidden), ("up", mlp.hidden)] if mlp.gated else [("up", mlp.hidden)], spec.width
    yield "down", [("down", spec.width)], mlp.hidden


def bytes_for(spec: DecoderSpec, blocks: Sequence[Block], slots: int, rank: int, element: int) -> int:
    """What Slots takes."""
    elements = lows = 0
    for layer, block in zip(spec.layers, blocks, strict=True):
        for name, parts, inputs in sizes(spec, layer):
            elements += sum(rows for _, rows in parts)
            elements += 0 if getattr(block, name).wide is not None else len(parts) * inputs
            lows += few_rows_lora.room(len(parts), padded(rank))
    return slots * padded(rank) * elements * element + 4 * lows


class Slots:
    """Slots 1 ... count; slot s lies at s - 1 of each stack. blocks: whose linears may have room for A behind them."""

    def __init__(
        self,
        spec: DecoderSpec,
        blocks: Sequence[Block],
        count: int,
        rank: int,
        device: torch.device,
        dtype: torch.dtype,
    ):
        self.count, self.rank = count, padded(rank)
        self.ranks = torch.zeros(count, dtype=torch.int32, device=device)
        self._parts = [{name: parts for name, parts, _ in sizes(spec, layer)} for layer in spec.layers]
        self._stacks: list[dict[str, Stack]] = []
        for layer, block in zip(spec.layers, blocks, strict=True):
            self._stacks.append({})
            for name, parts, inputs in sizes(spec, layer):
                wide, rows = getattr(block, name).wide, [size for _, size in parts]
                if wide is not None:
                    a = wide.matrix[sum(rows) :].view(count, len(parts), self.rank, inputs)
                else:
                    a = torch.zeros(count, len(parts), self.rank, inputs, dtype=dtype, device=device)
                b = torch.zeros(sum(rows), count, self.rank, dtype=dtype, device=device)
                ends = tuple(np.cumsum(rows[:-1]).tolist())
                self._stacks[-1][name] = Stack(a, b, self.ranks, ends)
        # where products of few rows leave low-rank values, each its own
        rooms = [[few_rows_lora.room(len(parts), self.rank) for parts in layer.values()] for layer in self._parts]
        self._room = torch.empty(sum(map(sum, rooms)), dtype=torch.int32, device=device)
        places = iter(self._room.split([size for layer in rooms for size in layer]))
        self._lows = [{name: next(places) for name in layer} for layer in self._parts]

    def put(self, slot: int, adapter: Adapter) -> None:
        """Copies are queued behind the steps that were launched, so these still see what the slot held."""
        used = padded(adapter.rank)
        for number, (parts_of, stacks) in enumerate(zip(self._parts, self._stacks, strict=True)):
            for name, parts in parts_of.items():
                stack, begin = stacks[name], 0
                for place, (part, rows) in enumerate(parts):
                    a = np.zeros((used, stack.a.shape[-1]), np.float32)
                    b = np.zeros((rows, used), np.float32)
                    if (delta := adapter.delta(f"layers.{number}.{part}")) is not None:
                        a[: len(delta.a)], b[:, : len(delta.a)] = delta.a, delta.b
                    stack.a[slot - 1, place, :used].copy_(torch.from_numpy(a))
                    stack.b[begin : begin + rows, slot - 1, :used].copy_(torch.from_numpy(b))
                    begin += rows
                stack.a[slot - 1, :, used:] = 0
                stack.b[:, slot - 1, used:] = 0
        self.ranks[slot - 1] = used

    def group(self, rows: torch.Tensor, adapters: torch.Tensor) -> Groups:
        return group(rows, adapters, self.ranks, self.rank, self._room if len(rows) <= few_rows.ROWS.value else None)

    def few_rows(
        self, x: torch.Tensor, weight: Linear, number: int, name: str, groups: Groups, gated: str | None
    ) -> torch.Tensor | None:
        """`Decoder._few_rows` of a linear of layer `number`, with its adapters."""
        stack = self._stacks[number][name]
        plan = few_rows_lora.plan_for(x, weight, stack, groups, gated=gated is not None)
        if plan is None:
            return None
        return few_rows_lora.product(
            x, weight.wide.matrix, plan, stack, groups, self._lows[number][name],
            gated=gated is not None, activation=gated or "",
        )  # fmt: skip

    def product(
        self,
        x: torch.Tensor,
        weight: Linear,
        dtype: torch.dtype,
        number: int,
        name: str,
        groups: Groups,
        out: torch.Tensor | None = None,
        onto: bool = False,
    ) -> torch.Tensor:
        """A linear of layer `number` with its adapters, of x [T, K] -> [T, N] of `dtype`, in `out` if given.

        onto: added to it.
        """
        stack = self._stacks[number][name]
        if groups.few:
            return finish(*self._low(x, weight, dtype, stack, groups), stack, groups, out, onto)
        if onto:
            assert out is not None and weight.bias is None and weight.plain
            y = out.addmm_(x, weight.matrix.T)
        else:
            y = product(x, weight, dtype, out=out)
        lora(x, y, stack, groups)
        return y

    def hidden(
        self, x: torch.Tensor, weight: Linear, dtype: torch.dtype, number: int, mlp: FeedForward, groups: Groups
    ) -> torch.Tensor:
        """The activation of the product `up`, itself of `dtype`: [T, hidden]."""
        if not groups.few:
            y = self.product(x, weight, dtype, number, "up", groups)
            return layers.activation(y, mlp.activation, mlp.gated, dtype=x.dtype)
        stack = self._stacks[number]["up"]
        return finish_activated(*self._low(x, weight, dtype, stack, groups), stack, groups, mlp.activation, mlp.gated)

    def _low(
        self, x: torch.Tensor, weight: Linear, dtype: torch.dtype, stack: Stack, groups: Groups
    ) -> tuple[torch.Tensor, Low]:
        """(The product of few tokens, of `dtype`, their low-rank values)."""
        if weight.wide is not None:
            return parted(product(x, weight.wide, dtype), stack)
        return product(x, weight, dtype), low_ranks(x, stack, groups)
