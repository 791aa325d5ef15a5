"""The folder of fetched models: where it is, who may write, and whether there is room.

A model's folder appears under its name in one rename, after its bytes were checked. What lies under `.pulls` belongs
to a pull under way or killed; the next pull of that model, which holds its lock, removes it.
"""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Callable, Iterator
from pathlib import Path

from martlet.errors import DownloadError

Progress = Callable[[str, int, "int | None"], None]
"""progress(what, done, total): bytes so far and in all; total None where that is unknown."""

MARGIN = 16 << 20  # bytes left free beside what a model needs


def cache_dir() -> Path:
    """$XDG_CACHE_HOME/martlet, by default ~/.cache/martlet. Not created here."""
    root = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(root) if os.path.isabs(root) else Path.home() / ".cache") / "martlet"


def model_dir(name: str) -> Path:
    """The folder of a fetched model; it exists only when it is complete."""
    return cache_dir() / "models" / name


def present(name: str, file: str, size: int) -> Path | None:
    """The folder of a fetched model, if its weights, `file`, are there and of `size` bytes."""
    weights = model_dir(name) / file
    return weights.parent if weights.is_file() and weights.stat().st_size == size else None


@contextlib.contextmanager
def pulling(name: str, progress: Progress | None) -> Iterator[Path]:
    """Hold the lock of one model and give an empty folder to work in, on the same disk as `model_dir(name)`.

    Waits for another process that pulls the same model. The lock goes when the process does, however it ends.
    """
    import fcntl
    import tempfile

    models = model_dir(name).parent
    works = models / ".pulls" / name
    with _disk_errors(models):
        works.mkdir(parents=True, exist_ok=True)
        lock = (works.parent / f"{name}.lock").open("a")
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if progress:
                progress(f"waiting for another process that fetches {name}", 0, None)
            fcntl.flock(lock, fcntl.LOCK_EX)
        with _disk_errors(models):
            _empty(works)
            work = Path(tempfile.mkdtemp(dir=works))
        try:
            with _disk_errors(models):
                yield work
        finally:
            _empty(works)


def _empty(folder: Path) -> None:
    import shutil

    for stale in folder.iterdir():
        shutil.rmtree(stale, ignore_errors=True)


def publish(folder: Path, name: str) -> Path:
    """Move a complete folder to its place, in one step. The caller holds the lock."""
    import shutil

    target = model_dir(name)
    if target.exists():
        shutil.rmtree(target)
    os.replace(folder, target)
    return target


def check_room(need: int, name: str) -> None:
    """Raise DownloadError with the numbers when fewer than `need` bytes (and a margin) are free in the cache."""
    models = model_dir(name).parent
    free = _room(models)
    if free < need + MARGIN:
        raise DownloadError(
            f"{name} needs {megabytes(need + MARGIN)} in {models}, where {megabytes(free)} are free. "
            "Free some space, or set XDG_CACHE_HOME to a folder on a larger disk"
        )


def _room(folder: Path) -> int:
    import shutil

    return shutil.disk_usage(folder).free


def megabytes(size: int) -> str:
    return f"{size / 1e6:,.0f} MB"


@contextlib.contextmanager
def _disk_errors(where: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise DownloadError(
                f"no space left on the disk of {where} ({megabytes(_room(where))} free). Free some, "
                "or set XDG_CACHE_HOME to a folder on a larger disk"
            ) from error
        raise DownloadError(f"cannot write to the cache: {error}. XDG_CACHE_HOME sets another place") from error
