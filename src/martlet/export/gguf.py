"""A model as one GGUF file: what llama.cpp and we read.

Metadata and names of tensors are those that martlet.hub.gguf_config and the family pages read, so a file that is
written here is told by the same tables.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from gguf import GGMLQuantizationType, GGUFWriter
from gguf.quants import quantize

from martlet import hub
from martlet.errors import UsageError
from martlet.export import gguf_tokenizer
from martlet.export.folder import staged
from martlet.export.source import Source, merged_in_float32
from martlet.hub.card import ModelCard
from martlet.hub.checkpoint import PackedTensor
from martlet.hub.gguf_config import MODEL_TYPES
from martlet.model import families, weights
from martlet.model.rope import scaling_factors
from martlet.model.spec import DecoderSpec

log = logging.getLogger("martlet")

BLOCK = 32
FILE_TYPES = {"f32": 0, "f16": 1, "q4_0": 2, "q4_1": 3, "q8_0": 7, "bf16": 32}  # general.file_type of llama.cpp
ARCHITECTURES = {ours: theirs for theirs, ours in MODEL_TYPES.items()} | {"mistral": "llama"}
COVERED = ("llama", "mistral", "qwen2", "qwen3")


def write(source: Source, target: Path, kind: str, *, replace: bool = False) -> Path:
    """The source's model, its adapter merged in, at `target`. kind: type of the matrices; norms stay float32.

    The embedding and the head of a 4-bit file are q8_0; rows that do not divide into blocks are f16.
    Raises UsageError for a family or a tokenizer that such a file cannot tell.
    """
    card = source.card
    spec = weights.read_spec(card)
    family = families.get(card.family)
    if card.family not in COVERED:
        raise UsageError(
            f"GGUF files of family {card.family} are not written yet; those of {', '.join(COVERED)} are", param="to"
        )
    architecture = ARCHITECTURES.get(card.family, card.family)
    tokenizer = hub.load_tokenizer(card)
    with staged(target, replace=replace) as beside:
        writer = GGUFWriter(str(beside), architecture)
        try:
            _metadata(writer, architecture, card, spec, kind)
            gguf_tokenizer.write(writer, tokenizer, spec.vocab_size)
            for name, values in _tensors(source, spec, family):
                used = _kind_of(name, values, kind)
                if used in ("f32", "f16"):
                    writer.add_tensor(name, values.astype(np.float32 if used == "f32" else np.float16))
                else:
                    code = GGMLQuantizationType[used.upper()]
                    writer.add_tensor(name, quantize(values, code), raw_dtype=code)
            if factors := _rope_factors(spec):
                writer.add_tensor("rope_freqs.weight", np.array(factors, np.float32))
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_tensors_to_file()
        finally:
            writer.close()
        gguf_tokenizer.check(beside, tokenizer)
    return target


def _tensors(source: Source, spec: DecoderSpec, family: families.Family) -> Iterator[tuple[str, np.ndarray]]:
    """Every tensor under its name in GGUF, float32, its rows in the order that GGUF wants."""
    card, checkpoint = merged_in_float32(source)
    try:
        for name, tensor in weights.load(card, spec, checkpoint):
            values = tensor.dequantise() if isinstance(tensor, PackedTensor) else tensor.astype(np.float32)
            place = family.source(spec, name, "gguf")
            if place.rows is not None:
                ordered = np.empty_like(values)
                ordered[place.rows] = values
                values = ordered
            yield place.name, values
    finally:
        checkpoint.close()


def _kind_of(name: str, values: np.ndarray, kind: str) -> str:
    if values.ndim == 1:
        return "f32"
    if not kind.startswith("q"):
        return kind
    if values.shape[-1] % BLOCK:
        return "f16"
    return "q8_0" if name in ("token_embd.weight", "output.weight") else kind


def _metadata(writer: GGUFWriter, architecture: str, card: ModelCard, spec: DecoderSpec, kind: str) -> None:
    mixer, mlp = spec.layers[0].mixer, spec.layers[0].mlp
    rope = mixer.rope
    writer.add_name(card.name)
    writer.add_file_type(FILE_TYPES[kind])
    writer.add_block_count(len(spec.layers))
    writer.add_context_length(spec.max_positions)
    writer.add_embedding_length(spec.width)
    writer.add_feed_forward_length(mlp.hidden)
    writer.add_head_count(mixer.heads)
    writer.add_head_count_kv(mixer.kv_heads)
    writer.add_key_length(mixer.head_dim)
    writer.add_value_length(mixer.head_dim)
    writer.add_layer_norm_rms_eps(spec.eps)
    writer.add_rope_freq_base(rope.base)
    writer.add_rope_dimension_count(rope.dim)
    writer.add_vocab_size(spec.vocab_size)
    windows = {layer.mixer.window for layer in spec.layers}
    if windows != {None}:
        if len(windows) > 1:
            raise UsageError(f"{card.name}: a GGUF file of {architecture} has one window for all layers", param="to")
        writer.add_sliding_window(mixer.window)
    if any(layer.mixer.rope != rope for layer in spec.layers):
        raise UsageError(f"{card.name}: layers rotate differently, which no such GGUF file tells", param="to")
    if rope.scaling is not None and rope.scaling.kind in ("linear", "yarn"):
        key = f"{architecture}.rope.scaling."
        writer.add_string(key + "type", rope.scaling.kind)
        writer.add_float32(key + "factor", rope.scaling.factor)
        if rope.scaling.kind == "yarn":
            writer.add_uint32(key + "original_context_length", rope.scaling.original_max_positions)
    elif rope.scaling is not None and rope.scaling.long != rope.scaling.short:
        raise UsageError(f"{card.name}: GGUF files with LongRoPE are not written yet", param="to")


def _rope_factors(spec: DecoderSpec) -> list[float]:
    """The table that stands for Llama 3.1's scaling; [] where there is none."""
    rope = spec.layers[0].mixer.rope
    if rope.scaling is None or rope.scaling.kind in ("linear", "yarn"):
        return []
    plain = rope.base ** (-np.arange(0, rope.dim, 2, dtype=np.float64) / rope.dim)
    return scaling_factors(rope.scaling, plain, rope.base).tolist()
