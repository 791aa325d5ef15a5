"""Sampling on the GPU: which of the kernels a step needs, and the settings that only few requests have.

Temperature, cuts and seeds are in the rows' settings on the device. Penalties, biased, banned and allowed tokens, masks
and log-probabilities are rare: rows that have them make the step sample outside its graph, in torch. The host waits for
none of it but masks, which it waits for while the device computes the logits.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch

from martlet.kernels.cuda import sampling
from martlet.kernels.ops import Sampling
from martlet.kernels.reference import ReferenceOps
from martlet.runners.base import TokenLogprobs
from martlet.runners.cuda_runner.mailbox import Mailbox, to_host
from martlet.runners.rows import Rows

GREEDY, DRAW, CUT, SPECIAL = "greedy", "draw", "cut", "special"  # what a step's sampling needs, each more than before
LOGIT_ROWS = 256  # most rows of prompt logits at once: 156 MB for a vocabulary of 152,000


def kind_of(rows: Rows, chosen: np.ndarray, position: np.ndarray) -> str:
    """What the rows `chosen` [S], sampling their tokens number `position` [S], need."""
    short = position - rows.prompt_len[chosen] < rows.min_tokens[chosen]
    if (rows.penalised[chosen] | (rows.logprobs[chosen] >= 0) | short).any():
        return SPECIAL
    if (rows.bias or rows.allowed) and not (rows.bias.keys() | rows.allowed.keys()).isdisjoint(chosen.tolist()):
        return SPECIAL
    if (rows.temperature[chosen] < sampling.GREEDY_BELOW).all():
        return GREEDY
    is_cut = (rows.top_k[chosen] > 0) | (rows.top_p[chosen] < 1) | (rows.min_p[chosen] > 0)
    return CUT if is_cut.any() else DRAW


def settings(rows: Rows, row: int) -> np.ndarray:
    """A row's settings as the kernels read them, int32 [SETTINGS]."""
    line = np.zeros(sampling.SETTINGS, np.int32)
    floats = np.array([rows.temperature[row], rows.top_p[row], rows.min_p[row]], np.float32)
    line[[sampling.TEMPERATURE, sampling.TOP_P, sampling.MIN_P]] = floats.view(np.int32)
    line[sampling.TOP_K] = rows.top_k[row]
    line[[sampling.SEED_LOW, sampling.SEED_HIGH]] = rows.seed[row : row + 1].view(np.int32)
    return line


@dataclass(frozen=True, slots=True)
class Report:
    """Log-probabilities on their way to the host: of S rows, k likeliest each.

    owner: int64 [S], the sequence that row s tells about. k: int64 [S], how many of the likeliest it asks for.
    columns: token [S], logprob [S], rank [S], ids [S, K], logprobs [S, K] in host memory, valid once the step is done.
    """

    owner: np.ndarray
    k: np.ndarray
    columns: tuple[torch.Tensor, ...]

    def entries(self) -> Iterator[tuple[int, TokenLogprobs]]:
        tokens, values, ranks, ids, top = (column.numpy() for column in self.columns)
        for i, (owner, k) in enumerate(zip(self.owner.tolist(), self.k.tolist(), strict=True)):
            entry = TokenLogprobs(
                int(tokens[i]), float(values[i]), int(ranks[i]), ids[i, :k].astype(np.int32), top[i, :k].copy()
            )
            yield owner, entry


def report(logits: torch.Tensor, tokens: torch.Tensor, owner: np.ndarray, k: np.ndarray) -> Report:
    """Raw log-probabilities of `tokens` [S] under logits [S, V]."""
    tokens = tokens.long()
    columns = (tokens, *ReferenceOps.logprobs(logits, tokens, int(k.max())))
    return Report(owner, k, tuple(to_host(column) for column in columns))


def adjust(
    logits: torch.Tensor, rows: Rows, chosen: np.ndarray, wants: Sampling, tokens: torch.Tensor, mailbox: Mailbox
) -> None:
    """Change logits [S, V] as masks, bias, bans, allowed tokens and penalties want, in martlet.kernels.ops' order."""
    device = logits.device

    def there(array: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(np.ascontiguousarray(array)).to(device, non_blocking=True)

    if wants.masks is not None:
        which, bits = wants.masks
        words = mailbox.send(np.concatenate([which.astype(np.int32), bits.view(np.int32).reshape(-1)]))
        sampling.mask(logits, words[: len(which)], words[len(which) :].view(bits.shape))
    if wants.allowed is not None:
        which, ids = map(there, wants.allowed)
        kept = logits[which, ids]
        logits[there(np.unique(wants.allowed[0]))] = float("-inf")
        logits[which, ids] = kept
    if wants.bias is not None:
        which, ids, values = map(there, wants.bias)
        logits.index_put_((which, ids), values, accumulate=True)
    if wants.banned is not None:
        which, ids = map(there, wants.banned)
        logits[which, ids] = float("-inf")
    penalised = np.flatnonzero(rows.penalised[chosen])
    if len(penalised):
        _penalise(logits, rows, chosen[penalised], there(penalised), wants.position[penalised], tokens, there)


def _penalise(logits, rows: Rows, chosen: np.ndarray, which, position: np.ndarray, tokens, there) -> None:
    """The tokens a row has seen are read from the device: the host does not know the newest yet."""
    length = int(position.max())
    index = torch.arange(length, device=logits.device)
    seen_tokens = tokens[there(chosen.astype(np.int64)), :length].long()
    is_token = index < there(position)[:, None]
    is_output = is_token & (index >= there(rows.prompt_len[chosen])[:, None])
    x = logits[which]
    counts = torch.zeros_like(x).scatter_add_(1, seen_tokens, is_output.to(x.dtype))
    seen = torch.zeros_like(x).scatter_add_(1, seen_tokens, is_token.to(x.dtype)) > 0
    factor = there(rows.repetition[chosen])[:, None]
    x = torch.where(seen, torch.where(x > 0, x / factor, x * factor), x)
    frequency, presence = (there(part[chosen])[:, None] for part in (rows.frequency, rows.presence))
    logits[which] = x - frequency * counts - presence * (counts > 0)
