"""What `--quant auto` picks and says: it follows measurements, and tells whose they are."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest

from martlet.cli.bench import PrecisionOptions
from martlet.cli.flags import parse
from martlet.hub.card import ModelCard
from martlet.runners import quality
from martlet.runners.quality import Quality

SHIPPED = quality.SHIPPED.read_text(encoding="utf-8")


@pytest.fixture
def card(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(b"weights")
    return ModelCard("mine", folder, "safetensors", "llama")


def measured(quant: str, change: float, loss: float = 0.0) -> Quality:
    return Quality("mine", "safetensors", quant, "avx2", 2000, change, loss, "martlet bench precision --model mine")


def chosen(card, caplog, quants=("int8", "bf16")) -> str:
    caplog.clear()
    with caplog.at_level(logging.INFO, "martlet"):
        found = quality.choose(card, quants)
    assert f"quant auto is {found}: " in caplog.text
    return found


def test_a_model_nobody_measured_goes_by_the_figures_of_the_package(card, caplog):
    assert chosen(card, caplog) == "int8"
    shipped = quality.shipped("safetensors", "int8")
    assert f"{shipped.change:.3f}" in caplog.text and shipped.model in caplog.text
    assert "`martlet bench precision --model mine` measures this model" in caplog.text


def test_own_measurements_decide_and_are_told(card, caplog):
    quality.keep(card, [measured("int8", 0.091)])
    assert chosen(card, caplog) == "int8"
    assert "0.091" in caplog.text and "`martlet bench precision --model mine` measured here" in caplog.text
    for bad in (measured("int8", quality.MOST_CHANGE + 0.01), measured("int8", 0.1, quality.MOST_LOSS + 0.01)):
        quality.keep(card, [bad, measured("bf16", 0.012)])
        assert chosen(card, caplog) == "bf16" and "0.012" in caplog.text


def test_measurements_are_of_the_files_as_they_were(card, caplog):
    quality.keep(card, [measured("int8", 9.0)])
    assert chosen(card, caplog) == "bf16"
    (card.path / "model.safetensors").write_bytes(b"others!")
    assert chosen(card, caplog) == "int8"


def test_a_damaged_file_of_measurements_counts_as_none(card, caplog):
    path = quality.keep(card, [measured("int8", 9.0)])
    for text in ("", "[1]", "{}", '[{"files": "x"}]', "[[]]", "\x00"):
        path.write_text(text)
        assert chosen(card, caplog) == "int8"


def test_what_nobody_measured_is_said_to_be_so(card, caplog):
    assert chosen(card, caplog, ("unheard-of",)) == "unheard-of" and "nobody measured" in caplog.text


def test_the_figures_of_the_package_are_complete_and_carry_their_command():
    rows = [
        Quality(**{k: v for k, v in row.items() if k != "files"}) for row in json.loads(quality.SHIPPED.read_text())
    ]
    assert {(q.format, q.quant) for q in rows} >= {("gguf", "stored"), ("safetensors", "int8"), ("safetensors", "bf16")}
    for one in rows:
        program, group, name, *words = one.command.split()
        assert (program, group, name) == ("martlet", "bench", "precision")
        options = parse(PrecisionOptions, words)
        assert one.quant in options.quants and one.tokens == options.tokens
        assert Path(options.model).name == one.model and one.good
