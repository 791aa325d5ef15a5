"""Quantising exports: rounding that keeps products, files that stand for the rounded numbers, refusals by name."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from martlet import hub
from martlet.errors import UsageError
from martlet.export.arguments import ExportArguments
from martlet.export.quantise import layouts, rounding
from martlet.export.quantise import model as whole
from martlet.export.quantise.layerwise import LayerWise
from martlet.export.quantise.rounding import Grid
from martlet.export.run import export
from martlet.hub.checkpoint import open_checkpoint
from martlet.hub.quantised import QuantisedCheckpoint


@pytest.fixture(scope="module")
def problem():
    """A matrix, and the Gram matrix of inputs that go together and differ in size."""
    torch.manual_seed(0)
    x = torch.randn(500, 16) @ torch.randn(16, 128) + 0.3 * torch.randn(500, 128)
    x = x * torch.linspace(0.1, 3, 128)[torch.randperm(128)]
    return torch.randn(48, 128), x.T @ x / 500


@pytest.mark.parametrize("symmetric", [True, False])
def test_gptq_and_awq_keep_products_better_than_rounding(problem, symmetric):
    w, gram = problem
    grid = Grid(4, 32, symmetric)
    plain = rounding.loss(rounding.rtn(w, grid).values() - w, gram)
    ordered = rounding.gptq(w, gram, grid, act_order=True)
    assert rounding.loss(rounding.gptq(w, gram, grid).values() - w, gram) < 0.7 * plain
    assert rounding.loss(ordered.values() - w, gram) < 0.7 * plain
    scale = rounding.awq_scale([w], gram, grid)
    assert rounding.loss(rounding.rtn(w * scale, grid).values() / scale - w, gram) < plain
    apart = torch.diag(gram.diagonal())
    clipped = rounding.rtn(w, grid, rounding.best_clip(w, apart, grid)).values() - w
    assert rounding.loss(clipped, apart) < rounding.loss(rounding.rtn(w, grid).values() - w, apart)


def test_inputs_apart_leave_gptq_nothing_to_make_up(problem):
    w, _ = problem
    grid, apart = Grid(4, 32), torch.eye(128)
    plain = rounding.rtn(w, grid, rounding.best_clip(w, apart, grid))
    assert torch.equal(rounding.gptq(w, apart, grid).quants, plain.quants)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(
    ("layout", "symmetric"), [(layouts.GPTQ, True), (layouts.AWQ, False), (layouts.PACKED, True), (layouts.INT8, True)]
)
def test_files_stand_for_the_rounded_numbers(problem, layout, symmetric, bits):
    if bits not in {id(layouts.AWQ): (4,), id(layouts.INT8): (8,)}.get(id(layout), (4, 8)):
        return
    w, gram = problem
    grid = Grid(bits, 128 if layout is layouts.INT8 else 32, symmetric)
    rounded = rounding.gptq(w, gram, grid, act_order=layout is layouts.GPTQ)
    tensors = {f"a.{suffix}": array for suffix, array in layout.tensors(rounded, grid).items()}
    held = Held(tensors)
    found = QuantisedCheckpoint(held, layout.config(grid)).tensor("a.weight").dequantise()
    np.testing.assert_array_equal(found, rounded.values().numpy())


class Held:
    """A checkpoint held in a dict."""

    def __init__(self, tensors):
        self.tensors = tensors

    def names(self):
        return list(self.tensors)

    def shape(self, name):
        return self.tensors[name].shape

    def tensor(self, name):
        return self.tensors[name]

    def where(self, name):
        return "here"

    def close(self): ...


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """Tiny models of three shapes in float32, with the default model's tokenizer, and texts."""
    from transformers import AutoModelForCausalLM, Gemma2Config, LlamaConfig, Phi3Config

    place = tmp_path_factory.mktemp("models")
    tokenizer = hub.load_tokenizer(hub.resolve("smollm2-135m-instruct"))
    common = {
        "vocab_size": tokenizer.vocab_size, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
        "num_attention_heads": 4, "max_position_embeddings": 256, "bos_token_id": 1, "eos_token_id": 2,
        "pad_token_id": 0, "initializer_range": 0.1, "head_dim": 16,
    }  # fmt: skip
    made = {
        "llama": LlamaConfig(**common, num_key_value_heads=4, mlp_bias=True, tie_word_embeddings=True),
        "phi3": Phi3Config(**common, num_key_value_heads=2),
        "gemma2": Gemma2Config(**common, num_key_value_heads=2, sliding_window=32),
    }
    for name, config in made.items():
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(config).save_pretrained(place / name)
        tokenizer.save(place / name)
    rows = [{"text": f"{i} martlets met {i * i} swifts over the house, and {i % 7} of them spoke."} for i in range(60)]
    (place / "texts.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return place


def arguments(base, name, **more) -> ExportArguments:
    more = {"quant_bits": 4, "quant_group_size": 32} | more
    if more.get("quant_method") != "rtn":
        more = {"quant_n_samples": 6, "quant_seqlen": 64, "dataset": (str(base / "texts.jsonl"),)} | more
    return ExportArguments(model=str(base / name), **more)


@pytest.mark.parametrize("name", ["llama", "phi3", "gemma2"])
@pytest.mark.parametrize("method", ["rtn", "gptq", "awq"])
def test_a_quantised_folder_computes_nearly_the_same(base, tmp_path, name, method):
    target = export(arguments(base, name, quant_method=method, output=str(tmp_path / "q"), verify=True))
    card = hub.resolve(str(target))
    before = LayerWise(hub.resolve(str(base / name)), open_checkpoint(hub.resolve(str(base / name))))
    after = LayerWise(card, open_checkpoint(card))
    ids = hub.load_tokenizer(card).encode("7 martlets met 49 swifts over the house, and 0 of them spoke.")
    p, q = (model.run_all([ids])[0].log_softmax(-1) for model in (before, after))
    divergence = (p.exp() * (p - q)).sum(-1).mean()
    other = (p.exp() * (p - p.roll(1, 0))).sum(-1).mean()  # of a network that does not know which token it is at
    assert 0 < divergence < other / 8
    size = sum(file.stat().st_size for file in target.glob("*.safetensors"))
    assert size < 0.55 * sum(file.stat().st_size for file in (base / name).glob("*.safetensors"))


def held_out_errors(model, how, calibration, held):
    """{matrix of layer 0: (squared error of each held-out token's product by `how`, the same by rounding)}."""
    parts = model.fetch("layers.0")
    rounded = whole._layer(model, how, 0, model.spec.layers[0], dict(parts), model.embed([calibration]))
    inputs = {}
    model.run(0, parts, model.embed([held]), lambda name, x: inputs.update({name: x.clone()}), keep=False)
    found = {}
    for fed, members in whole.FED.items():
        for name in members:
            plain = rounding.rtn(parts[name], how.grid(parts[name].shape[1]))
            found[name] = tuple(
                (inputs[fed] @ (matrix.values() - parts[name]).T).square().sum(-1) for matrix in (rounded[name], plain)
            )
    return found


@pytest.mark.parametrize("act_order", [False, True])
def test_gptq_loses_less_than_rounding_on_texts_it_has_not_seen(base, act_order):
    card = hub.resolve(str(base / "llama"))
    model = LayerWise(card, open_checkpoint(card))
    lines = (base / "texts.jsonl").read_text().splitlines()
    ids = hub.load_tokenizer(card).encode(" ".join(json.loads(line)["text"] for line in lines))
    texts = [ids[at : at + 64] for at in range(0, len(ids) - 63, 64)]
    errors = held_out_errors(model, whole.Recipe("gptq", 4, 32, act_order), texts[:-4], texts[-4:])
    assert len(errors) == 7
    for name, (gptq, rtn) in errors.items():
        assert gptq.sum() < 0.95 * rtn.sum(), name


class Flow:
    """A model of one linear, whose inputs are given."""

    def __init__(self, x):
        self.hidden = x

    def run(self, number, parts, batches, watch, *, keep):
        watch("down", self.hidden)


def test_a_few_huge_tokens_do_not_drown_the_others():
    """As in trained models, where a text's first token is many times as large as others in front of `down`."""
    torch.manual_seed(0)
    together, w, grid = torch.randn(16, 128), torch.randn(48, 128), Grid(4, 32)
    seen, held = (torch.randn(rows, 16) @ together + 0.3 * torch.randn(rows, 128) for rows in (1000, 200))
    seen[::50] = 5000 * (torch.randn(128) + 0.1 * torch.randn(20, 128))
    flow = Flow(seen)
    gram = whole._grams(flow, 0, {}, [flow])["down"]
    gptq, rtn = rounding.gptq(w, gram, grid), rounding.rtn(w, grid)
    ours, plain = ((held @ (one.values() - w).T).square().sum() for one in (gptq, rtn))
    assert ours < 0.3 * plain


def test_folded_scales_change_nothing_but_rounding(base):
    """awq without rounding is the model itself."""
    card = hub.resolve(str(base / "llama"))
    model = LayerWise(card, open_checkpoint(card))
    ids = list(range(40, 90))
    want = model.run_all([ids])[0]
    how = whole.Recipe("awq", 4, 32)
    batches = model.embed([[ids]])
    for number, layer in enumerate(model.spec.layers):
        parts = model.fetch(f"layers.{number}")
        grams = whole._grams(model, number, parts, batches)
        scaled = dict(parts)
        whole._fold(layer, scaled, {name: gram + 0.01 * torch.eye(len(gram)) for name, gram in grams.items()}, how)
        assert not torch.equal(scaled["attn_norm"], parts["attn_norm"])
        model.run(number, scaled, batches)
    torch.testing.assert_close(model.logits(batches[0]), want, atol=2e-4, rtol=1e-4)


def test_eight_bits_are_close(base, tmp_path):
    for method in ("rtn", "gptq"):
        given = arguments(base, "llama", quant_method=method, quant_bits=8, output=str(tmp_path / method))
        card = hub.resolve(str(export(given)))
        ids = list(range(30, 80))
        plain = hub.resolve(str(base / "llama"))
        p, q = (LayerWise(c, open_checkpoint(c)).run_all([ids])[0].log_softmax(-1) for c in (plain, card))
        assert (p - q).abs().max() < 0.2


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"quant_method": "awq", "quant_bits": 8}, "awq rounds to 4 bits, not 8"),
        ({"quant_method": "gptq", "quant_bits": 3}, "gptq rounds to 4 or 8 bits"),
        ({"quant_method": "gptq", "quant_group_size": 128}, "64, 96 inputs have no whole groups of 128; .* 32, -1"),
        ({"quant_method": "rtn", "quant_act_order": False}, "quant_act_order belongs to --quant_method gptq"),
        ({"quant_method": "rtn", "quant_n_samples": 4}, "quant_n_samples belongs to --quant_bits by gptq or awq"),
        ({"quant_method": "gptq", "quant_seqlen": 0}, "quant_seqlen must be at least 1, got 0"),
        ({"quant_method": "gptq", "quant_device_map": "gpu"}, "must be cpu, cuda or cuda:N, got 'gpu'"),
        ({"quant_method": "gptq", "gguf_type": "q4_0"}, "gguf_type belongs to --to gguf"),
        ({"quant_method": "awq", "quant_seqlen": 512}, "512 is more than the 256 positions"),
        ({"quant_method": "awq", "to": "gguf"}, "neither --to nor"),
    ],
)
def test_what_cannot_be_done_is_told(base, tmp_path, more, message):
    with pytest.raises(UsageError, match=message):
        export(arguments(base, "llama", output=str(tmp_path / "q"), **more))
    assert not list(tmp_path.iterdir())


def test_calibration_needs_texts_and_an_empty_place(base, tmp_path):
    given = arguments(base, "llama", quant_method="rtn", output=str(tmp_path))
    with pytest.raises(UsageError, match="exists"):
        export(given)
    with pytest.raises(UsageError, match="needs --dataset"):
        export(ExportArguments(model=str(base / "llama"), quant_bits=4, output=str(tmp_path / "q")))
