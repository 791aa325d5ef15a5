"""`martlet bench precision` as a user runs it, and that it sees a difference where there is one."""

from __future__ import annotations

import json

import numpy as np
import pytest

from martlet import hub
from martlet.bench import quality as bench
from martlet.cli import main
from martlet.errors import UsageError
from martlet.runners import quality


def test_precision_measures_keeps_and_writes(tmp_path, monkeypatch, capsys):
    card = hub.resolve("smollm2-135m-instruct")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    words = ["bench", "precision", "--model", str(card.path), "--quants", "float32,int8", "--tokens", "60"]
    assert main([*words, "--output", str(tmp_path / "out.jsonl")]) == 0
    exact, int8 = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert exact["change"] == exact["loss"] == 0 and exact["tokens"] == 60
    assert 0.01 < int8["change"] < 0.3
    card = hub.resolve(str(card.path))
    assert quality.of_model(card, "int8").change == int8["change"]
    assert quality.of_model(card, "int4") is None
    assert "0.0000" in capsys.readouterr().out


def test_passages_have_the_tokens_asked_for():
    card = hub.resolve("smollm2-135m-instruct")
    for tokens in (1, 60, bench.CONTEXT - 1, bench.CONTEXT, 2500):
        found = bench.passages(card, tokens)
        assert sum(len(ids) - 1 for ids in found) == tokens and max(map(len, found)) <= bench.CONTEXT
    joined = np.concatenate(bench.passages(card, 2500))
    assert len(np.unique(joined)) > 500, "this is no text"
    with pytest.raises(UsageError, match="8 tokens too short"):
        bench.passages(card, 10, "one two three")
