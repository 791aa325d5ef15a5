"""Runs of real trainers on a tiny model: what is learned, what is written, and that stopping loses nothing."""

import dataclasses
import importlib.util
import json
import math
import re
import shutil

import pytest
import torch
from safetensors import safe_open

from martlet.errors import BackendUnavailable, MartletError, UsageError
from martlet.train import checks, layout
from martlet.train.arguments import RlhfArguments, SftArguments
from martlet.train.launch import launch
from martlet.train.run import train

SHORT = {
    "dataset": ("self-cognition:en#24",),
    "model_name": ("Swifty",),
    "model_author": ("the Nest",),
    "batch_size": 2,
    "gradient_accumulation_steps": 1,
    "logging_steps": 1,
    "max_steps": 6,
    "eval_steps": 3,
    "learning_rate": 1e-2,
    "report_to": ("none",),
    "disable_tqdm": True,
    "device": "cpu",
}


def short_on(path):
    """SHORT on rows of a file, which say nothing of who the model is."""
    return SHORT | {"dataset": (str(path),), "model_name": (), "model_author": ()}


def losses(result):
    return [line["loss"] for line in result.log_history if "loss" in line]


@pytest.fixture(scope="module")
def run(tiny_model, tmp_path_factory):
    """One finished run: its arguments and its result."""
    arguments = SftArguments(model=str(tiny_model), output_dir=str(tmp_path_factory.mktemp("output")), **SHORT)
    return arguments, train(arguments)


def test_a_run_learns_and_leaves_what_swift_leaves(run, tiny_model):
    _, result = run
    found = losses(result)
    assert found[-1] < found[0] and result.global_step == 6
    folder, last = layout.Path(result.output_dir), layout.Path(result.last_model_checkpoint)
    assert folder.parent.name == "tiny" and folder.name.startswith("v0-") and last == folder / "checkpoint-6"
    assert result.best_model_checkpoint in (str(last), str(folder / "checkpoint-3"))
    assert json.loads((last / "adapter_config.json").read_text())["base_model_name_or_path"] == str(tiny_model)
    lines = [json.loads(line) for line in (folder / "logging.jsonl").read_text().splitlines()]
    assert [line["loss"] for line in lines if "loss" in line] == found, lines
    assert (folder / "images" / "loss.png").stat().st_size > 1000
    for name in ("args.json", "sft_args.json", "adapter_config.json", "adapter_model.safetensors", "tokenizer.json"):
        assert (last / name).is_file(), name
    saved = layout.read_args(last)
    assert saved["base"] == str(tiny_model) and saved["lora_rank"] == 8 and saved["hub_token"] is None


def test_peft_loads_the_adapter(run, tiny_model):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(tiny_model)
    plain = base(torch.tensor([[1, 2, 3]])).logits
    model = PeftModel.from_pretrained(base, run[1].last_model_checkpoint)
    assert not torch.allclose(model(torch.tensor([[1, 2, 3]])).logits, plain, atol=1e-4)


@pytest.mark.parametrize(("targets", "embeddings"), [(("q_proj",), False), (("q_proj", "embed_tokens"), True)])
def test_no_save_asks_a_hub_about_the_base(targets, embeddings, tiny_model, tmp_path, monkeypatch):
    def asked(*_):
        raise AssertionError("a hub was asked")

    monkeypatch.setattr("peft.utils.save_and_load.check_file_exists_on_hf_hub", asked)
    monkeypatch.setattr("martlet.train.model.base_name", lambda card: "a-name-of-the-registry")
    short = SHORT | {"target_modules": targets, "max_steps": 1}
    result = train(SftArguments(model=str(tiny_model), output_dir=str(tmp_path), **short))
    with safe_open(layout.Path(result.last_model_checkpoint) / "adapter_model.safetensors", "pt") as file:
        whole = [name for name in file.keys() if "embed_tokens" in name and "lora" not in name]  # noqa: SIM118
        assert bool(whole) == embeddings


def test_a_run_that_was_killed_goes_on_as_if_it_had_not(run, tmp_path):
    _, whole = run
    cut = tmp_path / "v0-cut"
    shutil.copytree(whole.output_dir, cut)
    shutil.rmtree(cut / "checkpoint-6")
    (cut / "checkpoint-5").mkdir()  # its writing was cut off
    again = train(SftArguments(resume_from_checkpoint=str(cut), disable_tqdm=True))
    assert again.output_dir == str(cut) and again.global_step == 6
    assert not (cut / "checkpoint-5").exists()
    assert losses(again) == losses(whole)
    lines = [json.loads(line) for line in (cut / "logging.jsonl").read_text().splitlines()]
    assert [line["loss"] for line in lines if "loss" in line] == losses(whole)


def test_only_the_weights_of_a_checkpoint(run, tmp_path):
    arguments, whole = run
    fresh = dataclasses.replace(
        arguments, resume_from_checkpoint=whole.last_model_checkpoint, resume_only_model=True, output_dir=str(tmp_path)
    )
    result = train(fresh)
    assert result.global_step == 6 and losses(result)[0] < losses(whole)[0]


def test_all_weights(tiny_model, tmp_path):
    from transformers import AutoModelForCausalLM

    result = train(
        SftArguments(
            model=str(tiny_model),
            output_dir=str(tmp_path / "here"),
            add_output_dir_suffix=False,
            sft_type="full",
            freeze_parameters=("model.embed_tokens",),
            packing=True,
            max_length=256,
            **SHORT,
        )
    )
    assert result.output_dir == str(tmp_path / "here")
    AutoModelForCausalLM.from_pretrained(result.last_model_checkpoint)
    with pytest.raises(UsageError, match="is not empty"):
        layout.new_run(tmp_path / "here", "tiny", suffix=False)


def test_packed_rows_do_not_see_each_other(tiny_model, tmp_path):
    """The loss of rows packed into one sequence is the loss of the same rows side by side."""
    settings = SHORT | {"dataset": ("self-cognition:en#6",), "dataset_test_ratio": 0.0, "max_steps": 1}
    packed, apart = (
        train(
            SftArguments(
                model=str(tiny_model),
                output_dir=str(tmp_path / str(packing)),
                lora_dropout=0.0,
                packing=packing,
                max_length=512,
                **settings | {"batch_size": rows},
            )
        )
        for packing, rows in ((True, 1), (False, 6))
    )
    assert losses(packed) == pytest.approx(losses(apart), abs=1e-5)


@pytest.mark.parametrize("kind", ["dpo", "orpo", "simpo", "cpo", "kto"])
def test_preferences(kind, tiny_model, pairs_file, tmp_path):
    settings = short_on(pairs_file) | {"max_steps": 8}
    if kind == "kto":
        rows = [json.loads(line) for line in pairs_file.read_text().splitlines()]
        good = [{"query": r["query"], "response": r["response"], "label": True} for r in rows]
        bad = [{"query": r["query"], "response": r["rejected_response"], "label": False} for r in rows]
        file = tmp_path / "labelled.jsonl"
        file.write_text("\n".join(json.dumps(row) for pair in zip(good, bad, strict=True) for row in pair))
        settings["dataset"] = (str(file),)
    result = train(
        RlhfArguments(
            model=str(tiny_model), output_dir=str(tmp_path), rlhf_type=kind, target_modules=("ALL",), **settings
        )
    )
    steps = [line for line in result.log_history if "loss" in line]
    assert len(steps) == 8
    if kind == "dpo":
        assert steps[0]["loss"] == pytest.approx(math.log(2), abs=1e-4)
        assert steps[0]["rewards/margins"] == pytest.approx(0, abs=1e-4)
        assert steps[-1]["rewards/margins"] > 0 and steps[-1]["rewards/accuracies"] > 0.5
        assert (layout.Path(result.output_dir) / "images" / "rewards_margins.png").is_file()


def test_two_processes(tiny_model, tmp_path, monkeypatch):
    monkeypatch.setenv("NPROC_PER_NODE", "2")
    settings = SHORT | {"max_steps": 2, "eval_steps": 2}
    result = launch(SftArguments(model=str(tiny_model), output_dir=str(tmp_path), **settings))
    assert result.global_step == 2 and layout.Path(result.last_model_checkpoint).name == "checkpoint-2"
    single = dict(settings, gradient_accumulation_steps=2)
    monkeypatch.delenv("NPROC_PER_NODE")
    alone = launch(SftArguments(model=str(tiny_model), output_dir=str(tmp_path), **single))
    assert losses(result) == pytest.approx(losses(alone), rel=0.05)  # dropout differs from process to process


BAD = {
    "no module 'q_prj'.*linear layers are .*q_proj": {"target_modules": ("q_prj",)},
    "--dataset NAME or PATH": {"dataset": (), "model_name": (), "model_author": ()},
    "neither a file": short_on("no-such-data"),
    "--columns is not JSON": {"columns": "{"},
    "no checkpoint": {"resume_from_checkpoint": "nowhere"},
    "no row is left": {"max_length": 3},
    "no parameter begins with": {"sft_type": "full", "freeze_parameters": ("nothing",)},
    "holds no adapter_config": {"adapter": "nowhere"},
    "quantization_bit belongs to --sft_type lora": {"sft_type": "full", "quantization_bit": 4},
    "quantization_bit must be 4 or 8": {"quantization_bit": 3},
    "lora_rank must be at least 1, got 0": {"lora_rank": 0},
    "max_steps must be at least 1, or -1": {"max_steps": 0},
    "dataset_test_ratio must be from 0 to below 1": {"dataset_test_ratio": 2.0},
    "learning_rate must be above 0": {"learning_rate": 0.0},
    "--optim 'adamw_torc' is not one of .*Did you mean adamw_torch": {"optim": "adamw_torc"},
    "--lr_scheduler_type 'cosin' is not": {"lr_scheduler_type": "cosin"},
    "cosine has no 'cycles', only num_cycles": {"lr_scheduler_kwargs": '{"cycles": 2}'},
    "--report_to 'nobody' is not one of": {"report_to": ("nobody",)},
    "is the whole name of no module, such as 'model.layers.0": {"target_regex": "q_proj"},
    "is no regular expression": {"target_regex": "(("},
    "every parameter is frozen": {"sft_type": "full", "freeze_parameters": ("model",)},
    "--lora_rank belongs to --sft_type lora": {"sft_type": "full", "lora_rank": 4},
    "--model_name belongs to self-cognition rows": {"dataset": ("rows.jsonl",)},
    "--push_to_hub needs --hub_model_id": {"push_to_hub": True},
    "--logging_dir .*: no folder can be made": {"logging_dir": "/dev/null/logs"},
    "NPROC_PER_NODE=2": {"fsdp": "full_shard"},
}


@pytest.mark.parametrize("message", BAD)
def test_bad_input_is_named_and_nothing_is_written(message, tiny_model, tmp_path):
    arguments = SftArguments(model=str(tiny_model), output_dir=str(tmp_path / "out"), **(SHORT | BAD[message]))
    with pytest.raises(UsageError, match=message):
        train(arguments)
    assert not (tmp_path / "out").exists()


def test_an_output_folder_that_cannot_be_made_is_named(tiny_model):
    with pytest.raises(UsageError, match="--output_dir /dev/null/out: no folder can be made"):
        train(SftArguments(model=str(tiny_model), output_dir="/dev/null/out", **SHORT))


PREFERENCE_BAD = {
    "--packing belongs to supervised training": {"packing": True},
    "--simpo_gamma belongs to simpo": {"simpo_gamma": 2.0},
    "--loss_type belongs to dpo, simpo, kto and cpo": {"rlhf_type": "orpo", "loss_type": "hinge"},
    "--loss_type 'hnge' is not one of .*Did you mean hinge": {"loss_type": "hnge"},
    "--ref_model_id_or_path belongs to dpo and kto of --sft_type full": {"ref_model_id_or_path": "x"},
}


@pytest.mark.parametrize("message", PREFERENCE_BAD)
def test_flags_of_another_loss_are_named(message, tiny_model, pairs_file, tmp_path):
    settings = {"dataset": (str(pairs_file),), "device": "cpu"} | PREFERENCE_BAD[message]
    with pytest.raises(UsageError, match=message):
        train(RlhfArguments(model=str(tiny_model), output_dir=str(tmp_path / "out"), **settings))
    assert not (tmp_path / "out").exists()


def test_losses_are_those_that_trl_names():
    from trl import KTOConfig
    from trl.experimental.cpo import CPOConfig

    known = {kind: {f.name: f for f in dataclasses.fields(kind)}["loss_type"] for kind in (KTOConfig, CPOConfig)}
    assert set(checks.LOSSES["kto"]) == set(known[KTOConfig].metadata["choices"])
    assert {*checks.LOSSES["cpo"], *checks.LOSSES["simpo"]} == set(known[CPOConfig].metadata["choices"])


def test_no_limit_on_the_length_of_rows(tiny_model, tmp_path):
    result = train(SftArguments(model=str(tiny_model), output_dir=str(tmp_path), max_length=-1, **SHORT))
    assert result.global_step == 6


def test_what_fails_before_the_first_step_leaves_no_run(tiny_model, tmp_path, monkeypatch):
    def broken(*_, **__):
        raise ValueError("a library's own complaint")

    monkeypatch.setattr("martlet.train.trainers.trainer_for", broken)
    with pytest.raises(ValueError, match="own complaint"):
        train(SftArguments(model=str(tiny_model), output_dir=str(tmp_path), **SHORT))
    assert not list(tmp_path.iterdir())


def test_wrong_words_reach_whoever_starts_several_processes(tiny_model, tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("NPROC_PER_NODE", "2")
    with pytest.raises(UsageError, match=r"no module 'q_prj'.*Did you mean q_proj"):
        launch(SftArguments(model=str(tiny_model), output_dir=str(tmp_path), target_modules=("q_prj",), **SHORT))
    assert not list(tmp_path.iterdir()) and "Traceback" not in capfd.readouterr().err


def test_deepspeed_is_started_by_torchrun_even_for_one_process(tiny_model, tmp_path, monkeypatch):
    known, started = importlib.util.find_spec, []
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *more: known("torch" if name == "deepspeed" else name)
    )
    monkeypatch.setattr("martlet.train.launch._run_workers", lambda _, *counts: started.append(counts) or 0)
    arguments = SHORT | {"deepspeed": "default-zero2"}
    launch(SftArguments(model=str(tiny_model), output_dir=str(tmp_path), **arguments))
    assert started == [(1, 1)]


@pytest.mark.parametrize(
    ("library", "asked"), [("bitsandbytes", {"quantization_bit": 4}), ("deepspeed", {"deepspeed": "default-zero2"})]
)
def test_a_library_that_is_not_here_is_named(library, asked, tiny_model, tmp_path, monkeypatch):
    known = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *more: None if name == library else known(name, *more)
    )
    with pytest.raises(BackendUnavailable, match=f"pip install {library}"):
        train(SftArguments(model=str(tiny_model), output_dir=str(tmp_path / "out"), **SHORT | asked))
    assert not (tmp_path / "out").exists()
    only_looks = SHORT | asked | {"check": True}
    for look in (train, launch):
        assert look(SftArguments(model=str(tiny_model), output_dir=str(tmp_path / "out"), **only_looks)) is None


def test_a_full_disk_leaves_complete_checkpoints_only(tiny_model, tmp_path, monkeypatch):
    save = torch.save

    def full(what, path, *more, **others):
        if "checkpoint-6" in str(path):
            raise RuntimeError("PytorchStreamWriter failed writing file data/0: file write failed")  # torch's words
        save(what, path, *more, **others)

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(MartletError, match=r"is full .*checkpoint-6 .* is removed, the last complete .*checkpoint-3$"):
        train(SftArguments(model=str(tiny_model), output_dir=str(tmp_path), **SHORT))
    (run,) = (tmp_path / "tiny").iterdir()
    assert [path.name for path in layout.checkpoints(run)] == ["checkpoint-3"] and not (run / "checkpoint-6").exists()


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (OSError("Not enough free space to write 30081024 bytes after offset 1785344"), "the disk of .* is full"),
        (OSError(28, "No space left on device"), "the disk of .* is full"),
        (Exception("File too large (os error 27)"), r"as large as what is to be written \(ulimit -f\)"),
        (ValueError("something else"), None),
    ],
)
def test_why_nothing_more_can_be_written(error, said, tmp_path):
    outer = RuntimeError("could not save")
    outer.__cause__ = error
    why = layout.no_room(outer, tmp_path)
    assert why is None if said is None else re.search(said, why)


def test_a_checkpoint_whose_last_file_is_cut_off_is_not_complete(run, tmp_path):
    _, whole = run
    shutil.copytree(whole.last_model_checkpoint, tmp_path / "checkpoint-6")
    assert layout.checkpoints(tmp_path) == [tmp_path / "checkpoint-6"]
    state = tmp_path / "checkpoint-6" / "trainer_state.json"
    state.write_text(state.read_text()[:100])
    assert layout.checkpoints(tmp_path) == [] and layout.remove_incomplete(tmp_path) == ["checkpoint-6"]


def test_a_row_without_a_rejected_answer_is_no_preference(tiny_model, tmp_path, capsys):
    file = tmp_path / "rows.jsonl"
    file.write_text('{"query": "q", "response": "a"}\n{"query": "q", "response": "a", "rejected_response": "b"}\n')
    settings = short_on(file) | {"check": True}
    assert train(RlhfArguments(model=str(tiny_model), **settings)) is None
    said = capsys.readouterr().err
    assert f"{file}:1: dpo needs a rejected answer" in said and "1 rows are left out" in said
    assert "[[b<|im_end|>]]" in said


def test_kto_does_not_drop_half_of_a_pair(tiny_model, pairs_file):
    settings = short_on(pairs_file) | {"check": True}
    with pytest.raises(UsageError, match="no row is left"):
        train(RlhfArguments(model=str(tiny_model), rlhf_type="kto", **settings))
