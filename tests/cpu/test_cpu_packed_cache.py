"""Packed weights on disk: found when nothing changed, and never when anything did."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys

import numpy as np
import pytest
import safetensors.numpy

from martlet import hub
from martlet.hub.dummy import DummyCheckpoint
from martlet.kernels.cpu.library import Executor, library
from martlet.model import families, weights
from martlet.runners.base import LoadOptions
from martlet.runners.cpu_runner import CpuRunner, packed_cache, packing

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
    library()  # opened where it was built, before the cache is elsewhere
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(packed_cache, "SMALLEST", 1 << 10)
    monkeypatch.setattr(packing, "SCREEN_BYTES", 0)
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
    if runner.decoder.screen.matrix:
        found.append(runner.decoder.screen.matrix)
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


def test_a_head_s_screen_is_kept_too(model, monkeypatch):
    monkeypatch.setattr(Executor, "screen_rows", lambda self, head: 1)
    first = matrices(model)
    monkeypatch.delattr(Executor, "screen")
    assert matrices(model) == first


@pytest.mark.parametrize("most", [1 << 30, 0])
def test_what_was_written_is_dropped_once_it_is_on_the_disk_unless_it_is_large(model, monkeypatch, most):
    asked, sync = [], os.fsync
    monkeypatch.setattr(packed_cache, "READ_AGAIN", most)
    monkeypatch.setattr(os, "fsync", lambda file: asked.append(os.fstat(file).st_size) or sync(file))
    monkeypatch.setattr(os, "posix_fadvise", lambda file, *what: asked.append(what))
    monkeypatch.setattr(packed_cache, "_is_in_huge_pages", lambda data: False)
    first = matrices(model)
    (file,) = files(model)
    assert asked == ([file.stat().st_size, (0, 0, os.POSIX_FADV_DONTNEED)] if most else [])
    assert matrices(model) == first


@pytest.mark.parametrize("before", [True, False])
def test_what_lies_in_small_pages_is_dropped_where_the_file_system_had_huge_ones(model, monkeypatch, before):
    monkeypatch.setattr(packed_cache, "_is_in_huge_pages", lambda data: before)
    first, asked = matrices(model), []
    monkeypatch.setattr(packed_cache, "_is_in_huge_pages", lambda data: False)
    monkeypatch.setattr(os, "posix_fadvise", lambda file, *what: asked.append(what))
    assert matrices(model) == first
    assert asked == [(0, 0, os.POSIX_FADV_DONTNEED)] * before


@pytest.mark.parametrize("huge", [True, False])
def test_weights_are_shared_where_the_page_cache_has_huge_pages_and_copied_where_not(model, packs, monkeypatch, huge):
    first = matrices(model)
    monkeypatch.setattr(packed_cache, "_is_in_huge_pages", lambda data: huge)
    runner = CpuRunner(hub.resolve(str(model)), LoadOptions(max_num_seqs=1))
    address = runner.decoder.head.memory.ctypes.data
    with open("/proc/self/maps") as maps:
        (line,) = [line for line in maps if contains(line, address)]
    assert line.rstrip().endswith(".bin") == huge and (" r--s " in line) == huge
    (file,) = files(model)
    file.unlink()  # as another model's weights may need its room: who has it open keeps it
    assert bytes(runner.decoder.head.memory) == first[1] and packs[0] == 10
    runner.close()


def contains(line: str, address: int) -> bool:
    begin, end = (int(word, 16) for word in line.split()[0].split("-"))
    return begin <= address < end


def test_what_the_page_cache_shares_is_not_free_for_keys_and_values(model, monkeypatch):
    matrices(model)
    left = 4_000_000
    monkeypatch.setattr("martlet.runners.machine.free_memory", lambda: left)

    def tokens(huge):
        monkeypatch.setattr(packed_cache, "_is_in_huge_pages", lambda data: huge)
        runner = CpuRunner(hub.resolve(str(model)), LoadOptions(max_num_seqs=10_000))
        memory = runner.memory
        runner.close()
        return memory.num_blocks * memory.block_size * memory.bytes_per_token

    (file,) = files(model)
    weights = file.stat().st_size - packed_cache.HUGE
    assert 0.9 * left - 4096 < tokens(False) <= 0.9 * left
    assert 0.9 * (left - weights) - 4096 < tokens(True) <= 0.9 * (left - weights)


def test_two_processes_may_start_at_once(model, packs):
    """Both find no file, both write one, and whoever is last has written the same."""
    code = f"""
import hashlib, os, sys
from pathlib import Path
sys.path[:0] = {sys.path!r}
from martlet.kernels.cpu.library import library
from martlet.runners.cpu_runner import packed_cache
from test_cpu_packed_cache import matrices
library()  # from where it was built
os.environ["XDG_CACHE_HOME"], packed_cache.SMALLEST = {os.environ["XDG_CACHE_HOME"]!r}, 1 << 10
print("ready", flush=True)
sys.stdin.readline()
print(hashlib.sha256(b"".join(matrices(Path({str(model)!r})))).hexdigest())
"""
    env = {name: value for name, value in os.environ.items() if name != "XDG_CACHE_HOME"}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "env": env}
    running = [subprocess.Popen([sys.executable, "-c", code], **pipes) for _ in range(2)]
    for process in running:
        assert process.stdout.readline() == "ready\n"
    for process in running:
        process.stdin.write("go\n")
        process.stdin.flush()
    said = [process.communicate(timeout=60)[0] for process in running]
    assert said[0] == said[1] != ""
    assert len(files(model)) == 1
    matrices(model)
    assert packs[0] == 0


def test_a_folder_that_cannot_be_written_is_no_reason_not_to_start(model, packs, caplog):
    matrices(model)
    (file,) = files(model)
    cache = file.parent
    first = file.read_bytes()
    cache.chmod(0o500)
    try:
        assert matrices(model) and packs[0] == 10  # reading needs no more
        if os.getuid():
            with caplog.at_level(logging.INFO, "martlet"):
                matrices(model, quant="int8")
            assert "packed weights are not kept" in caplog.text
    finally:
        cache.chmod(0o700)
    assert file.read_bytes() == first


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
    monkeypatch.setattr(packing, "SCREEN_BYTES", 0)
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
