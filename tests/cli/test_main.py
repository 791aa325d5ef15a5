"""The command itself: what it prints and how it ends."""

from __future__ import annotations

import subprocess
import sys

import pytest

from martlet import __version__, cli
from martlet.cli import infer
from martlet.errors import MartletError, ModelNotFound


def test_help_lists_the_commands(capsys):
    assert cli.main([]) == 0
    bare = capsys.readouterr().out
    assert cli.main(["--help"]) == 0
    assert capsys.readouterr().out == bare
    assert all(f"  {name} " in bare for name in cli.COMMANDS)


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_every_command_has_help(name, capsys):
    assert cli.main([name, "--help"]) == 0
    assert capsys.readouterr().out.startswith(f"usage: martlet {name} ")


@pytest.mark.parametrize("words", [["models", "list"], ["models", "pull"], ["bench", "cpu"], ["bench", "memory"]])
def test_every_sub_command_has_help(words, capsys):
    assert cli.main([*words, "--help"]) == 0
    assert capsys.readouterr().out.startswith(f"usage: martlet {' '.join(words)} ")


def test_version(capsys):
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"martlet {__version__}\n"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["infr"], "unknown command infr. Did you mean infer? `martlet --help` lists them."),
        (["--infer"], "unknown flag --infer."),
        (["models", "lst"], "unknown command lst. Did you mean list? `martlet models --help` lists them."),
        (["infer", "--model-tpye", "x"], "unknown flag --model-tpye. Did you mean --model_type?"),
        (["infer", "--num_beams", "2"], "--num_beams is a SWIFT flag that is not supported yet"),
        (["deploy", "--port", "no"], "--port wants a whole number, got 'no'"),
        (["deploy", "--port", "70000"], "--port must be from 0 to 65535, got 70000"),
        (["deploy", "--tensor_parallel_size", "0"], "tensor_parallel_size must be at least 1, got 0"),
        (["infer", "--prompt", " "], "the prompt is empty"),
        (["infer", "--prompt", "x", "--top_p", "3"], "top_p must be a number above 0"),
        (["infer", "--max_new_tokens", "0"], "--max_new_tokens must be at least 1, got 0"),
        (["infer", "--val_dataset", "nowhere.jsonl", "--result_path", "x"], "--val_dataset: no file nowhere.jsonl"),
        (["infer", "--val_dataset", "nowhere.jsonl"], "where shall the answers go? --result_path OUT.jsonl"),
        (["infer", "--result_path", "x"], "--result_path goes with --val_dataset"),
        (["infer", "--model", "a", "--model_id_or_path", "b"], "--model a and --model_id_or_path b differ"),
        (["bench", "cpu", "--engines", "natvie"], "no engine 'natvie'; there are"),
        (["bench", "cpu", "--workloads", "W9"], "no workload 'W9'; there are"),
        (["bench", "cpu", "--runs", "0"], "--runs must be at least 1, got 0"),
        (["bench", "cpu", "--python", "openvino"], "--python wants ENGINE=PATH"),
        (["bench", "http", "--model", "x"], "--url is missing: "),
    ],
)
def test_a_wrong_command_line_is_one_line_on_stderr(words, message, capsys):
    assert cli.main(words) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith(f"martlet: error: {message}")
    assert said.err.count("\n") == 1


@pytest.mark.parametrize(
    ("error", "code"), [(ModelNotFound("no such"), 3), (MartletError("odd"), 1), (KeyboardInterrupt(), 130)]
)
def test_errors_become_exit_codes(error, code, monkeypatch, capsys):
    def fail(*_):
        raise error

    monkeypatch.setattr(infer, "load", fail)
    assert cli.main(["infer", "--prompt", "x"]) == code
    said = capsys.readouterr().err
    assert said == ("\n" if code == 130 else f"martlet: error: {error}\n")


def test_a_bug_keeps_its_traceback(monkeypatch):
    monkeypatch.setattr(infer, "load", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        cli.main(["infer", "--prompt", "x"])


def test_a_closed_pipe_is_no_traceback():
    command = f"{sys.executable} -m martlet models list | true; echo ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=60)
    assert (done.stdout, done.stderr) == ("141\n", "")
