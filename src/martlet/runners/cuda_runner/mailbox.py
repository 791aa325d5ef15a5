"""Words between host and device, through pinned memory and without waiting."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

BUFFERS = 8  # in turn; two steps are under way at most, and few send more than two words at once


@dataclass(slots=True)
class _Sent:
    buffer: torch.Tensor
    done: torch.cuda.Event | None


class Mailbox:
    """Host buffers for what goes to the device, in turn, each used again once the device has read it."""

    def __init__(self, device: torch.device):
        self.device, self.turn = device, 0
        self.slots = [_Sent(torch.empty(0, dtype=torch.int32), None) for _ in range(BUFFERS)]

    def send(self, words: np.ndarray, into: torch.Tensor | None = None) -> torch.Tensor:
        """An int32 vector on the device; copied into `into` if given."""
        if self.device.type != "cuda":
            there = torch.from_numpy(words.copy())
            return there if into is None else into.copy_(there)
        self.turn = (self.turn + 1) % len(self.slots)
        slot = self.slots[self.turn]
        if slot.done is None:
            slot.done = torch.cuda.Event()
        else:
            slot.done.synchronize()
        if len(slot.buffer) < len(words):
            slot.buffer = torch.empty(max(4096, 2 * len(words)), dtype=torch.int32, pin_memory=True)
        slot.buffer[: len(words)].numpy()[:] = words
        if into is None:
            into = torch.empty(len(words), dtype=torch.int32, device=self.device)
        into.copy_(slot.buffer[: len(words)], non_blocking=True)
        slot.done.record()
        return into


def to_host(tensor: torch.Tensor) -> torch.Tensor:
    """A copy under way to pinned memory; on a CPU, done."""
    there = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
    return there.copy_(tensor, non_blocking=True)
