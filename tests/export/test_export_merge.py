"""Merging adapters into folders: the numbers are peft's, and nothing stale or half-written is taken for a result."""

from __future__ import annotations

import errno
import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch

from lora_models import tune
from martlet import hub
from martlet.cli import main
from martlet.errors import MartletError, UsageError
from martlet.export import folder
from martlet.export.arguments import ExportArguments
from martlet.export.run import export


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A tiny llama in float32 with the default model's tokenizer."""
    from transformers import LlamaConfig, LlamaForCausalLM

    place = tmp_path_factory.mktemp("models") / "tiny"
    torch.manual_seed(0)
    tokenizer = hub.load_tokenizer(hub.resolve("smollm2-135m-instruct"))
    config = LlamaConfig(
        vocab_size=tokenizer.vocab_size,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
    )
    model = LlamaForCausalLM(config).eval()
    model.save_pretrained(place)
    tokenizer.save(place)
    return place, model


@pytest.fixture
def checkpoint(base, tmp_path):
    """A checkpoint of a run on `base`, and peft's model of it."""
    place = tmp_path / "checkpoint-7"
    tuned = tune(base[1], place)
    args = {"model": str(base[0]), "sft_type": "lora", "lora_rank": 4, "target_modules": ["ALL"], "seed": 3}
    (place / "args.json").write_text(json.dumps(args))
    return place, tuned.model


@pytest.mark.parametrize("config", [{}, {"use_dora": True}, {"use_rslora": True}])
def test_a_merged_folder_computes_what_peft_does(base, tmp_path, config):
    from transformers import AutoModelForCausalLM

    place = tmp_path / "adapter"
    tuned = tune(base[1], place, **config)
    merged = export(ExportArguments(ckpt_dir=str(place), model=str(base[0]), merge_lora=True, verify=True))
    assert merged == tmp_path / "adapter-merged"
    ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        theirs = AutoModelForCausalLM.from_pretrained(merged)(ids).logits
        assert (theirs - tuned.model(ids).logits).abs().max() < 1e-4
        assert (theirs - base[1](ids).logits).abs().max() > 1e-2


def test_the_base_is_found_and_the_folder_is_a_whole_model(base, checkpoint):
    place, _ = checkpoint
    merged = export(ExportArguments(ckpt_dir=str(place), merge_lora=True, dtype="bf16"))
    args = json.loads((merged / "args.json").read_text())
    assert args["sft_type"] == "full" and args["seed"] == 3 and "lora_rank" not in args
    card = hub.resolve(str(merged))
    assert card.is_chat and card.config["dtype"] == "bfloat16"
    assert hub.open_checkpoint(card).tensor("model.norm.weight").dtype.name == "bfloat16"
    text = "Who are you?"
    ours, bases = (hub.load_tokenizer(c).encode(text) for c in (card, hub.resolve(str(base[0]))))
    assert ours == bases


def test_a_stale_target_is_refused_and_an_equal_one_kept(checkpoint):
    place, _ = checkpoint
    arguments = ExportArguments(ckpt_dir=str(place), merge_lora=True)
    merged = export(arguments)
    written = (merged / "model.safetensors").stat().st_mtime_ns
    assert export(arguments) == merged and (merged / "model.safetensors").stat().st_mtime_ns == written
    config = json.loads((place / "adapter_config.json").read_text())
    (place / "adapter_config.json").write_text(json.dumps(config | {"lora_alpha": 1}))
    before = hub.open_checkpoint(hub.resolve(str(merged))).tensor("model.layers.0.mlp.up_proj.weight").copy()
    with pytest.raises(UsageError, match="--replace_if_exists"):
        export(arguments)
    export(replace(arguments, replace_if_exists=True))
    after = hub.open_checkpoint(hub.resolve(str(merged))).tensor("model.layers.0.mlp.up_proj.weight")
    assert np.abs(before - after).max() > 0


def test_swift_2_layouts(base, checkpoint, tmp_path):
    place, _ = checkpoint
    old = tmp_path / "checkpoint-9"
    shutil.copytree(place, old / "default")
    (old / "default" / "args.json").unlink()
    (old / "sft_args.json").write_text(json.dumps({"model_id_or_path": str(base[0]), "sft_type": "lora"}))
    merged = export(ExportArguments(ckpt_dir=str(old), merge_lora=True))
    assert (merged / "model.safetensors").is_file()
    plain = export(ExportArguments(ckpt_dir=str(old), to_peft_format=True))
    assert plain == tmp_path / "checkpoint-9-peft" and (plain / "adapter_model.safetensors").is_file()
    assert export(ExportArguments(ckpt_dir=str(place), to_peft_format=True)) == place


def test_a_full_disk_leaves_nothing(checkpoint, monkeypatch):
    place, _ = checkpoint

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(folder, "write_weights", full)
    with pytest.raises(MartletError, match="is full"):
        export(ExportArguments(ckpt_dir=str(place), merge_lora=True))
    assert [p.name for p in place.parent.iterdir()] == [place.name]


def test_verify_fails_for_a_merge_that_is_none(checkpoint, base):
    from martlet.export.source import find
    from martlet.export.verify import check_merged

    place, _ = checkpoint
    with pytest.raises(MartletError, match="is not the adapter on its base"):
        check_merged(find(ExportArguments(ckpt_dir=str(place))), base[0])


def test_verify_decides_in_float64_what_float32_cannot(checkpoint, monkeypatch):
    from martlet.export import verify
    from martlet.export.source import find

    place, _ = checkpoint
    merged = export(ExportArguments(ckpt_dir=str(place), merge_lora=True, replace_if_exists=True))
    source, compare, asked = find(ExportArguments(ckpt_dir=str(place))), verify.compare, []

    def noisy(source, result, dtype=torch.float32):
        asked.append(dtype)
        found = compare(source, result, dtype)
        return replace(found, largest=1e-3) if dtype == torch.float32 else found

    monkeypatch.setattr(verify, "compare", noisy)
    assert verify.check_merged(source, merged).largest < 1e-5 and asked == [torch.float32, torch.float64]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "nothing to do"),
        (["--merge_lora", "true"], "--ckpt_dir DIR, or --model"),
        (["--merge_lora", "--ckpt_dir", "nowhere"], "there is no folder"),
        (["--push_to_hub", "--ckpt_dir", "."], "--hub_model_id"),
        (["--quant_bits", "4", "--to", "gguf"], "neither --to nor"),
        (["--to_ollama", "true"], "not supported yet"),
    ],
)
def test_bad_words_are_named(words, said, capsys):
    assert main(["export", *words]) == 2
    assert said in capsys.readouterr().err


def test_upload_goes_through_the_library(checkpoint, monkeypatch):
    import huggingface_hub
    from huggingface_hub.utils import filter_repo_objects

    calls = []

    class Fake:
        def __init__(self, token=None):
            calls.append(("token", token))

        def create_repo(self, name, **settings):
            calls.append((name, settings["private"]))

        def upload_folder(self, *, repo_id, folder_path, commit_message, ignore_patterns):
            calls.append((repo_id, folder_path, commit_message))
            names = ["optimizer.pt", "rng_state_0.pth", "adapter.safetensors"]
            left = filter_repo_objects(names, ignore_patterns=ignore_patterns)
            assert list(left) == ["adapter.safetensors"]

    monkeypatch.setattr(huggingface_hub, "HfApi", Fake)
    place, _ = checkpoint
    export(ExportArguments(ckpt_dir=str(place), push_to_hub=True, hub_model_id="me/mine", hub_token="t"))
    assert calls == [("token", "t"), ("me/mine", False), ("me/mine", str(place), "update files")]
