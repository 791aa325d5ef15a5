"""Runs an encoder in numpy, float32: one pass turns a batch of texts into vectors. No torch.

Texts are packed, token after token, so that nothing is computed for padding: linears see all tokens at once, attention
sees texts of one length together. The products are BLAS's; what lies between them is done in pieces that fit a cache.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from martlet import hub
from martlet.hub.card import ModelCard
from martlet.hub.dummy import DummyCheckpoint
from martlet.model.encoder import EncoderSpec, load, read_encoder
from martlet.runners.base import LoadOptions

PIECE = 1 << 15  # elements of an activation that stay in a core's cache through several passes


class EncoderRunner:
    """spec: what it runs. `encode` may be called from one thread at a time."""

    def __init__(self, card: ModelCard, options: LoadOptions):
        """Raises CheckpointError."""
        self.spec = read_encoder(card)
        checkpoint = DummyCheckpoint(options.seed) if card.format == "dummy" else hub.open_checkpoint(card)
        try:
            weights = load(card, self.spec, checkpoint)
        finally:
            checkpoint.close()
        self._weights = _fused(self.spec, weights)
        self._activate = _ACTIVATIONS[self.spec.activation]

    def encode(self, texts: Sequence[np.ndarray]) -> np.ndarray:
        """Token ids of each text, its special tokens among them -> float32 [texts, width], not normalised."""
        spec, weights = self.spec, self._weights
        lengths = np.array([len(text) for text in texts])
        order = np.argsort(lengths, kind="stable")  # texts of one length lie together
        ids = np.concatenate([texts[i] for i in order])
        lengths = lengths[order]
        starts = np.cumsum(lengths) - lengths
        positions = np.arange(len(ids)) - np.repeat(starts, lengths)
        groups = _groups(lengths, starts)

        x = weights["word"][ids]
        x += weights["position"][positions]
        x += weights["token_type"][0]
        _layer_norm(x, weights["norm.weight"], weights["norm.bias"], spec.eps)
        for n in range(spec.layers):
            at = f"layers.{n}."
            qkv = x @ weights[at + "qkv.weight"]
            qkv += weights[at + "qkv.bias"]
            x += _attention(qkv, groups, spec) @ weights[at + "o.weight"]
            x += weights[at + "o.bias"]
            _layer_norm(x, weights[at + "attn_norm.weight"], weights[at + "attn_norm.bias"], spec.eps)
            hidden = x @ weights[at + "up.weight"]
            hidden += weights[at + "up.bias"]
            self._activate(hidden)
            x += hidden @ weights[at + "down.weight"]
            x += weights[at + "down.bias"]
            _layer_norm(x, weights[at + "mlp_norm.weight"], weights[at + "mlp_norm.bias"], spec.eps)
        vectors = np.empty((len(texts), spec.width), np.float32)
        vectors[order] = _pool(x, starts, lengths, spec.pooling)
        return vectors


def _fused(spec: EncoderSpec, weights: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """q, k and v as one matrix, q scaled; linears as [in, out], the way BLAS takes them without a copy."""
    scale = np.float32((spec.width // spec.heads) ** -0.5)
    for n in range(spec.layers):
        at = f"layers.{n}."
        for part in ("weight", "bias"):
            q, k, v = (weights.pop(f"{at}{name}.{part}") for name in "qkv")
            weights[f"{at}qkv.{part}"] = np.concatenate([q * scale, k, v])
        for name in ("qkv", "o", "up", "down"):
            weights[f"{at}{name}.weight"] = np.ascontiguousarray(weights[f"{at}{name}.weight"].T)
    return weights


def _groups(lengths: np.ndarray, starts: np.ndarray) -> list[tuple[int, int, int]]:
    """(first token, texts, length) of each run of texts of one length."""
    edges = np.flatnonzero(np.diff(lengths, prepend=-1))
    ends = np.append(edges[1:], len(lengths))
    return [(int(starts[a]), int(b - a), int(lengths[a])) for a, b in zip(edges, ends, strict=True)]


def _attention(qkv: np.ndarray, groups: list[tuple[int, int, int]], spec: EncoderSpec) -> np.ndarray:
    """[tokens, 3 * width] -> [tokens, width]: every token sees all tokens of its text."""
    heads, dim = spec.heads, spec.width // spec.heads
    out = np.empty((len(qkv), spec.width), np.float32)
    for first, texts, length in groups:
        rows = slice(first, first + texts * length)
        q, k, v = qkv[rows].reshape(texts, length, 3, heads, dim).transpose(2, 0, 3, 1, 4)
        scores = q @ k.swapaxes(-1, -2)
        scores -= scores.max(-1, keepdims=True)
        np.exp(scores, out=scores)
        scores /= scores.sum(-1, keepdims=True)
        out[rows] = (scores @ v).transpose(0, 2, 1, 3).reshape(texts * length, spec.width)
    return out


def _layer_norm(x: np.ndarray, weight: np.ndarray, bias: np.ndarray, eps: float) -> None:
    """In place, over the last axis of [tokens, width]."""
    x -= x.mean(-1, keepdims=True)
    variance = np.einsum("nw,nw->n", x, x) / x.shape[1]
    x *= (1 / np.sqrt(variance + eps)).astype(np.float32)[:, None]
    x *= weight
    x += bias


def _pool(x: np.ndarray, starts: np.ndarray, lengths: np.ndarray, how: str) -> np.ndarray:
    if how == "cls":
        return x[starts]
    if how == "max":
        return np.maximum.reduceat(x, starts)
    return np.add.reduceat(x, starts) / lengths[:, None].astype(np.float32)


def _in_pieces(apply: Callable[[np.ndarray], None]) -> Callable[[np.ndarray], None]:
    def whole(x: np.ndarray) -> None:
        flat = x.reshape(-1)
        for at in range(0, len(flat), PIECE):
            apply(flat[at : at + PIECE])

    return whole


# erf by Abramowitz and Stegun 7.1.26: within 1.5e-7, about float32's own precision, in operations that numpy has.
_ERF = tuple(np.float32(c) for c in (1.061405429, -1.453152027, 1.421413741, -0.284496736, 0.254829592))


@_in_pieces
def _gelu(x: np.ndarray) -> None:
    z = np.abs(x)
    z *= np.float32(2**-0.5)
    t = 1 / (1 + np.float32(0.3275911) * z)
    tail = t * _ERF[0]
    for coefficient in _ERF[1:]:
        tail += coefficient
        tail *= t
    z *= -z
    tail *= np.exp(z, out=z)  # 1 - erf(|x| / sqrt 2)
    half = np.float32(0.5) * x
    np.copysign(1 - tail, x, out=tail)
    np.multiply(half, tail + 1, out=x)


@_in_pieces
def _gelu_tanh(x: np.ndarray) -> None:
    inner = x * x
    inner *= np.float32(0.044715)
    inner += 1
    inner *= x
    inner *= np.float32((2 / np.pi) ** 0.5)
    np.multiply(np.float32(0.5) * x, np.tanh(inner) + 1, out=x)


@_in_pieces
def _silu(x: np.ndarray) -> None:
    x /= 1 + np.exp(-x)


@_in_pieces
def _relu(x: np.ndarray) -> None:
    np.maximum(x, 0, out=x)


_ACTIVATIONS = {"gelu": _gelu, "gelu_tanh": _gelu_tanh, "silu": _silu, "relu": _relu}
