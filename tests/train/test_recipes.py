"""Recipes: that those which ship are whole, what --set may change, and that nothing is done twice."""

import json

import pytest

from martlet import cli
from martlet.cli.train import TrainOptions, changed, run
from martlet.errors import MartletError, UsageError
from martlet.recipes import recipe as recipes
from martlet.recipes import run as running

TWO = """
model = "{model}"
[[steps]]
name = "sft"
command = "sft"
rows_per_step = 2
[steps.flags]
dataset = ["self-cognition:en#12"]
model_name = ["Swifty"]
model_author = ["the Nest"]
target_modules = ["ALL"]
max_steps = 2
batch_size = 2
eval_steps = 1
report_to = ["none"]
disable_tqdm = true
device = "cpu"
[[steps]]
name = "prefer"
command = "dpo"
[steps.flags]
dataset = ["{pairs}"]
target_modules = ["ALL"]
max_steps = 2
batch_size = 2
gradient_accumulation_steps = 1
eval_steps = 1
report_to = ["none"]
disable_tqdm = true
device = "cpu"
"""


@pytest.fixture
def two_steps(tiny_model, pairs_file, tmp_path):
    path = tmp_path / "two.toml"
    path.write_text(TWO.format(model=tiny_model, pairs=pairs_file))
    return path


@pytest.fixture
def started(monkeypatch):
    """The commands that were started, in this process: what they do is real, only their imports are shared."""
    seen = []

    def start(words):
        seen.append(words)
        code = cli.main(words)
        if code:
            raise MartletError(f"martlet {words[0]} ended with code {code}")

    monkeypatch.setattr(running, "_martlet", start)
    return seen


@pytest.mark.parametrize("name", ["zephyr", "zephyr/qlora", "smollm2"])
def test_every_flag_of_a_recipe_is_one_of_its_command(name):
    recipe = changed(recipes.load(name), None, ())
    assert [step.name for step in recipe.steps] == ["sft", "dpo"] and recipe.about


def test_zephyr_has_the_published_numbers():
    sft, dpo = recipes.load("zephyr").steps
    assert (sft.flags["learning_rate"], sft.flags["max_length"], sft.rows_per_step) == (2e-5, 2048, 128)
    assert (dpo.flags["learning_rate"], dpo.flags["beta"], dpo.rows_per_step) == (5e-7, 0.01, 128)
    assert (dpo.flags["max_length"], dpo.flags["max_prompt_length"], dpo.flags["warmup_ratio"]) == (1024, 512, 0.1)


@pytest.mark.parametrize(("processes", "sft", "dpo"), [("1", 8, 16), ("8", 1, 2), ("2", 4, 8)])
def test_a_step_has_as_many_rows_on_any_number_of_devices(processes, sft, dpo, monkeypatch):
    monkeypatch.setenv("NPROC_PER_NODE", processes)
    steps = changed(recipes.load("zephyr"), None, ()).steps
    assert [step.flags["gradient_accumulation_steps"] for step in steps] == [sft, dpo]


def test_rows_that_devices_do_not_divide(monkeypatch):
    monkeypatch.setenv("NPROC_PER_NODE", "3")
    with pytest.raises(
        UsageError, match="step sft: 128 rows a step are not a multiple of --batch_size 16 on 3 devices"
    ):
        changed(recipes.load("zephyr"), None, ())
    steps = changed(recipes.load("zephyr"), None, ("gradient_accumulation_steps=2",)).steps
    assert [step.flags["gradient_accumulation_steps"] for step in steps] == ["2", "2"]


def test_set_changes_one_step_or_all():
    changes = (
        "dpo.beta=0.2",
        "max-steps=7",
        "sft.dataset=a.jsonl,b.jsonl",
        "val_dataset=",
        "lora_target_modules=q_proj",
    )
    sft, dpo = changed(recipes.load("smollm2"), None, changes).steps
    assert "beta" not in sft.flags and dpo.flags["beta"] == "0.2"
    assert sft.flags["max_steps"] == dpo.flags["max_steps"] == "7"
    assert sft.flags["dataset"] == ["a.jsonl", "b.jsonl"] and "val_dataset" not in {**sft.flags, **dpo.flags}
    assert sft.flags["target_modules"] == ["q_proj"] and "lora_target_modules" not in sft.flags


WRONG = {
    "sft.learning_rat=1": "sft has no flag --learning_rat. Did you mean learning_rate",
    "sft.beta=1": "sft has no flag --beta",
    "rl.beta=1": "has no step 'rl', only sft, dpo",
    "dpo.beta=much": "step dpo: --beta wants a number, got 'much'",
    "dpo.beta=-1": "step dpo: --beta must be above 0, got -1.0",
    "dpo.packing=true": "step dpo: --packing belongs to supervised training",
    "output_dir=x": "--set output_dir",
    "beta": "FLAG=VALUE",
}


@pytest.mark.parametrize("change", WRONG)
def test_a_wrong_change_is_named(change):
    with pytest.raises(UsageError) as caught:
        changed(recipes.load("smollm2"), None, (change,))
    assert WRONG[change] in caught.value.message


BROKEN = {
    "model is missing": "[[steps]]\ncommand = 'sft'",
    "steps is missing": "model = 'a'",
    "steps\\[0\\].command must be one of sft": "model = 'a'\n[[steps]]\ncommand = 'rm'",
    "steps\\[0\\] has flag, which no step has": "model = 'a'\n[[steps]]\ncommand = 'sft'\nflag = 1",
    "two steps are called 'sft'": "model = 'a'\n[[steps]]\ncommand = 'sft'\n[[steps]]\ncommand = 'sft'",
    "rows_per_step must be": "model = 'a'\n[[steps]]\ncommand = 'sft'\nrows_per_step = 0",
    "output_dir is not a recipe's to say": "model = 'a'\n[[steps]]\ncommand = 'sft'\n[steps.flags]\noutput_dir = 'x'",
    "Invalid value": "model = ",
}


@pytest.mark.parametrize("reason", BROKEN)
def test_a_broken_recipe_says_where(reason, tmp_path):
    (tmp_path / "recipe.toml").write_text(BROKEN[reason])
    with pytest.raises(UsageError, match=reason) as caught:
        recipes.load(str(tmp_path))
    assert str(tmp_path / "recipe.toml") in caught.value.message


def test_an_unknown_recipe_names_the_nearest():
    with pytest.raises(UsageError, match="Did you mean zephyr"):
        recipes.load("zefyr")


def test_steps_run_in_order_and_only_once(two_steps, started, tmp_path, capsys):
    options = TrainOptions(recipe=str(two_steps), output_dir=str(tmp_path / "out"))
    assert run(options) == 0
    out = tmp_path / "out"
    assert [words[0] for words in started] == ["sft", "export", "dpo"]
    assert started[2][:3] == ["dpo", "--model", str(out / "1-sft-merged")]
    last = out / "2-prefer" / "checkpoint-2"
    assert f"last checkpoint: {last}" in capsys.readouterr().out
    assert json.loads((last / "args.json").read_text())["base"] == str(out / "1-sft-merged")
    assert run(options) == 0
    assert len(started) == 3


def test_a_step_that_was_stopped_goes_on(two_steps, started, tmp_path, monkeypatch):
    options = TrainOptions(recipe=str(two_steps), output_dir=str(tmp_path / "out"))
    whole, stop_at = running._martlet, {"dpo"}

    def stops(words):
        if words[0] in stop_at:
            place = tmp_path / "out" / "2-prefer"  # as a kill leaves it: begun, and no checkpoint complete
            (place / "checkpoint-1").mkdir(parents=True)
            raise MartletError("stopped")
        whole(words)

    monkeypatch.setattr(running, "_martlet", stops)
    with pytest.raises(MartletError, match="stopped"):
        run(options)
    stop_at.clear()
    assert run(options) == 0
    assert [words[0] for words in started] == ["sft", "export", "export", "dpo"]
    assert "--resume_from_checkpoint" not in started[-1]
    state = tmp_path / "out" / recipes.STATE
    told = json.loads(state.read_text())
    told["steps"]["prefer"]["checkpoint"] = None  # a kill after the last checkpoint, before it was noted
    state.write_text(json.dumps(told))
    assert run(options) == 0
    assert started[-1][-2:] == ["--resume_from_checkpoint", str(tmp_path / "out" / "2-prefer")]


def test_other_flags_are_another_run(two_steps, started, tmp_path):
    run(TrainOptions(recipe=str(two_steps), output_dir=str(tmp_path / "out")))
    with pytest.raises(UsageError, match=r"step prefer in .* has beta = None, and is now asked for with '0.3'"):
        run(TrainOptions(recipe=str(two_steps), output_dir=str(tmp_path / "out"), set=("prefer.beta=0.3",)))
    with pytest.raises(UsageError, match="holds a run of"):
        run(TrainOptions(recipe=str(two_steps), output_dir=str(tmp_path / "out"), model="another"))


def test_check_looks_at_the_data_of_each_step(two_steps, started, tmp_path, capsys):
    assert run(TrainOptions(recipe=str(two_steps), output_dir=str(tmp_path / "out"), check=True)) == 0
    assert capsys.readouterr().err.count("[[what is learned]]") == 2 and not (tmp_path / "out").exists()
