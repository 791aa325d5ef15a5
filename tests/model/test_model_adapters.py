"""PEFT's folders in our names: what is read runs as PEFT runs it, what cannot be is refused by tensor and shape."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

from lora_models import make_base, tune
from martlet.errors import InvalidRequest
from martlet.hub import open_checkpoint, peft
from martlet.model import adapters
from martlet.model.weights import read_spec
from martlet.runners.base import Batch, LoadOptions, NewRow
from martlet.runners.torch_runner import TorchRunner
from martlet.sampling_params import SamplingParams

CONFIG, WEIGHTS = peft.CONFIG, peft.WEIGHTS
TOKENS = np.array([5, 6, 7, 9, 20, 31, 80], np.int32)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return make_base(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def plain(base, tmp_path_factory):
    """An adapter of rank 4 on every linear."""
    return tune(base[1], tmp_path_factory.mktemp("plain") / "adapter")


@pytest.fixture
def broken(plain, tmp_path):
    """A copy of `plain` to break: break_it(config changes, tensor changes, None to remove) -> its folder."""

    def break_it(config=None, tensors=None) -> Path:
        folder = tmp_path / "broken"
        shutil.copytree(plain.path, folder)
        told = json.loads((folder / CONFIG).read_text()) | (config or {})
        (folder / CONFIG).write_text(json.dumps(told))
        held = load_file(folder / WEIGHTS) | (tensors or {})
        save_file({name: tensor for name, tensor in held.items() if tensor is not None}, folder / WEIGHTS)
        return folder

    return break_it


def read(base, path, max_rank=64):
    return adapters.read(path, base[0], read_spec(base[0]), max_rank)


def logprobs(card, adapter=None) -> np.ndarray:
    """Ours, after TOKENS: [vocab]."""
    runner = TorchRunner(card, LoadOptions(dtype="float32", kv_cache_tokens=64, max_num_seqs=1, max_adapters=2))
    if adapter is not None:
        runner.load_adapter(2, adapter)
    zero, one = np.zeros(1, np.int32), np.ones(1, np.int32)
    params = SamplingParams(temperature=0, logprobs=97)
    new = NewRow(0, TOKENS, len(TOKENS), params, 0, adapter=2 if adapter else 0)
    batch = Batch(
        zero,
        zero,
        one * len(TOKENS),
        np.array([True]),
        new_rows=[new],
        block_rows=zero,
        block_slots=zero,
        block_ids=one,
    )
    entry = runner.launch(batch).result().logprobs[0]
    runner.close()
    out = np.empty(97, np.float32)
    out[entry.top_ids] = entry.top_logprobs
    return out


CONFIGS = {
    "all linears": {},
    "attention only": {"target_modules": ["q_proj", "v_proj"], "r": 8},
    "a regular expression": {"target_modules": r".*layers\.1\..*(up|down)_proj"},
    "rank-stabilised": {"use_rslora": True, "r": 6},
    "ranks and alphas by pattern": {
        "rank_pattern": {"q_proj": 7, r"layers\.1\.mlp\.up_proj": 2},
        "alpha_pattern": {"^model.layers.0.self_attn.o_proj": 3, "down_proj": 32},
    },
}


@pytest.mark.parametrize("name", CONFIGS)
def test_an_adapter_computes_what_peft_computes(base, name, tmp_path):
    tuned = tune(base[1], tmp_path / "adapter", **CONFIGS[name])
    adapter = read(base, tuned.path)
    np.testing.assert_allclose(logprobs(base[0], adapter), tuned.logprobs(TOKENS), atol=2e-5)
    merged = replace(base[0], merge=tuned.path)
    np.testing.assert_allclose(logprobs(merged), tuned.logprobs(TOKENS), atol=2e-5)
    assert abs(logprobs(base[0]) - tuned.logprobs(TOKENS)).max() > 0.1


def test_rank_and_base_are_read_from_the_files(base, tmp_path):
    tuned = tune(base[1], tmp_path / "adapter", rank_pattern={"k_proj": 9})
    adapter = read(base, tuned.path)
    assert (adapter.rank, adapter.base, adapter.path) == (9, None, tuned.path)
    assert sorted(adapter.loras)[:3] == ["layers.0.down", "layers.0.gate", "layers.0.k"] and len(adapter.loras) == 14
    assert not adapter.is_idle
    assert read(base, tune(base[1], tmp_path / "fresh", size=0.0).path).is_idle


@pytest.mark.parametrize("config", [{"use_dora": True}, {"modules_to_save": ["lm_head", "embed_tokens"]}])
def test_what_needs_the_base_weights_is_served_merged(config, tmp_path):
    card, model = make_base(tmp_path / "base", tie_word_embeddings=False)
    tuned = tune(model, tmp_path / "adapter", target_modules=["q_proj", "down_proj"], **config)
    with pytest.raises(InvalidRequest, match=r"DoRA|modules_to_save") as refused:
        adapters.read(tuned.path, card, read_spec(card), 64)
    assert "--merge_lora true" in str(refused.value)
    np.testing.assert_allclose(logprobs(replace(card, merge=tuned.path)), tuned.logprobs(TOKENS), atol=2e-5)


def test_merging_keeps_the_dtype_of_the_checkpoint(base, plain, tmp_path):
    half = base[1].to(torch.bfloat16)
    half.save_pretrained(tmp_path)
    base[1].float()
    card = replace(base[0], path=tmp_path, merge=plain.path)
    checkpoint = open_checkpoint(card)
    for name in ("model.layers.0.mlp.up_proj.weight", "model.norm.weight"):
        assert checkpoint.tensor(name).dtype.name == "bfloat16"
    checkpoint.close()


Q = "base_model.model.model.layers.0.self_attn.q_proj.lora_"
A, B = f"{Q}A.weight", f"{Q}B.weight"


def ones(*shape) -> np.ndarray:
    return np.ones(shape, np.float32)


REFUSED = {
    "wrong width": (None, {A: ones(4, 40)}, [A, "[4, 40]", "[128, 4]", "[128, 48]", "another model"]),
    "wrong height": (None, {B: ones(96, 4)}, [A, "[96, 4]", "[128, 48]"]),
    "no such layer": (None, {A.replace(".0.", ".7."): ones(4, 48), B.replace(".0.", ".7."): ones(128, 4)}, [
        "layers.7.self_attn.q_proj", "tiny"]),
    "no partner": (None, {B: None}, ["layers.0.self_attn.q_proj", "lora_B"]),
    "ranks disagree": (None, {A: ones(5, 48)}, [A, "[5, 48]"]),
    "rank is not the config's": ({"r": 8}, None, ["rank 4", "says 8"]),
    "NaN": (None, {A: ones(4, 48) * np.nan}, [A, "NaN"]),
    "infinity": (None, {B: ones(128, 4) * np.inf}, [B, "infinity"]),
    "integers": (None, {A: np.ones((4, 48), np.int8)}, [A, "int8"]),
    "not LoRA": ({"peft_type": "IA3"}, None, ["IA3", "LORA"]),
    "a changed base": ({"init_lora_weights": "pissa_niter_4"}, None, ["pissa", "path_initial_model"]),
    "a kind we have not": ({"layer_replication": [[0, 2]]}, None, ["layer_replication"]),
    "an odd alpha": ({"lora_alpha": "many"}, None, ["lora_alpha", "many"]),
    "an odd pattern": ({"alpha_pattern": {"(": 1}}, None, ["regular expression"]),
    "an embedding": (None, {Q.replace("q_proj.lora_", "embed_tokens.lora_embedding_A"): ones(4, 97)}, ["embedding"]),
}  # fmt: skip


@pytest.mark.parametrize("what", REFUSED)
def test_what_cannot_be_served_is_refused_by_name(base, broken, what):
    config, tensors, words = REFUSED[what]
    folder = broken(config, tensors)
    with pytest.raises(InvalidRequest) as refused:
        read(base, folder)
    assert all(word in str(refused.value) for word in [*words, str(folder)]), refused.value


def test_a_rank_above_the_limit_names_the_flag_that_takes_it(base, plain):
    with pytest.raises(InvalidRequest, match=r"lora_A.weight \[4, \d+\] has rank 4.*--max_lora_rank 4"):
        read(base, plain.path, max_rank=3)


def test_a_base_of_another_name_is_refused_when_both_are_known(base, broken):
    folder = broken({"base_model_name_or_path": "Qwen/Qwen1.5-7B-Chat"})
    assert read(base, folder).base == "Qwen/Qwen1.5-7B-Chat"  # ours is a folder that may hold anything
    card = replace(base[0], name="smollm2-135m-instruct")
    with pytest.raises(InvalidRequest, match=r"trained on Qwen/Qwen1.5-7B-Chat, and the model here is smollm2"):
        adapters.read(folder, card, read_spec(card), 64)


def test_folders_that_hold_no_adapter(base, plain, tmp_path):
    def refused(path) -> str:
        with pytest.raises(InvalidRequest) as error:
            read(base, path)
        return str(error.value)

    assert "no such folder" in refused(tmp_path / "nowhere")
    assert "whole model" in refused(base[0].path)
    assert "has no adapter_config.json" in refused(tmp_path)
    pickled = tmp_path / "pickled"
    shutil.copytree(plain.path, pickled)
    (pickled / WEIGHTS).rename(pickled / "adapter_model.bin")
    assert "a pickle, which is never read" in refused(pickled)
    (pickled / WEIGHTS).write_bytes((pickled / "adapter_model.bin").read_bytes()[:5000])
    assert WEIGHTS in refused(pickled) and "truncated" in refused(pickled)
    (pickled / CONFIG).write_text("{")
    assert "JSON" in refused(pickled)


def test_merging_checks_shapes_too(base, broken):
    folder = broken(None, {A: ones(4, 40)})
    with pytest.raises(InvalidRequest, match=r"q_proj.weight is \[128, 48\]"):
        open_checkpoint(replace(base[0], merge=folder))


def test_fused_matrices_are_split_by_the_familys_own_rows(tmp_path):
    """As in checkpoints that keep q, k and v, or gate and up, in one matrix."""
    card, model = make_base(tmp_path / "base", "Phi3", pad_token_id=0)
    tuned = tune(model, tmp_path / "adapter", target_modules=["qkv_proj", "gate_up_proj"])
    adapter = adapters.read(tuned.path, card, read_spec(card), 8)
    assert {name.rpartition(".")[2] for name in adapter.loras} == {"q", "k", "v", "gate", "up"}
    np.testing.assert_allclose(logprobs(card, adapter), tuned.logprobs(TOKENS), atol=2e-5)


def test_experts_are_served_merged(tmp_path):
    shape = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
    card, model = make_base(tmp_path / "base", "Qwen3Moe", **shape)
    card = replace(card, family="qwen3_moe")
    fits = tune(model, tmp_path / "attention", target_modules=["q_proj", "o_proj"])
    adapter = adapters.read(fits.path, card, read_spec(card), 8)
    np.testing.assert_allclose(logprobs(card, adapter), fits.logprobs(TOKENS), atol=2e-5)
    router = shutil.copytree(fits.path, tmp_path / "router")
    held = {name.replace("self_attn.q_proj", "mlp.gate"): value for name, value in load_file(router / WEIGHTS).items()}
    save_file(held, router / WEIGHTS)
    with pytest.raises(InvalidRequest, match=r"LoRA on model.layers.0.mlp.gate is served merged only"):
        adapters.read(router, card, read_spec(card), 8)


def test_swift_checkpoints_tell_their_base(plain, tmp_path):
    assert peft.origin(plain.path) == peft.Origin()
    old = tmp_path / "old"
    shutil.copytree(plain.path, old / "default")
    args = {"model_type": "qwen-7b-chat", "model_id_or_path": "qwen/Qwen-7B-Chat", "template_type": "qwen"}
    (old / "sft_args.json").write_text(json.dumps(args))
    assert peft.folder_of(old) == old / "default"
    assert peft.origin(old) == peft.Origin("qwen/Qwen-7B-Chat", "qwen-7b-chat", "qwen")
    assert peft.read(old).base == "qwen/Qwen-7B-Chat"
    new = tmp_path / "new"
    shutil.copytree(plain.path, new)
    (new / "args.json").write_text(json.dumps({"model": "Qwen/Qwen3-0.6B", "model_type": "qwen3", "template": "qwen3"}))
    assert peft.origin(new) == peft.Origin("Qwen/Qwen3-0.6B", None, "qwen3")
    assert peft.folder_of(tmp_path) is None
