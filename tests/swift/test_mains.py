"""SWIFT's entry points take words, objects or sys.argv, and do what the commands do."""

import sys

import pytest

from lora_models import make_base, tune
from martlet import swift
from martlet.errors import UsageError


@pytest.mark.parametrize("name", ["sft_main", "rlhf_main", "dpo_main", "orpo_main", "export_main", "merge_lora_main"])
def test_words_are_checked_as_the_command_does(name, monkeypatch):
    main = getattr(swift, name)
    with pytest.raises(UsageError, match="unknown flag --no_such"):
        main(["--no_such", "1"])
    monkeypatch.setattr(sys, "argv", ["x", "--no_such", "1"])
    with pytest.raises(UsageError, match="unknown flag --no_such"):
        main()


def test_objects_reach_the_command(tmp_path):
    with pytest.raises(UsageError, match="there is no folder"):
        swift.merge_lora(swift.ExportArguments(ckpt_dir=str(tmp_path / "none")))
    with pytest.raises(UsageError, match="there is no folder"):
        swift.merge_lora(swift.InferArguments(ckpt_dir=str(tmp_path / "none")), device_map="cpu")
    with pytest.raises(UsageError, match="added up on the CPU"):
        swift.merge_lora(swift.ExportArguments(), device_map="cuda:0")
    with pytest.raises(UsageError, match="which model is to be trained"):
        swift.dpo_main(swift.RlhfArguments())
    _, model = make_base(tmp_path / "base")
    tune(model, tmp_path / "adapter")
    with pytest.raises(Exception, match="tokenizer"):
        swift.merge_lora(["--ckpt_dir", str(tmp_path / "adapter"), "--model", str(tmp_path / "base")])
