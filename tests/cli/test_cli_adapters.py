"""What the adapter flags mean together."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from martlet.cli import infer
from martlet.cli.adapters import Chosen, choose, with_slots
from martlet.cli.flags import parse
from martlet.errors import InvalidRequest, MartletError, UsageError
from martlet.runners.base import LoadOptions


@pytest.fixture
def folders(tmp_path, monkeypatch):
    """Two adapters, one of an older SWIFT beside its notes, and a whole checkpoint."""
    monkeypatch.chdir(tmp_path)

    def adapter(name: str, **config) -> Path:
        Path(name).mkdir(parents=True)
        Path(name, "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 8} | config))
        return Path(name)

    adapter("tuned", base_model_name_or_path="HuggingFaceTB/SmolLM2-135M-Instruct")
    adapter("large", r=32, rank_pattern={"q_proj": 128})
    adapter("foreign", base_model_name_or_path="somebody/unheard-of")
    adapter("v0/checkpoint-9/default")
    args = {"model_type": "qwen-7b-chat", "model_id_or_path": "nowhere/cache/Qwen-7B-Chat"}
    Path("v0/checkpoint-9/sft_args.json").write_text(json.dumps(args))
    Path("merged").mkdir()
    Path("merged/config.json").write_text("{}")
    Path("merged/sft_args.json").write_text(json.dumps(args))
    return tmp_path


def read(*words: str):
    return parse(infer.InferOptions, list(words))


def chosen(*words: str) -> Chosen:
    options = read(*words)
    return choose(options, options)


def test_adapters_by_name_and_by_folder(folders):
    assert chosen("--model", "m", "--adapters", "a=tuned", "large") == Chosen(
        "m", None, {"a": "tuned", "large": "large"}
    )
    assert chosen("--model", "m", "--lora_modules", "a=tuned").beside == {"a": "tuned"}
    assert chosen("--model", "m").beside == {}


def test_a_checkpoint_is_an_adapter_or_a_model(folders):
    wanted = Chosen("HuggingFaceTB/SmolLM2-135M-Instruct", None, {"default-lora": "tuned", "b": "large"})
    assert chosen("--ckpt_dir", "tuned", "--lora_modules", "b=large") == wanted
    assert chosen("--ckpt_dir", "v0/checkpoint-9") == Chosen(None, "qwen-7b-chat", {"default-lora": "v0/checkpoint-9"})
    assert chosen("--ckpt_dir", "merged") == Chosen("merged", "qwen-7b-chat")
    assert chosen("--model", "m", "--ckpt_dir", "foreign").model == "m"


def test_merging_takes_one_adapter(folders):
    wanted = Chosen("HuggingFaceTB/SmolLM2-135M-Instruct", None, {}, Path("tuned"))
    assert chosen("--ckpt_dir", "tuned", "--merge_lora", "true") == wanted
    assert chosen("--adapters", "tuned", "--merge_lora", "true") == wanted
    for words in ([], ["--adapters", "tuned", "large"], ["--ckpt_dir", "merged"]):
        with pytest.raises(UsageError, match="merge_lora"):
            chosen("--model", "m", *words, "--merge_lora", "true")


@pytest.mark.parametrize(
    ("words", "kind", "said"),
    [
        (["--model", "m", "--adapters", "a=tuned", "a=large"], UsageError, "two adapters are called a"),
        (["--model", "m", "--adapters", "a="], UsageError, "NAME=DIR"),
        (["--model", "m", "--adapters", "a=nowhere"], InvalidRequest, "no such folder"),
        (["--model", "m", "--adapters", "a=merged"], InvalidRequest, "whole model"),
        (["--model", "m", "--ckpt_dir", "merged"], UsageError, "is a whole model"),
        (["--ckpt_dir", "nowhere"], UsageError, "no folder nowhere"),
        (["--adapters", "foreign"], MartletError, "somebody/unheard-of.*--model"),
    ],
)
def test_contradictions_are_named(folders, words, kind, said):
    with pytest.raises(kind, match=said):
        chosen(*words)


def test_room_follows_from_what_is_asked(folders):
    def room(*words: str, more=False) -> tuple[int, int]:
        options = read("--model", "m", *words)
        load = with_slots(LoadOptions(), options, choose(options, options), more_may_come=more)
        return load.max_adapters, load.max_lora_rank

    assert room() == (0, 64)
    assert room("--vllm_enable_lora", "true", "--vllm_max_lora_rank", "16") == (16, 16)
    assert room("--adapters", "large", "--max_loras", "3") == (3, 128)
    assert room("--adapters", "large", "--max_lora_rank", "8") == (16, 8)
    assert room(more=True) == (16, 64)
    for words in (["--max_loras", "0", "--adapters", "tuned"], ["--max_loras", "-1"], ["--max_lora_rank", "0"]):
        with pytest.raises(UsageError, match=r"--max_lora"):
            room(*words)
