"""Goals beside results: which rows are compared, and what is said of them."""

from __future__ import annotations

import json

import pytest

from martlet import cli
from martlet.bench import goals, noise
from martlet.bench.report import without_paths

MACHINE = {"cpu": "X", "cores": 2, "features": ["avx2"], "memory": {"total": 2**34}, "system": "Linux", "commit": "abc"}


def row(kind, weights, workload, slow=1.0, peak=100.0, **figures):
    return {
        "time": "t2",
        "command": "martlet bench cpu",
        "machine": MACHINE,
        "engine": f"{kind} {weights}",
        "kind": kind,
        "weights": weights,
        "model": "m",
        "workload": workload,
        "runs": [figures],
        "about": {"version": "1"},
        "error": None,
        "note": None,
        "noise": {"before": 1.0, "after": slow},
        "installed_mb": 90.0,
        "peak_mb": peak,
    }


def verdicts(rows):
    text = goals.markdown(rows)
    cells = [
        line.strip("| ").split(" | ") for line in text.split("## Figures")[0].splitlines() if line.startswith("| ")
    ]
    return [(c[0], c[2].split(" (")[-1].rstrip(")"), c[3], c[5]) for c in cells[1:] if c[5] != "-"]


def test_like_is_compared_with_like_and_best_is_best():
    rows = [
        row("native", "q4_1", "W1", decode_tok_s=300.0),
        row("native", "int8", "W1", decode_tok_s=200.0),
        row("native", "int8", "W4", seconds=3.0),
        row("llama.cpp", "q4_1", "W1", decode_tok_s=100.0),
        row("llama.cpp", "bf16", "W1", decode_tok_s=500.0),
        row("openvino", "int8", "W1", decode_tok_s=100.0),
        row("openvino", "int8", "W4", seconds=18.0),
        row("vllm", "bfloat16", "W4", seconds=5.0),
        row("reference", "float32", "W4", seconds=0.1),
    ]
    assert verdicts(rows) == [
        ("W1 decode, tok/s, 4-bit", "llama.cpp q4_1", "3.00", "yes"),
        ("W1 decode, tok/s, 8-bit", "openvino int8", "2.00", "no"),
        ("W4 total, s", "vllm bfloat16", "0.60", "no"),
        ("installed size, MB", "-", "-", "yes"),
    ]


def test_a_busy_machine_proves_no_speed_but_sizes():
    rows = [
        row("native", "int8", "W3", output_tok_s=900.0, peak=400.0),
        row("openvino", "int8", "W3", slow=1.9, output_tok_s=100.0, peak=800.0),
    ]
    assert [v[3] for v in verdicts(rows)] == ["unknown: the machine was busy", "yes", "yes"]


def test_the_report_is_of_the_last_session(tmp_path):
    results, report = tmp_path / "r.jsonl", tmp_path / "r.md"
    old = {**row("native", "int8", "W4", seconds=77.0), "time": "t1"}
    results.write_text("".join(json.dumps(r) + "\n" for r in (old, row("native", "int8", "W4", seconds=3.5))))
    assert cli.main(["bench", "report", "--results", str(results), "--report", str(report)]) == 0
    assert "3.50" in report.read_text() and "77" not in report.read_text()
    assert cli.main(["bench", "report", "--results", str(tmp_path / "no"), "--report", str(report)]) == 2


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("--engines a@W1=/x/y/m.gguf,b=../q/r --output ~/o.jsonl", "--engines a@W1=m.gguf,b=r --output o.jsonl"),
        ("http://127.0.0.1:8000/v1 and tok/s", "http://127.0.0.1:8000/v1 and tok/s"),
        ("cannot read '/a/b c'", "cannot read 'b c'"),
    ],
)
def test_paths_stay_at_home(text, wanted):
    assert without_paths(text) == wanted


def test_noise_sees_who_shares_the_cores(monkeypatch):
    took = iter([(0.1, 1.0), (0.1, 1.6), (0.15, 1.0), (0.1, 1.0)])
    monkeypatch.setattr(noise, "calibrate", lambda: next(took))
    state = noise.Noise(fastest=0.1)
    assert [round(state.slowdown(), 2) for _ in range(3)] == [1.0, 1.6, 1.5]
    assert state.wait(0.0)["before"] == 1.0
