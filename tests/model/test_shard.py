"""Parts of a decoder: every number of every matrix is on the ranks that need it, and nothing else is."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from martlet.errors import UsageError
from martlet.hub.card import ModelCard
from martlet.hub.checkpoint import PackedTensor
from martlet.hub.dummy import DummyCheckpoint
from martlet.hub.peft import Lora
from martlet.model import families, weights
from martlet.model.adapters import Adapter, cut
from martlet.model.shard import fitting, split
from martlet.model.weights import parameters, read_spec

FAMILIES = ("llama", "qwen2", "gemma2", "mixtral", "qwen2_moe", "qwen3_moe", "glm4", "phi3")


def card_of(family: str) -> ModelCard:
    return ModelCard(family, Path("-"), "dummy", family, config=families.example(family))


@pytest.mark.parametrize("family", FAMILIES)
def test_parts_together_are_the_whole(family):
    card = card_of(family)
    spec = read_spec(card)
    keys = spec.layers[0].mixer.kv_heads
    whole = dict(weights.load(card, spec, DummyCheckpoint()))
    sizes = [size for size in fitting(spec) if size > 1]
    assert sizes
    for size in sizes:
        parts = [split(spec, rank, size) for rank in range(size)]
        loaded = [dict(weights.load(card, part, DummyCheckpoint())) for part in parts]
        for rank, part in enumerate(parts):
            assert {p.name: p.shape for p in parameters(part)} == {n: t.shape for n, t in loaded[rank].items()}
        for name, tensor in whole.items():
            shares = [tensors[name] for tensors in loaded]
            if shares[0].shape == tensor.shape and parts[0].part.rows(name) is None:
                if name.endswith(("o.bias", "down.bias")):  # added once
                    assert not any(share.any() for share in shares[1:])
                    shares = shares[:1]
                assert all(np.array_equal(share, tensor) for share in shares)
            elif name.removesuffix(".bias").rpartition(".")[2] in ("k", "v") and keys < size:
                copies = size // keys
                assert all(np.array_equal(shares[r], shares[r // copies * copies]) for r in range(size))
                assert np.array_equal(np.concatenate(shares[::copies]), tensor)
            else:
                axis = 1 if parts[0].part.columns(name) is not None else 0
                assert np.array_equal(np.concatenate(shares, axis), tensor), name


def test_what_cannot_be_shared_evenly_is_refused_with_what_would_work():
    config = families.example("llama") | {
        "num_attention_heads": 9, "num_key_value_heads": 3, "hidden_size": 576, "intermediate_size": 1536,
    }  # fmt: skip
    spec = families.get("llama").read(config)
    with pytest.raises(UsageError, match="tensor_parallel_size 2: this model has 9 attention heads; 1 or 3 would work"):
        split(spec, 0, 2)
    assert fitting(spec) == [1, 3]
    wide = families.get("llama").read(config | {"num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 16})
    assert fitting(wide) == [1, 2, 4, 8, 16, 32]
    assert [split(wide, 0, size).layers[0].mixer.kv_heads for size in (4, 16)] == [2, 1]


def test_columns_of_packed_blocks_stay_packed_where_they_are_whole_blocks():
    whole = np.random.default_rng(0).standard_normal((6, 32), np.float32)
    packed = PackedTensor("f32", whole.shape, whole.view(np.uint8), lambda data: data.view(np.float32), block=8)
    even, odd = packed.columns(slice(8, 24)), packed.columns(slice(4, 12))
    assert isinstance(even, PackedTensor) and isinstance(odd, np.ndarray)
    assert np.array_equal(packed.rows(slice(1, 3)).columns(slice(8, 24)).dequantise(), whole[1:3, 8:24])
    assert np.array_equal(np.ascontiguousarray(even.data).view(np.float32), whole[:, 8:24])
    assert np.array_equal(odd, whole[:, 4:12])


def test_what_the_ranks_shares_of_an_adapter_add_is_what_the_adapter_adds():
    spec = read_spec(card_of("llama"))
    rng = np.random.default_rng(0)
    shapes = {p.name: p.shape for p in parameters(spec) if p.name.startswith("layers.0.") and p.kind == "linear"}
    draw = {
        name: Lora(rng.standard_normal((4, columns)), rng.standard_normal((rows, 4)), 0.5)
        for name, (rows, columns) in shapes.items()
    }
    adapter = Adapter(Path("-"), None, 4, draw)
    parts = [split(spec, rank, 2).part for rank in range(2)]
    for name, (_, columns) in shapes.items():
        x = rng.standard_normal((3, columns)).astype(np.float32)
        delta = adapter.delta(name)
        want, found = x @ delta.a.T @ delta.b.T, []
        for part in parts:
            share = cut(adapter, part).delta(name)
            mine = x if part.columns(name) is None else x[:, part.columns(name)]
            found.append(mine @ share.a.T @ share.b.T)
        got = np.concatenate(found, 1) if parts[0].columns(name) is None else sum(found)
        assert np.allclose(got, want, atol=1e-4), name


@pytest.mark.parametrize("family", ["rwkv5", "rwkv6", "rwkv7"])
def test_parts_of_a_recurrence_are_whole_heads(family):
    card = card_of(family)
    spec = read_spec(card)
    whole = dict(weights.load(card, spec, DummyCheckpoint()))
    assert len(fitting(spec)) > 1
    parts = [split(spec, rank, 2) for rank in range(2)]
    assert [part.layers[0].mixer.heads for part in parts] == [spec.layers[0].mixer.heads // 2] * 2
    loaded = [dict(weights.load(card, part, DummyCheckpoint())) for part in parts]
    for part, tensors in zip(parts, loaded, strict=True):
        assert {p.name: p.shape for p in parameters(part)} == {n: t.shape for n, t in tensors.items()}
    both = set()
    for name, tensor in whole.items():
        shares = [tensors[name] for tensors in loaded]
        if shares[0].shape == tensor.shape:
            both.add(name.rpartition(".")[2])
            assert all(np.array_equal(share, tensor) for share in shares)
        else:
            axis = 1 if parts[0].part.columns(name) is not None else 0
            assert np.array_equal(np.concatenate(shares, axis), tensor), name
    assert all(part.endswith(("norm", "bias", "_down")) or part.startswith("mix_") or part == "r" for part in both)
