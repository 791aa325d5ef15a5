"""BERT's encoder as data: bidirectional, for embeddings. MiniLM, BGE, E5 and GTE (the BERT-shaped ones) share it.

    word + position + type embeddings -> norm -> layers x (attention, add, norm, feed-forward, add, norm) -> pooling

What stands in a checkpoint of sentence-transformers beside the network is read too: how token vectors become one
vector (`pooling`) and how many tokens a text may have. Source: the BERT paper; names of Hugging Face's BertModel.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np

from martlet.errors import CheckpointError
from martlet.hub.card import ModelCard
from martlet.hub.checkpoint import Checkpoint, PackedTensor
from martlet.hub.dummy import DummyCheckpoint
from martlet.hub.files import read_json
from martlet.model.families import ENCODERS
from martlet.model.families.family import need, read_activation

Pooling = Literal["mean", "cls", "max"]


@dataclass(frozen=True, slots=True)
class EncoderSpec:
    """A whole encoder. eps: of every LayerNorm. max_tokens: of a text, its special tokens counted."""

    vocab_size: int
    width: int
    layers: int
    heads: int
    hidden: int
    positions: int
    types: int
    eps: float
    activation: str
    pooling: Pooling
    max_tokens: int


def read_encoder(card: ModelCard) -> EncoderSpec:
    """The encoder of a card. Raises CheckpointError for one we cannot run."""
    config = card.config
    if card.family not in ENCODERS:
        raise CheckpointError(f"{card.name} is of family {card.family!r}; embeddings come from {', '.join(ENCODERS)}")
    kind = config.get("position_embedding_type") or "absolute"
    if kind != "absolute":
        raise CheckpointError(f"{card.name}: position_embedding_type {kind!r} is not supported; absolute is")
    positions = need(config, "max_position_embeddings")
    said = read_json(card.path / "sentence_bert_config.json", missing={}).get("max_seq_length")
    return EncoderSpec(
        vocab_size=need(config, "vocab_size"),
        width=need(config, "hidden_size"),
        layers=need(config, "num_hidden_layers"),
        heads=need(config, "num_attention_heads"),
        hidden=need(config, "intermediate_size"),
        positions=positions,
        types=int(config.get("type_vocab_size") or 1),
        eps=float(config.get("layer_norm_eps") or 1e-12),
        activation=read_activation(config),
        pooling=_pooling(card),
        max_tokens=min(int(said or positions), positions),
    )


def _pooling(card: ModelCard) -> Pooling:
    """Of sentence-transformers' modules.json; the mean where there is none."""
    file = card.path / "modules.json"
    modules = json.loads(file.read_text("utf-8")) if file.is_file() else []
    folders = [module.get("path", "") for module in modules if str(module.get("type", "")).endswith("Pooling")]
    if not folders:
        return "mean"
    table = read_json(card.path / folders[0] / "config.json")
    on = [key for key, value in table.items() if key.startswith("pooling_mode_") and value is True]
    known = {"pooling_mode_mean_tokens": "mean", "pooling_mode_cls_token": "cls", "pooling_mode_max_tokens": "max"}
    if len(on) != 1 or on[0] not in known:
        raise CheckpointError(
            f"{card.name}: pooling {', '.join(on) or 'of no kind'} is not supported; one of mean, cls, max is"
        )
    return known[on[0]]


_LAYER = {
    "q": "attention.self.query",
    "k": "attention.self.key",
    "v": "attention.self.value",
    "o": "attention.output.dense",
    "attn_norm": "attention.output.LayerNorm",
    "up": "intermediate.dense",
    "down": "output.dense",
    "mlp_norm": "output.LayerNorm",
}


def parameters(spec: EncoderSpec) -> Iterator[tuple[str, str, tuple[int, ...]]]:
    """(our name, the checkpoint's, shape) of every parameter; linears are [out, in]."""
    wide, hidden = spec.width, spec.hidden
    tables = {"word": spec.vocab_size, "position": spec.positions, "token_type": spec.types}
    for name, rows in tables.items():
        yield name, f"embeddings.{name}_embeddings.weight", (rows, wide)
    for part in ("weight", "bias"):
        yield f"norm.{part}", f"embeddings.LayerNorm.{part}", (wide,)
    rows = {"q": wide, "k": wide, "v": wide, "o": wide, "up": hidden, "down": wide, "attn_norm": wide, "mlp_norm": wide}
    for n in range(spec.layers):
        for name, theirs in _LAYER.items():
            at = f"encoder.layer.{n}.{theirs}"
            if not name.endswith("norm"):
                columns = hidden if name == "down" else wide
                yield f"layers.{n}.{name}.weight", f"{at}.weight", (rows[name], columns)
            else:
                yield f"layers.{n}.{name}.weight", f"{at}.weight", (rows[name],)
            yield f"layers.{n}.{name}.bias", f"{at}.bias", (rows[name],)


def load(card: ModelCard, spec: EncoderSpec, checkpoint: Checkpoint | DummyCheckpoint) -> dict[str, np.ndarray]:
    """Every parameter in float32. Raises CheckpointError naming the tensor that is missing or misshapen."""
    dummy = isinstance(checkpoint, DummyCheckpoint)
    prefix = "" if dummy or "embeddings.word_embeddings.weight" in checkpoint.names() else "bert."
    found: dict[str, np.ndarray] = {}
    for name, theirs, shape in parameters(spec):
        if dummy:
            found[name] = np.asarray(checkpoint.random(name, shape), np.float32)
            continue
        try:
            there = checkpoint.shape(prefix + theirs)
        except KeyError:
            raise CheckpointError(f"{card.path} has no tensor {prefix + theirs!r}, which {card.name} needs") from None
        if tuple(there) != shape:
            raise CheckpointError(f"tensor {prefix + theirs!r} has shape {list(there)}, wanted {list(shape)}")
        tensor = checkpoint.tensor(prefix + theirs)
        plain = tensor.dequantise() if isinstance(tensor, PackedTensor) else tensor
        found[name] = np.array(plain, np.float32)  # a copy: the file's mapping is not kept
    return found
