"""martlet models and martlet doctor, on an empty cache."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest

from martlet import cli, hub
from martlet.bench import machine
from martlet.cli import doctor
from martlet.hub.card import ModelCard
from martlet.model import families

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


@pytest.fixture(autouse=True)
def empty_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("HF_HOME", raising=False)
    return tmp_path


def test_list_names_every_registered_model(capsys):
    assert cli.main(["models", "list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["name", "family", "size", "here", "about"]
    assert [line.split()[0] for line in lines[1:]] == [entry.name for entry in hub.registered()]


def test_list_as_json_tells_what_is_here(capsys, monkeypatch, tmp_path):
    assert cli.main(["models", "list", "--json"]) == 0
    rows = {row["name"]: row for row in json.loads(capsys.readouterr().out)}
    assert rows[hub.DEFAULT_MODEL]["cached"] is False
    monkeypatch.setattr(hub, "cached", lambda name: tmp_path if name == hub.DEFAULT_MODEL else None, raising=False)
    assert cli.main(["models", "list", "--json", "--cached"]) == 0
    (row,) = json.loads(capsys.readouterr().out)
    assert (row["name"], row["cached"], row["path"]) == (hub.DEFAULT_MODEL, True, str(tmp_path))


def test_families_tell_formats_and_runners(capsys):
    assert cli.main(["models", "families"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["family", "formats", "runners", "covers"]
    assert [line.split()[0] for line in lines[1:]] == list(families.names())
    assert cli.main(["models", "families", "--json"]) == 0
    rows = {row["family"]: row for row in json.loads(capsys.readouterr().out)}
    assert rows["llama"]["runners"] == ["c++", "cuda", "torch"] and rows["llama"]["formats"] == ["safetensors", "gguf"]
    assert rows["mixtral"]["runners"] == ["c++", "torch"] and "Mixtral" in rows["mixtral"]["covers"]


def test_show(capsys):
    assert cli.main(["models", "show", hub.DEFAULT_MODEL]) == 0
    assert "licence" in capsys.readouterr().out
    assert cli.main(["models", "show", hub.DEFAULT_MODEL, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["family"] == "llama"
    assert cli.main(["models", "show", "smollm2-135m-instrct"]) == 3
    assert f"Did you mean {hub.DEFAULT_MODEL}" in capsys.readouterr().err


def test_rm(capsys, monkeypatch, tmp_path):
    assert cli.main(["models", "rm", hub.DEFAULT_MODEL]) == 0
    assert f"{hub.DEFAULT_MODEL} is not on this machine" in capsys.readouterr().err
    assert cli.main(["models", "rm", "nosuch"]) == 3
    monkeypatch.setattr(hub, "remove", lambda name: [tmp_path / name], raising=False)
    assert cli.main(["models", "rm", "some-model"]) == 0
    assert f"removed {tmp_path / 'some-model'}" in capsys.readouterr().err


def test_pull(capsys, monkeypatch, tmp_path):
    def pull(name, progress):
        progress("fetch", 1, 2)
        progress("fetch", 2, 2)
        return ModelCard(name, tmp_path, "gguf", "llama")

    monkeypatch.setattr(hub, "pull", pull, raising=False)
    assert cli.main(["models", "pull", "some-model"]) == 0
    assert capsys.readouterr().err.endswith(f"some-model is here: {tmp_path}\n")


def test_doctor_says_what_is_missing_and_what_to_do(capsys):
    assert cli.main(["doctor", "--json"]) == 0
    found = {f["what"]: f for f in json.loads(capsys.readouterr().out)}
    assert {"Python", "CPU", "GPU", "libraries", "cores", "memory", "model cache", "default model", "backend"} <= set(
        found
    )
    assert found["default model"]["state"] == "note"
    assert f"martlet models pull {hub.DEFAULT_MODEL}" in found["default model"]["remedy"]
    assert all(f["remedy"] for f in found.values() if f["state"] != "ok")


def test_doctor_exits_1_when_something_is_broken(monkeypatch, capsys):
    real = machine.library_version
    monkeypatch.setattr(machine, "library_version", lambda name: None if name == "tokenizers" else real(name))
    assert cli.main(["doctor"]) == 1
    said = capsys.readouterr().out
    assert "!!  libraries       missing: tokenizers" in said
    assert "-> pip install tokenizers" in said


def test_doctor_asks_for_all_that_the_project_needs():
    wanted = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    everywhere = [entry for entry in wanted["dependencies"] if ";" not in entry]
    assert [re.split("[<>=]", entry)[0] for entry in everywhere] == list(doctor.REQUIRED)


def test_doctor_sees_a_cache_that_cannot_be_written(monkeypatch):
    monkeypatch.setattr(doctor.os, "access", lambda path, mode: False)
    finding = doctor._cache()
    assert finding.state == "broken" and "XDG_CACHE_HOME" in finding.remedy


def test_doctor_wants_torch_only_where_no_kernels_can_be_had(monkeypatch):
    monkeypatch.setattr(machine, "library_version", lambda name: None)
    assert doctor._backend().state == "ok"
    monkeypatch.setattr(doctor, "_kernels", lambda: None)
    finding = doctor._backend()
    assert finding.state == "broken" and "g++" in finding.remedy and "torch" in finding.remedy
