"""Packed weights on disk: found when nothing changed, and never when anything did."""

from __future__ import annotations

import json
import logging
import os

import numpy as np
import pytest
import safetensors.numpy

from martlet import hub
from martlet.hub.dummy import DummyCheckpoint
from martlet.kernels.cpu.library import Executor
from martlet.model import families, weights
from martlet.runners.base import LoadOptions
from martlet.runners.cpu_runner import CpuRunner, packed_cache

CONFIG = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 203,  # no multiple of a panel
    "hidden_size": 72,
    "intermediate_size": 100,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "num_key_value_heads": 1,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "head_dim": 32,
}


def save(folder, seed):
    """A small model with random weights, as Hugging Face would save it."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(CONFIG))
    family = families.get("llama")
    spec, random = family.read(CONFIG), DummyCheckpoint(seed)
    tensors = {
        family.source(spec, p.name, "safetensors").name: np.asarray(random.random(p.name, p.shape), np.float32)
        for p in weights.parameters(spec)
    }
    safetensors.numpy.save_file(tensors, folder / "model.safetensors")


@pytest.fixture
def model(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(packed_cache, "SMALLEST", 1 << 10)
    save(tmp_path / "model", 1)
    return tmp_path / "model"


@pytest.fixture
def packs(monkeypatch):
    """How many matrices were packed so far, as a list of one."""
    count, pack = [0], Executor.pack

    def counting(self, *words):
        count[0] += 1
        pack(self, *words)

    monkeypatch.setattr(Executor, "pack", counting)
    return count


def matrices(folder, **options) -> list[bytes]:
    """The panels of every matrix of the loaded model."""
    runner = CpuRunner(hub.resolve(str(folder)), LoadOptions(max_num_seqs=1, **options))
    found = [runner.decoder.embed, runner.decoder.head]
    for block in runner.decoder.blocks:
        found += [one.matrix for one in block.linears]
    panels = [bytes(matrix.memory) for matrix in found]
    runner.close()
    return panels


def files(folder):
    return sorted((folder.parent / "cache" / "martlet" / "packed").glob("*"))


def test_the_second_start_packs_nothing_and_has_the_same_weights(model, packs):
    first = matrices(model)
    assert packs[0] == 10 and len(files(model)) == 1
    assert matrices(model) == first and packs[0] == 10
    assert matrices(model, packed_cache=False) == first and packs[0] == 20


def test_what_is_different_is_not_found(model, packs, monkeypatch):
    first = matrices(model)
    assert matrices(model, quant="int8") != first and packs[0] == 20
    stat = (model / "model.safetensors").stat()
    save(model, 2)  # as long as before
    os.utime(model / "model.safetensors", ns=(stat.st_atime_ns, stat.st_mtime_ns))
    second = matrices(model)
    assert packs[0] == 30 and second != first and second == matrices(model, packed_cache=False)
    packs[0] = 0
    monkeypatch.setattr(packed_cache, "code_digest", lambda: "another version of martlet")
    assert matrices(model) == second and packs[0] == 10
    assert len(files(model)) == 4


@pytest.mark.parametrize("damage", ["cut", "empty", "a byte of the weights", "a byte of the header", "noise"])
def test_a_damaged_file_is_made_again(model, packs, damage, caplog):
    first = matrices(model)
    (file,) = files(model)
    good = file.read_bytes()
    bad = bytearray(good)
    match damage:
        case "cut":
            del bad[-100:]
        case "empty":
            bad.clear()
        case "a byte of the weights":
            bad[-1000] ^= 64
        case "a byte of the header":
            bad[60] ^= 1
        case "noise":
            bad[:] = os.urandom(len(bad))
    file.write_bytes(bad)
    with caplog.at_level(logging.WARNING, "martlet"):
        assert matrices(model) == first
    assert packs[0] == 20 and "cannot be used" in caplog.text
    assert file.read_bytes() == good
    assert matrices(model) == first and packs[0] == 20


def test_least_recently_used_files_go_first(model, monkeypatch):
    for quant in ("float32", "bf16", "int8"):
        matrices(model, quant=quant)
    sizes = {path: path.stat().st_size for path in files(model)}
    for age, path in enumerate(sorted(sizes, key=sizes.get)):
        os.utime(path, (age, age))
    smallest, middle, largest = sorted(sizes, key=sizes.get)
    matrices(model, quant="int8")  # the smallest, and the oldest; now it is the newest
    monkeypatch.setattr(packed_cache, "CAPACITY", sum(sizes.values()))
    matrices(model, quant="int4")
    assert smallest in files(model) and middle not in files(model) and largest in files(model)


def test_no_room_is_no_reason_not_to_start(model, monkeypatch, packs):
    monkeypatch.setattr(packed_cache, "MARGIN", 1 << 62)
    first = matrices(model)
    assert files(model) == []
    monkeypatch.undo()
    folder = model.parent / "a file where the folder should be"
    folder.write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder))
    monkeypatch.setattr(packed_cache, "SMALLEST", 1 << 10)
    assert matrices(model) == first


def test_others_hear_of_it_before_weights_are_packed_or_read(model, packs, monkeypatch):
    heard: list[int] = []

    def start():
        options = LoadOptions(max_num_seqs=1)
        CpuRunner(hub.resolve(str(model)), options, reading=lambda: heard.append(packs[0])).close()

    start()
    assert heard == [0] and packs[0] == 10
    checksum = packed_cache._checksum
    monkeypatch.setattr(packed_cache, "_checksum", lambda data: (heard.append(-1), checksum(data))[1])
    start()
    assert heard[1] == 10 and -1 in heard[2:] and packs[0] == 10
