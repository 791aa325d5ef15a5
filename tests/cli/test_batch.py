"""A file of prompts: every row answered once, bad rows named, and a killed run that goes on."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fake_backend import FakeBackend, FakeTemplate
from martlet import cli
from martlet.cli import infer
from martlet.cli.batch import BadRow, parse_row
from martlet.cli.options import Loaded

ECHO = Path(__file__).parent / "martlet_echo.py"


@pytest.fixture
def run(monkeypatch, tmp_path):
    """run(lines) -> (exit code, result rows by row number); the model echoes the last message."""
    source, result = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    monkeypatch.setattr(infer, "load", lambda *_: Loaded(FakeBackend(), FakeTemplate(), {"temperature": 0.0}))

    def go(lines, *words):
        source.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines))
        code = cli.main(["infer", "--val_dataset", str(source), "--result_path", str(result), *words])
        return code, read(result)

    go.source, go.result = source, result
    return go


def read(result: Path) -> dict[int, dict]:
    rows = [json.loads(line) for line in result.read_text().splitlines()] if result.exists() else []
    assert len({row["row"] for row in rows}) == len(rows), "a row was answered twice"
    return {row["row"]: row for row in rows}


def test_every_form_of_row(run, capsys):
    code, rows = run(
        [
            {"messages": [{"role": "user", "content": "one"}], "tag": 5},
            {"query": "two", "history": [["q", "a"]], "system": "s", "response": "wanted"},
            {"prompt": "three"},
            "",
            {"messages": [{"role": "user", "content": "fünf"}, {"role": "assistant", "content": "wanted"}]},
        ],
        "--system",
        "S",
    )
    assert code == 0
    assert {n: row["response"] for n, row in rows.items()} == {1: "one", 2: "two", 3: "three", 5: "fünf"}
    assert rows[1]["tag"] == 5
    assert rows[1]["messages"] == [{"role": "user", "content": "one"}]
    assert rows[2]["messages"][0] == {"role": "system", "content": "s"}
    assert [m["content"] for m in rows[2]["messages"]] == ["s", "q", "a", "two"]
    assert (rows[2]["label"], rows[5]["label"]) == ("wanted", "wanted")
    assert rows[1]["prompt_tokens"] == len(b"system\x02S\x03user\x02one\x03")
    assert (rows[1]["completion_tokens"], rows[1]["finish_reason"]) == (4, "stop")
    assert capsys.readouterr().err == f"4 rows answered; results in {run.result}\n"


def test_bad_rows_are_named_and_skipped(run, capsys):
    code, rows = run(["{", {"prompt": "fine"}, {"foo": 1}, {"prompt": "x" * 600}, {"messages": [{"role": "user"}]}])
    assert code == 1
    assert list(rows) == [2]
    said = capsys.readouterr().err
    for number, reason in ((1, "not JSON"), (3, "has none of messages, query, prompt; its fields are foo")):
        assert f"{run.source}:{number}: {reason}" in said
    assert f"{run.source}:4: the prompt has 600 tokens" in said
    assert f"{run.source}:5: " in said
    assert "1 rows answered, 4 skipped; results in" in said


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ([1], "must be an object with messages, query or prompt, got list"),
        ({"messages": "hi"}, "messages must be a list of objects"),
        ({"messages": []}, "messages holds no message to answer"),
        ({"messages": [{"role": "assistant", "content": "x"}]}, "messages holds no message to answer"),
        ({"query": 3}, "query must be a string"),
        ({"query": "q", "history": [["a"]]}, "history must be a list of"),
        ({"query": "q", "system": 1}, "system must be a string"),
        ({"prompt": ""}, "prompt must be a non-empty string"),
        ({}, "has none of messages, query, prompt; its fields are none"),
    ],
)
def test_what_makes_a_row_bad(row, reason):
    with pytest.raises(BadRow, match=f"^{reason}"):
        parse_row(1, json.dumps(row).encode())


def test_a_second_run_answers_only_what_is_missing(run, capsys):
    rows = [{"prompt": f"row {i}"} for i in range(5)]
    run(rows[:3])
    capsys.readouterr()
    with run.result.open("a") as file:
        file.write('{"row": 4, "fingerpr')
    code, got = run(rows)
    assert (code, sorted(got)) == (0, [1, 2, 3, 4, 5])
    assert "2 rows answered, 3 were there already" in capsys.readouterr().err


def test_results_of_other_rows_are_not_mixed_up(run, capsys):
    run([{"prompt": "a"}, {"prompt": "b"}])
    code, got = run([{"prompt": "a"}, {"prompt": "c"}])
    assert (code, len(got)) == (2, 2)
    assert "was made from other rows" in capsys.readouterr().err
    run.result.write_text('{"something": "else"}\n')
    assert cli.main(["infer", "--val_dataset", str(run.source), "--result_path", str(run.result)]) == 2
    assert "are not results of martlet infer" in capsys.readouterr().err
    assert cli.main(["infer", "--val_dataset", str(run.source), "--result_path", str(run.source)]) == 2
    assert "must not be the --val_dataset itself" in capsys.readouterr().err


def test_more_rows_than_are_kept_in_flight(run):
    code, got = run([{"prompt": f"p{i}"} for i in range(600)])
    assert code == 0
    assert all(got[i + 1]["response"] == f"p{i}" for i in range(600))


def test_a_failing_step_costs_its_rows_only(run, monkeypatch, capsys):
    backend = FakeBackend()
    backend.runner.fail_on = b"poison"
    monkeypatch.setattr(infer, "load", lambda *_: Loaded(backend, FakeTemplate(), {"temperature": 0.0}))
    code, got = run([{"prompt": "poison"}])
    assert (code, got) == (1, {})
    assert f"{run.source}:1: injected failure" in capsys.readouterr().err


def test_kill_9_loses_no_finished_row(tmp_path):
    source, result = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text("".join(json.dumps({"prompt": "x" * (i + 1)}) + "\n" for i in range(80)))
    command = [sys.executable, str(ECHO), "0.01", "infer", "--val_dataset", str(source), "--result_path", str(result)]
    first = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 30
    while not (result.exists() and result.read_bytes().count(b"\n") >= 5):
        assert time.monotonic() < deadline and first.poll() is None
        time.sleep(0.005)
    first.send_signal(signal.SIGKILL)
    first.wait()
    before = result.read_bytes()
    before = before[: before.rfind(b"\n") + 1]
    assert 5 <= before.count(b"\n") < 80
    subprocess.run([*command[:2], "0", *command[3:]], check=True, stderr=subprocess.DEVNULL, timeout=60)
    assert result.read_bytes().startswith(before)
    assert {n: row["response"] for n, row in read(result).items()} == {i + 1: "x" * (i + 1) for i in range(80)}
