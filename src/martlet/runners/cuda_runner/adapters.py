"""LoRA adapters on the GPU: stacks of slots, allocated once, so that graphs may hold their addresses."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch

from martlet.kernels.cuda.lora import UNIT, Groups, Stack, group, lora
from martlet.model.adapters import Adapter
from martlet.model.spec import DecoderSpec, Layer

FUSED = {"qkv": ("q", "k", "v"), "o": ("o",), "up": ("gate", "up"), "down": ("down",)}


def padded(rank: int) -> int:
    return -(-rank // UNIT) * UNIT


def sizes(spec: DecoderSpec, layer: Layer) -> Iterator[tuple[str, list[tuple[str, int]], int]]:
    """(fused linear, its parts with their outputs, its inputs) of a layer."""
    attention, mlp = layer.mixer, layer.mlp
    yield "qkv", [("q", attention.q_size), ("k", attention.kv_size), ("v", attention.kv_size)], spec.width
    yield "o", [("o", spec.width)], attention.q_size
    yield "up", [("gate", mlp.hidden), ("up", mlp.hidden)] if mlp.gated else [("up", mlp.hidden)], spec.width
    yield "down", [("down", spec.width)], mlp.hidden


def bytes_for(spec: DecoderSpec, slots: int, rank: int, element: int) -> int:
    """What Slots takes."""
    elements = sum(
        len(parts) * inputs + sum(rows for _, rows in parts)
        for layer in spec.layers
        for _, parts, inputs in sizes(spec, layer)
    )
    return slots * padded(rank) * elements * element


class Slots:
    """Slots 1 ... count; slot s lies at s - 1 of each stack."""

    def __init__(self, spec: DecoderSpec, count: int, rank: int, device: torch.device, dtype: torch.dtype):
        self.count, self.rank = count, padded(rank)
        self.ranks = torch.zeros(count, dtype=torch.int32, device=device)
        self._parts = [{name: parts for name, parts, _ in sizes(spec, layer)} for layer in spec.layers]
        new = {"dtype": dtype, "device": device}
        self._stacks: list[dict[str, Stack]] = []
        for layer in spec.layers:
            self._stacks.append({})
            for name, parts, inputs in sizes(spec, layer):
                rows = [size for _, size in parts]
                a = torch.zeros(count, len(parts), self.rank, inputs, **new)
                b = torch.zeros(count, sum(rows), self.rank, **new)
                self._stacks[-1][name] = Stack(a, b, self.ranks, tuple(np.cumsum(rows[:-1]).tolist()))

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
                    stack.b[slot - 1, begin : begin + rows, :used].copy_(torch.from_numpy(b))
                    begin += rows
        self.ranks[slot - 1] = used

    def group(self, rows: torch.Tensor, adapters: torch.Tensor) -> Groups:
        return group(rows, adapters, self.count)

    def add(self, x: torch.Tensor, y: torch.Tensor, number: int, name: str, groups: Groups) -> None:
        """y [T, N] += what the adapters of a layer's linear make of x [T, K]."""
        lora(x, y, self._stacks[number][name], groups)
