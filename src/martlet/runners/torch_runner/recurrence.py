"""RWKV's time mix and channel mix in terms of the operation table, and the memory of their states."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

from martlet.kernels.ops import Ops, Plan, Weight
from martlet.model.spec import ChannelMix, DecoderSpec, Recurrence
from martlet.runners.base import Batch, MemoryPlan
from martlet.runners.states import StateSlots
from martlet.runners.torch_runner.collectives import Collectives

EXACT = ("decay", "bonus", "norm", "norm.bias")
"""Parts of a time mix that stay in float32 whatever the model's dtype: decays are raised to the length of a text."""


@dataclass(frozen=True, slots=True)
class Mix:
    """A time mix or a channel mix. linears: by their name; parts: the vectors and low-rank maps, by theirs."""

    linears: dict[str, Weight]
    parts: dict[str, torch.Tensor]


@dataclass(frozen=True, slots=True)
class LayerState:
    """A layer's part of the state memory, float32: inputs of the last token [slots, W], and S [slots, H, D, D]."""

    time: torch.Tensor
    heads: torch.Tensor
    channel: torch.Tensor


class States:
    """The states of a model on its device; `slots` says what is where."""

    def __init__(self, spec: DecoderSpec, memory: MemoryPlan, device: str):
        self.slots, self.device = StateSlots(memory), device
        shape = (self.slots.count, spec.state_size)
        # On CPU from the allocator's untouched pages, so that memory is taken only as it is written.
        plain = device == "cpu"
        self.all = torch.from_numpy(np.zeros(shape, np.float32)) if plain else torch.zeros(shape, device=device)
        mixers = [layer.mixer for layer in spec.layers if isinstance(layer.mixer, Recurrence)]
        sizes = [size for mixer in mixers for size in (spec.width, mixer.state_size, spec.width)]
        parts = self.all.split(sizes, 1)
        self.layers = [
            LayerState(time, heads.unflatten(1, (mixer.heads, mixer.head_dim, mixer.head_dim)), channel)
            for mixer, time, heads, channel in zip(mixers, parts[::3], parts[1::3], parts[2::3], strict=True)
        ]

    def begin(self, batch: Batch, blocks: np.ndarray) -> None:
        """Bring the rows' states to where the step begins."""
        if (moves := self.slots.begin(batch, blocks)) is not None:
            targets, sources, fresh = (
                torch.from_numpy(array).to(self.device) for array in (moves.targets, moves.sources, moves.fresh)
            )
            self.all[targets] = self.all[sources].masked_fill_(fresh.unsqueeze(1), 0.0)


def as_mix(parts: dict[str, torch.Tensor], pack: Callable[[torch.Tensor], Weight]) -> Mix:
    linears = {name: pack(parts.pop(name)) for name in ("r", "k", "v", "g", "o") if name in parts}
    if "log_bonus" in parts:
        parts["bonus"] = parts.pop("log_bonus").exp()
    return Mix(linears, parts)


def time_mix(x: torch.Tensor, mixer: Recurrence, mix: Mix, state: LayerState, plan: Plan, ops: Ops) -> torch.Tensor:
    """x [N, W], normed -> [N, W], a rank's share of it."""
    parts, shape = mix.parts, (len(x), mixer.heads, mixer.head_dim)
    difference = ops.token_shift(x, state.time, plan) - x
    shares = {part: parts[f"mix_{part}"] for part in "rkvgwa" if f"mix_{part}" in parts}
    if mixer.generation == 6:
        low = F.linear(x + difference * parts["mix_x"], parts["mix_down"]).tanh()
        shift = torch.bmm(low.unflatten(1, (5, -1)).transpose(0, 1).contiguous(), parts["mix_up"])
        shares = {part: shares[part] + more for part, more in zip("wkvrg", shift, strict=True)}
    taken = {part: x + difference * share for part, share in shares.items()}
    linears = {part: ops.linear(taken[part], weight) for part, weight in mix.linears.items() if part != "o"}
    if mixer.generation == 7:
        y = _delta(mixer, parts, taken, linears, state, plan, ops)
    else:
        r, k, v = (linears[part].float().view(shape) for part in "rkv")
        decay = parts["decay"]
        if mixer.generation == 6:
            decay = decay + F.linear(_low(taken["w"], parts, "decay").tanh(), parts["decay_up"]).float()
        decay = decay.view(shape) if mixer.generation == 6 else decay.expand(shape[1:])
        y = ops.wkv(r, k, v, -decay.exp(), parts["bonus"].expand(shape[1:]), state.heads, plan)
        y = ops.head_norm(y, parts["norm"], parts["norm.bias"], mixer.eps, x.dtype)
        if "g" in linears:
            y = y * F.silu(linears["g"])
    return ops.linear(y, mix.linears["o"])


def _delta(
    mixer: Recurrence,
    parts: dict[str, torch.Tensor],
    taken: dict[str, torch.Tensor],
    linears: dict[str, torch.Tensor],
    state: LayerState,
    plan: Plan,
    ops: Ops,
) -> torch.Tensor:
    x, heads = taken["r"], (mixer.heads, mixer.head_dim)
    r, k, v = (linears[part] for part in "rkv")
    decay = F.linear(_low(taken["w"], parts, "decay").tanh(), parts["decay_up"])
    log_decay = -(torch.sigmoid(parts["decay"] + decay.float()) * float(np.exp(-0.5)))
    rate = torch.sigmoid(parts["rate"] + F.linear(_low(taken["a"], parts, "rate"), parts["rate_up"]))
    gate = F.linear(_low(taken["g"], parts, "gate").sigmoid(), parts["gate_up"])
    removed = F.normalize((k * parts["removal"]).unflatten(1, heads).float(), dim=-1)
    k = k * (1 + (rate - 1) * parts["renewal"])
    if mixer.first:
        plan.first_values = v
    else:
        mixed = torch.sigmoid(parts["value"] + F.linear(_low(taken["v"], parts, "value"), parts["value_up"]))
        v = v + (plan.first_values - v) * mixed
    r, k, v, log_decay, rate = (part.float().unflatten(1, heads) for part in (r, k, v, log_decay, rate))
    y = ops.delta_rule(r, k, v, log_decay, removed, rate, state.heads, plan)
    y = ops.head_norm(y, parts["norm"], parts["norm.bias"], mixer.eps, x.dtype)
    own = (r * k * parts["bonus"]).sum(-1, keepdim=True) * v
    return (y + own.flatten(1).to(x.dtype)) * gate


def _low(x: torch.Tensor, parts: dict[str, torch.Tensor], name: str) -> torch.Tensor:
    return F.linear(x, parts[f"{name}_down"])


def channel_mix(
    x: torch.Tensor, mlp: ChannelMix, mix: Mix, state: LayerState, plan: Plan, ops: Ops, ranks: Collectives
) -> torch.Tensor:
    """x [N, W], normed -> [N, W], summed over the ranks: the gate is of the sum."""
    difference = ops.token_shift(x, state.channel, plan) - x
    hidden = ops.linear(x + difference * mix.parts["mix_k"], mix.linears["k"]).relu().square()
    y = ranks.all_reduce(ops.linear(hidden, mix.linears["v"]))
    if mlp.gated:
        y = y * ops.linear(x + difference * mix.parts["mix_r"], mix.linears["r"]).sigmoid()
    return y
