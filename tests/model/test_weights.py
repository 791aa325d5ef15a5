"""Parameters by name and shape, their sources in checkpoints, and refusals that say where."""

from pathlib import Path

import numpy as np
import pytest

from martlet.errors import CheckpointError
from martlet.hub.card import ModelCard
from martlet.hub.checkpoint import PackedTensor
from martlet.hub.dummy import DummyCheckpoint
from martlet.model import families, weights

CONFIG = {
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 50,
}


class Held:
    """A checkpoint held in a dict."""

    def __init__(self, tensors: dict):
        self.tensors = tensors

    def names(self):
        return list(self.tensors)

    def shape(self, name):
        return self.tensors[name].shape

    def tensor(self, name):
        return self.tensors[name]

    def where(self, name):
        return "part-2.bin"

    def close(self): ...


def card(layout: str, family: str = "llama", **config) -> ModelCard:
    return ModelCard("tiny", Path("tiny"), layout, family, config=CONFIG | {"model_type": family} | config)


def filled(a_card: ModelCard, layout: str = "") -> tuple[Held, dict[str, np.ndarray]]:
    """A full checkpoint of random tensors under the file's names, and what of them is to become each parameter."""
    spec, rng = weights.read_spec(a_card), np.random.default_rng(0)
    family, tensors, ours = families.get(a_card.family), {}, {}
    for parameter in weights.parameters(spec):
        source = family.source(spec, parameter.name, layout or a_card.format)
        if source.name not in tensors:
            tensors[source.name] = rng.standard_normal(source.shape(parameter.shape)).astype(np.float32)
        assert tensors[source.name].shape == source.shape(parameter.shape)
        tensor = tensors[source.name] if source.item is None else tensors[source.name][source.item]
        tensor = tensor.T if source.transposed else 1 - tensor if source.complement else tensor
        ours[parameter.name] = (tensor if source.rows is None else tensor[source.rows]) + source.add
    return Held(tensors), ours


@pytest.mark.parametrize("family", families.names())
@pytest.mark.parametrize("layout", ["safetensors", "gguf", "original"])
def test_every_tensor_is_used_once(family, layout):
    """What is read from a checkpoint is all of it, no row twice: fused and stacked tensors are cut without a rest."""
    page = families.get(family)
    if layout == "original" and page.original is None:
        assert page.layout([page.source(page.read(families.example(family)), "embed", "").name]) == "hf"
        return
    kind = "gguf" if layout == "gguf" else "safetensors"
    a_card = ModelCard("tiny", Path("tiny"), kind, family, config=families.example(family))
    if layout == "gguf" and page.gguf is None:
        with pytest.raises(CheckpointError, match="GGUF files of family"):
            filled(a_card, layout)
        return
    checkpoint, ours = filled(a_card, layout)
    spec = weights.read_spec(a_card)
    loaded = dict(weights.load(a_card, spec, checkpoint))
    assert list(loaded) == [p.name for p in weights.parameters(spec)] == list(ours)
    for name, array in loaded.items():
        assert np.allclose(array, ours[name]), name
    read, stored = (
        np.sort(np.concatenate([a.ravel() for a in side.values()])) for side in (loaded, checkpoint.tensors)
    )
    changed = family == "rwkv5" or (layout == "safetensors" and page.norm_offset)  # numbers on the way, all of them
    assert sum(a.size for a in loaded.values()) == weights.num_parameters(spec) == len(stored)
    assert changed or np.array_equal(read, stored)


def test_gemma_norms_are_stored_less_one():
    a_card = card("safetensors", "gemma", head_dim=8)
    checkpoint, _ = filled(a_card)
    loaded = dict(weights.load(a_card, weights.read_spec(a_card), checkpoint))
    assert np.allclose(loaded["norm"], checkpoint.tensors["model.norm.weight"] + 1)
    a_card = card("gguf", "gemma", head_dim=8)
    checkpoint, _ = filled(a_card)
    assert np.array_equal(
        dict(weights.load(a_card, weights.read_spec(a_card), checkpoint))["norm"],
        checkpoint.tensors["output_norm.weight"],
    )


def test_parts_of_packed_tensors():
    """Rows of a fused matrix and one matrix of a stack stay packed."""
    a_card = card("gguf", "phi3")
    spec = weights.read_spec(a_card)
    checkpoint, ours = filled(a_card)
    whole = checkpoint.tensors["blk.0.attn_qkv.weight"]
    packed = PackedTensor("whole", whole.shape, whole.view(np.uint8), lambda data: data.view(np.float32))
    checkpoint.tensors["blk.0.attn_qkv.weight"] = packed
    found = dict(weights.load(a_card, spec, checkpoint))["layers.0.k"]
    assert isinstance(found, PackedTensor) and found.shape == (16, 32)
    assert np.array_equal(found.dequantise(), ours["layers.0.k"]) and np.array_equal(ours["layers.0.k"], whole[32:48])
    stack = np.arange(3 * 4 * 8, dtype=np.float32).reshape(3, 4, 8)
    packed = PackedTensor("whole", stack.shape, stack.view(np.uint8), lambda data: data.view(np.float32))
    assert np.array_equal(packed.item_at(2).dequantise(), stack[2])


def test_tied_models_have_no_head():
    names = [p.name for p in weights.parameters(weights.read_spec(card("safetensors", tie_word_embeddings=True)))]
    assert "head" not in names and names[-1] == "norm"


def test_gguf_rows_of_q_and_k_are_put_back():
    """The converter turns row j * D / 2 + i of a head into row 2 i + j."""
    original = np.arange(4 * 8 * 32, dtype=np.float32).reshape(32, 32)
    stored = original.reshape(4, 2, 4, 32).swapaxes(1, 2).reshape(32, 32)
    a_card = card("gguf")
    spec = weights.read_spec(a_card)
    checkpoint, _ = filled(a_card)
    checkpoint.tensors["blk.1.attn_q.weight"] = stored
    assert np.array_equal(dict(weights.load(a_card, spec, checkpoint))["layers.1.q"], original)

    packed = PackedTensor("whole", (32, 32), stored.view(np.uint8), lambda data: data.view(np.float32))
    checkpoint.tensors["blk.1.attn_q.weight"] = packed
    found = dict(weights.load(a_card, spec, checkpoint))["layers.1.q"]
    assert isinstance(found, PackedTensor) and np.array_equal(found.dequantise(), original)


def test_a_missing_tensor_is_named():
    a_card = card("safetensors")
    checkpoint, _ = filled(a_card)
    del checkpoint.tensors["model.layers.1.mlp.up_proj.weight"]
    with pytest.raises(CheckpointError, match=r"layers\.1\.up.*model\.layers\.1\.mlp\.up_proj\.weight.*not in tiny"):
        list(weights.load(a_card, weights.read_spec(a_card), checkpoint))


def test_a_misshapen_tensor_is_named():
    a_card = card("gguf")
    checkpoint, _ = filled(a_card)
    checkpoint.tensors["output_norm.weight"] = np.ones(31, np.float32)
    with pytest.raises(CheckpointError, match=r"'norm'.*output_norm\.weight.*part-2\.bin.*\[31\].*\[32\]"):
        list(weights.load(a_card, weights.read_spec(a_card), checkpoint))


def test_dummy_weights_have_every_shape():
    a_card = card("dummy", "qwen3")
    spec = weights.read_spec(a_card)
    loaded = dict(weights.load(a_card, spec, DummyCheckpoint(1)))
    assert {n: a.shape for n, a in loaded.items()} == {p.name: p.shape for p in weights.parameters(spec)}


def test_fused_rows():
    assert weights.fused_rows([("q", 6), ("k", 2), ("v", 2)]) == {"q": slice(0, 6), "k": slice(6, 8), "v": slice(8, 10)}
