"""LoRA adapters on torch: each slot holds an adapter's matrices, by layer and fused linear."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from martlet.kernels.ops import LoraPart
from martlet.model.adapters import Adapter
from martlet.model.spec import DecoderSpec
from martlet.model.weights import parameters

FUSED = {"qkv": ("q", "k", "v"), "o": ("o",), "up": ("gate", "up"), "down": ("down",)}

Layers = list[dict[str, list[LoraPart]]]
"""For each layer, what an adapter adds to each fused linear."""


def upload(adapter: Adapter, spec: DecoderSpec, device: str, dtype: torch.dtype) -> Layers:
    """An adapter's matrices on a device, in places of the fused linears."""
    rows = {parameter.name: parameter.shape[0] for parameter in parameters(spec) if parameter.kind == "linear"}
    layers: Layers = []
    for number in range(len(spec.layers)):
        layers.append({})
        for fused, names in FUSED.items():
            column, parts = 0, layers[-1].setdefault(fused, [])
            for name in (f"layers.{number}.{part}" for part in names if f"layers.{number}.{part}" in rows):
                if (delta := adapter.delta(name)) is not None:
                    a, b = (torch.from_numpy(side).to(device, dtype) for side in (delta.a, delta.b))
                    parts.append(LoraPart(column, a, b))
                column += rows[name]
    return layers


class Groups:
    """Which tokens of a step run with which adapter."""

    def __init__(self, slots: np.ndarray, loaded: dict[int, Layers], device: str):
        """slots: [N], of each token; 0 for none."""
        used = [slot for slot in np.unique(slots).tolist() if slot]
        self._groups = [(torch.from_numpy(np.flatnonzero(slots == slot)).to(device), loaded[slot]) for slot in used]

    def of(self, layer: int, fused: str) -> Sequence[tuple[torch.Tensor, Sequence[LoraPart]]]:
        """What `Ops.lora` wants for one linear."""
        return [(tokens, layers[layer][fused]) for tokens, layers in self._groups]
