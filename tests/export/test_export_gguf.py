"""GGUF files: our reader gets the same numbers and the same tokenizer back."""

from __future__ import annotations

import resource

import numpy as np
import pytest
import torch

from lora_models import greedy, tune
from martlet import hub
from martlet.errors import MartletError, UsageError
from martlet.export.arguments import ExportArguments
from martlet.export.run import export
from martlet.hub.checkpoint import PackedTensor
from martlet.model import weights


def make(folder, kind="Llama", **changes):
    import transformers

    torch.manual_seed(0)
    tokenizer = hub.load_tokenizer(hub.resolve("smollm2-135m-instruct"))
    config = getattr(transformers, kind + "Config")(
        vocab_size=tokenizer.vocab_size, hidden_size=64, intermediate_size=96, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=256, initializer_range=0.1,
        bos_token_id=1, eos_token_id=2, pad_token_id=2, **changes,
    )  # fmt: skip
    model = getattr(transformers, kind + "ForCausalLM")(config).eval()
    model.save_pretrained(folder)
    tokenizer.save(folder)
    return model


def arrays(card):
    spec = weights.read_spec(card)
    for name, tensor in weights.load(card, spec, hub.open_checkpoint(card)):
        yield name, tensor.dequantise() if isinstance(tensor, PackedTensor) else np.asarray(tensor, np.float32)


LLAMA3 = {"rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 64}  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "changes"),
    [("Llama", {"tie_word_embeddings": True}), ("Llama", {"rope_parameters": LLAMA3}), ("Qwen2", {}), ("Qwen3", {})],
)
def test_a_file_holds_the_model(kind, changes, tmp_path):
    make(tmp_path / "tiny", kind, **changes)
    before = hub.resolve(str(tmp_path / "tiny"))
    file = export(ExportArguments(model=str(tmp_path / "tiny"), to="gguf", gguf_type="f32"))
    assert file == tmp_path / "tiny-f32.gguf"
    after = hub.resolve(str(file))
    old, new = weights.read_spec(before), weights.read_spec(after)
    assert (old.width, old.tied, old.max_positions, len(old.layers)) == (new.width, new.tied, new.max_positions, 2)
    from martlet.model.rope import inverse_frequencies

    for a, b in zip(old.layers, new.layers, strict=True):
        ropes = a.mixer.rope, b.mixer.rope
        np.testing.assert_allclose(*map(inverse_frequencies, ropes), rtol=1e-6)
    for (name, a), (same, b) in zip(arrays(before), arrays(after), strict=True):
        assert name == same
        np.testing.assert_array_equal(a, b, err_msg=name)
    theirs, ours = hub.load_tokenizer(before), hub.load_tokenizer(after)
    assert set(theirs.eos_ids) == set(ours.eos_ids) and theirs.bos_id == ours.bos_id
    assert theirs.chat_template == ours.chat_template


@pytest.mark.parametrize(
    ("kind", "most"), [("f16", 1e-3), ("bf16", 5e-3), ("q8_0", 1e-2), ("q4_1", 0.1), ("q4_0", 0.15)]
)
def test_types_lose_what_they_should(kind, most, tmp_path):
    make(tmp_path / "tiny")
    file = export(ExportArguments(model=str(tmp_path / "tiny"), to="gguf", gguf_type=kind, verify=True))
    old, new = dict(arrays(hub.resolve(str(tmp_path / "tiny")))), dict(arrays(hub.resolve(str(file))))
    name = "layers.1.up"
    assert np.abs(old[name] - new[name]).max() / np.abs(old[name]).max() < most
    assert np.array_equal(old["norm"], new["norm"])


def test_merged_to_gguf_answers_in_our_engine_as_peft_does(tmp_path):
    from martlet import LLM, SamplingParams

    model = make(tmp_path / "tiny")
    tuned = tune(model, tmp_path / "adapter", size=0.3)
    arguments = ExportArguments(
        ckpt_dir=str(tmp_path / "adapter"), model=str(tmp_path / "tiny"), to="gguf", gguf_type="f32"
    )
    file = export(arguments)
    prompt = list(range(5, 30))
    with LLM(str(file), device="cpu", kv_cache_tokens=512) as llm:
        params = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
        ours = list(llm.generate([prompt], params)[0].outputs[0].token_ids)
    assert ours == greedy(tuned.model, [prompt], 12)[0] != greedy(model, [prompt], 12)[0]
    with pytest.raises(UsageError, match="exists"):
        export(arguments)


def test_a_file_that_cannot_be_written_whole_leaves_nothing(tmp_path):
    """A limit on the size of files stands for a full disk: numpy writes part of a tensor and complains in its words."""
    make(tmp_path / "tiny")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (6 << 20, before[1]))
    try:
        with pytest.raises(MartletError, match="is full"):
            export(ExportArguments(model=str(tmp_path / "tiny"), to="gguf", gguf_type="f32"))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert [path.name for path in tmp_path.iterdir()] == ["tiny"]
