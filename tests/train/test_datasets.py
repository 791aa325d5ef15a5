"""Datasets from files of every kind; bad rows are named; samples and splits repeat with their seed."""

import json

import pytest

from martlet.errors import UsageError
from martlet.train.datasets import Identity, Spec, load, read_spec, registry, sample, split
from martlet.train.rows import parse

IDENTITY = Identity.of(["小燕", "Swifty"], ["燕社", "The Nest"])


def test_the_language_of_a_word(tmp_path):
    assert read_spec("self-cognition#500") == Spec("self-cognition", sample=500)
    assert read_spec("HF::owner/name:a/b#7") == Spec("owner/name", ("a", "b"), 7, "hf")
    assert read_spec("ms::owner/name") == Spec("owner/name", hub="ms")
    odd = tmp_path / "with:colon.jsonl"
    odd.write_text("{}")
    assert read_spec(f"{odd}#3") == Spec(str(odd), sample=3)
    for word in ("x#", "x#0", "x#many", "#5"):
        with pytest.raises(UsageError):
            read_spec(word)


def test_all_kinds_of_file_hold_the_same_rows(tmp_path):
    rows = [{"query": f"q{i}", "response": "a, b\nc"} for i in range(3)]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    (tmp_path / "b.json").write_text(json.dumps(rows))
    (tmp_path / "c.csv").write_text("query,response\n" + "".join(f'{r["query"]},"{r["response"]}"\n' for r in rows))
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "d.parquet")
    read = {path.suffix: load([str(path)]).rows for path in sorted(tmp_path.iterdir())}
    assert len(read) == 4 and all(found == [parse(row) for row in rows] for found in read.values())
    assert len(load([str(tmp_path)]).rows) == 12


def test_bad_rows_are_left_out_and_named(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"query": "q", "response": "a"}\n{"query": "q"}\n\nnot json\n{"query": 1, "response": "a"}\n')
    found = load([str(path)])
    assert len(found.rows) == 1
    assert [(problem.line, problem.reason.split(":")[0]) for problem in found.problems] == [
        (2, "there is no answer"),
        (4, "not JSON"),
        (5, "query must be text, got int"),
    ]
    assert str(found.problems[0]).startswith(f"{path}:2: there is no answer")


def test_files_that_are_not_what_their_names_say(tmp_path):
    latin = '{"query": "caf\u00e9", "response": "a"}'.encode("latin-1")
    for name, content, said in (
        ("a.jsonl", latin, r"a\.jsonl:1: not UTF-8"),
        ("b.json", b"[" + latin + b"]", r"b\.json is not UTF-8"),
        ("c.csv", "query,response\ncaf\u00e9,a\n".encode("latin-1"), r"c\.csv is not UTF-8"),
        ("d.parquet", b"no table", r"d\.parquet is not parquet"),
        ("e.csv", b"query,response\n" + b"x" * 200_000 + b",a\n", r"e\.csv cannot be read: field larger"),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UsageError, match=said):
            load([str(tmp_path / name)])


def test_a_dataset_of_bad_rows_is_refused(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"query": "q"}\n')
    with pytest.raises(UsageError, match=r"no row to train on \(1 were left out; first: .*:1: there is no answer"):
        load([str(path)])
    path.write_text("")
    with pytest.raises(UsageError, match="no row to train on"):
        load([str(path)])


@pytest.mark.parametrize("word", ["self-cogniton", "no-such.jsonl", "./nowhere", "a/b/c"])
def test_an_unknown_dataset_is_named(word):
    with pytest.raises(UsageError, match="neither a file, a folder, nor a name"):
        load([word])


def test_unknown_names_suggest_near_ones():
    with pytest.raises(UsageError, match="Did you mean self-cognition"):
        load(["self-cogniton"])


def test_self_cognition_carries_the_names():
    rows = load(["self-cognition:en"], identity=IDENTITY).rows
    words = " ".join(row.answer for row in rows)
    assert "Swifty" in words and "The Nest" in words and "{{" not in words and "小燕" not in words
    assert "小燕" in " ".join(row.answer for row in load(["self-cognition:zh"], identity=IDENTITY).rows)
    with pytest.raises(UsageError, match="--model_name"):
        load(["self-cognition"])
    with pytest.raises(UsageError, match="--model_author"):
        Identity.of(["a"], [None, None])
    assert Identity.of(["one"], ["two"]).name == ("one", "one")


def test_samples_are_fair_and_repeatable():
    rows = load(["self-cognition"], identity=IDENTITY).rows
    few = sample(rows, 10, seed=1)
    assert few == sample(rows, 10, seed=1) != sample(rows, 10, seed=2)
    many = sample(rows, 3 * len(rows) + 5, seed=1)
    counts = [sum(row is other for other in many) for row in rows]
    assert set(counts) == {3, 4} and counts.count(4) == 5


def test_split_leaves_every_row_on_one_side():
    rows = load(["self-cognition"], identity=IDENTITY).rows
    train, held = split(rows, 0.1, seed=3)
    assert len(held) == round(len(rows) * 0.1) and len(train) + len(held) == len(rows)
    assert sorted(map(id, [*train, *held])) == sorted(map(id, rows))
    assert split(rows, 0.1, seed=3) == (train, held)
    assert split(rows[:1], 0.5, seed=3) == (rows[:1], [])
    assert split(rows, 0, seed=3)[1] == []


def test_custom_names(tmp_path):
    (tmp_path / "mine.csv").write_text("frage,antwort\nq,a\n")
    info = tmp_path / "info.json"
    columns = {"frage": "query", "antwort": "response"}
    info.write_text(json.dumps({"mine": {"path": str(tmp_path / "mine.csv"), "columns": columns}}))
    assert load(["mine"], custom=info).rows == [parse({"query": "q", "response": "a"})]
    assert "alpaca-en" in registry(info)
    info.write_text('{"mine": {"nonsense": 1}}')
    with pytest.raises(UsageError, match="custom_dataset_info"):
        registry(info)
