"""martlet infer over datasets: the rows that a run held back, and what is written of them."""

from __future__ import annotations

import json

import pytest

from fake_backend import FakeBackend, FakeTemplate
from martlet import cli
from martlet.cli import infer
from martlet.cli.options import Loaded
from martlet.swift import infer_main
from martlet.train import layout
from martlet.train.arguments import RlhfArguments, SftArguments
from martlet.train.run import prepare


@pytest.fixture
def echo(monkeypatch):
    """The model says what it was asked last."""
    backend = FakeBackend()
    monkeypatch.setattr(infer, "load", lambda *_: Loaded(backend, FakeTemplate(), {"temperature": 0.0}))
    return backend


@pytest.fixture
def data(tmp_path):
    file = tmp_path / "data.jsonl"
    rows = [{"query": f"q{n}", "response": f"q{n}" if n % 2 else "no"} for n in range(40)]
    rows[7] = {"query": "no answer"}
    rows[9] = {"query": "x" * 400, "response": "longer than --max_length"}
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def checkpoint(folder, arguments):
    path = folder / "v0" / "checkpoint-3"
    path.mkdir(parents=True)
    layout.write_args(path, arguments, {"base": "echo"})
    return path


def results(folder):
    (file,) = folder.glob("*.jsonl")
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_swifts_infer_main_returns_the_answers(echo, data, tmp_path):
    path = checkpoint(tmp_path, SftArguments(dataset=(str(data),), dataset_test_ratio=0.2, max_length=300))
    found = infer_main(["--ckpt_dir", str(path), "--load_dataset_config", "true"])["result"]
    assert len(found) == 8 and found == results(path / "infer_result")


def test_the_rows_are_those_that_the_run_held_back(echo, data, tmp_path, capsys):
    arguments = SftArguments(
        dataset=(str(data),), dataset_test_ratio=0.2, dataset_seed=5, max_length=300, system="Be kind."
    )
    held = prepare(arguments, FakeTemplate(), echo.tokenizer, say=lambda _: None).held
    path = checkpoint(tmp_path, arguments)
    assert cli.main(["infer", "--ckpt_dir", str(path), "--load_dataset_config", "true"]) == 0
    rows = results(path / "infer_result")
    assert len(rows) == 8
    texts = {
        bytes(i for i in row.ids if i < 256).partition(b"user\x02")[2].partition(b"\x03")[0].decode() for row in held
    }
    assert {row["query"] for row in rows} == texts
    assert all(row.keys() == {"system", "query", "response", "label", "history"} for row in rows)
    assert all(row["system"] == "Be kind." and row["response"] == row["query"] for row in rows)
    same = sum(row["label"] == row["query"] for row in rows)
    assert f"8 rows answered, {same} of them word for word like the label" in capsys.readouterr().err


def test_flags_win_over_the_arguments_of_the_run(echo, data, tmp_path):
    path = checkpoint(tmp_path, SftArguments(dataset=("gone.jsonl",), system="theirs"))
    words = ["--ckpt_dir", str(path), "--load_dataset_config", "--val_dataset", str(data), "--system", "mine"]
    result = tmp_path / "answers"
    assert cli.main(["infer", *words, "--show_dataset_sample", "3", "--result_dir", str(result)]) == 0
    rows = results(result)
    assert [row["query"] for row in rows] == ["q0", "q1", "q2"] and {row["system"] for row in rows} == {"mine"}
    assert not (path / "infer_result").exists()


def test_preferences_and_earlier_turns(echo, tmp_path):
    file = tmp_path / "pairs.jsonl"
    row = {"history": [["a", "b"]], "query": "c", "response": "d", "rejected_response": "e"}
    file.write_text(json.dumps(row) + "\n" + json.dumps(row | {"query": "f"}) + "\n")
    path = checkpoint(tmp_path, RlhfArguments(dataset=(str(file),), dataset_test_ratio=0.5))
    assert cli.main(["infer", "--ckpt_dir", str(path), "--load_dataset_config"]) == 0
    (found,) = results(path / "infer_result")
    assert found["history"] == [["a", "b"]] and found["label"] == "d" and found["system"] is None


def test_prompts_that_the_run_cut_are_among_what_it_held_back(echo, tmp_path):
    file = tmp_path / "pairs.jsonl"
    rows = [{"query": f"{n}" + "x" * 200, "response": "d", "rejected_response": "e"} for n in range(6)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    arguments = RlhfArguments(dataset=(str(file),), dataset_test_ratio=0.5, max_prompt_length=20, max_length=60)
    path = checkpoint(tmp_path, arguments)
    assert cli.main(["infer", "--ckpt_dir", str(path), "--load_dataset_config"]) == 0
    assert len(results(path / "infer_result")) == 3


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--load_dataset_config"], "--ckpt_dir"),
        (["--load_dataset_config", "--ckpt_dir", "EMPTY"], "neither args.json"),
        (["--dataset", "DATA"], "where shall the answers go"),
        (["--dataset", "DATA", "--prompt", "x"], "--prompt"),
        (["--dataset", "DATA", "--result_path", "x"], "--result_dir"),
        (["--dataset", "DATA", "--result_dir", "EMPTY", "--dataset_test_ratio", "0"], "--dataset_test_ratio"),
        (["--dataset", "gone", "--result_dir", "EMPTY"], "gone"),
        (["--result_dir", "EMPTY", "--prompt", "x"], "--result_dir goes with"),
        (["--eval_human", "false"], "needs rows"),
    ],
)
def test_what_cannot_be_done_is_said(echo, data, tmp_path, capsys, words, message):
    (tmp_path / "empty").mkdir()
    places = {"EMPTY": str(tmp_path / "empty"), "DATA": str(data)}
    assert cli.main(["infer", *(places.get(word, word) for word in words)]) != 0
    assert message in capsys.readouterr().err
    assert not list((tmp_path / "empty").iterdir())
