"""Packed weights kept on disk, so that the next start maps them into memory instead of packing them again.

A file holds the matrices of one model in the order in which they are packed. Its name is a digest of all they depend
on: the checkpoint's files (path, inode, size, times, first bytes), the decoder, the precision, the instruction set, the
library, and the code that decides how weights are laid out. What is different has another name, so nothing stale is
ever found; a checksum tells a damaged file, which is made again. Every step streams huge pages faster than small ones.
A file that is read into the page cache comes in huge pages where the file system has them, one that is written does so
by luck: so it is written, dropped and read. All processes share these pages and nothing is copied. Where they are
small, the weights are copied into huge pages of our own, and dropped if the file system had large ones before.
"""

from __future__ import annotations

import hashlib
import json
import logging
import mmap
import os
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import BinaryIO

import numpy as np

from martlet.hub.cache import cache_dir
from martlet.hub.card import ModelCard
from martlet.hub.files import fingerprint
from martlet.kernels.cpu.library import Executor, library
from martlet.model.spec import DecoderSpec

log = logging.getLogger("martlet")

SMALLEST = 16 << 20  # bytes: smaller models are packed at once anyway
CAPACITY = 4 << 30  # bytes of all files together; the least recently used go first
READ_AGAIN = 1 << 30  # bytes: a start shall not wait for larger files to reach the disk and come back
MARGIN = 2 << 30  # bytes left free on the disk
ALIGN = 64  # bytes: a cache line
HUGE = 2 << 20  # bytes: a huge page
ROOMS = ("hub", "model", "runners/cpu_runner")  # the code that decides what is packed, and in which order

Entry = tuple[int, int, int, int]  # source, target, outputs, inputs: what a matrix was packed from and as
Place = tuple[Entry, int, int]  # a matrix's start and length


class PackedCache:
    """The packed matrices of one model, to be asked for in the order in which they are packed.

    reading: called when all that is left is to read and to add up, which needs no Python. shared: bytes that lie in
    the page cache, which the system counts as free memory, for it could read them again.
    """

    def __init__(self, path: Path, reading: Callable[[], object]):
        self.path, self.shared = path, 0
        self._listed: list[tuple[Entry, np.ndarray]] = []  # what the file holds; empty when there is none to be used
        self._packed: list[tuple[Entry, np.ndarray]] = []  # what the model took
        try:
            with path.open("rb", buffering=0) as file:
                data, entries = self._weights(file, reading)
        except FileNotFoundError:
            return
        except (OSError, ValueError) as error:
            log.warning("packed weights in %s cannot be used (%s); they are made again", path, error)
            return
        for entry, start, length in entries:
            self._listed.append((entry, data[start : start + length]))

    def _weights(self, file: BinaryIO, reading: Callable[[], object]) -> tuple[np.ndarray, list[Place]]:
        data, places, comes_huge = _read(file, reading)
        if _is_in_huge_pages(data):
            self.shared = len(data)
            return data, places
        copy = np.frombuffer(huge_pages(len(data)), np.uint8)
        copy[:] = data
        del data  # what is mapped cannot be dropped
        if comes_huge:
            _drop(file)
        return copy, places

    def take(self, entry: Entry) -> np.ndarray | None:
        """The next matrix, or None when it has to be packed."""
        number = len(self._packed)
        if number < len(self._listed) and self._listed[number][0] == entry:
            return self._listed[number][1]
        return None

    def put(self, entry: Entry, matrix: np.ndarray) -> None:
        """The model has its next matrix, from here or packed just now."""
        self._packed.append((entry, matrix))

    def keep(self) -> None:
        """Write what the model took, unless all of it was here. Never fails a start."""
        same = len(self._packed) == len(self._listed) and all(
            ours is theirs for (_, ours), (_, theirs) in zip(self._packed, self._listed, strict=True)
        )
        try:
            if same and self._listed:
                os.utime(self.path)  # used just now: last to be removed
            else:
                self._write()
        except OSError as error:
            log.info("packed weights are not kept: %s", error)
        self._packed, self._listed = [], []

    def _write(self) -> None:
        size = sum(len(matrix) for _, matrix in self._packed)
        if not SMALLEST <= size <= CAPACITY:
            return
        import shutil
        import tempfile

        folder = self.path.parent
        folder.mkdir(parents=True, exist_ok=True)
        if shutil.disk_usage(folder).free < size + MARGIN:
            log.info("packed weights are not kept: the disk of %s has less than %d GiB to spare", folder, MARGIN >> 30)
            return
        _make_room(folder, size)
        handle, scratch = tempfile.mkstemp(dir=folder, suffix=".part")
        try:
            with os.fdopen(handle, "w+b") as file:
                start = _write(file, self._packed)
                if size <= READ_AGAIN:
                    _read_again(file, start)
            os.replace(scratch, self.path)
        except BaseException:
            Path(scratch).unlink(missing_ok=True)
            raise


def packed_cache(
    card: ModelCard, spec: DecoderSpec, precision: object, executor: Executor, reading: Callable[[], object]
) -> PackedCache:
    """The cache of a checkpoint as it lies on the disk now."""
    known = [fingerprint(card.path), repr(spec), repr(precision), executor.isa, Path(library()._name).name]
    known.append(code_digest())
    digest = hashlib.sha256("\0".join(known).encode()).hexdigest()[:32]
    return PackedCache(cache_dir() / "packed" / f"{digest}.bin", reading)


@cache
def code_digest() -> str:
    """Of the sources of ROOMS, as they lie on the disk: to read them all takes longer than to look at them.

    The time of change too, as images and packages often give all files one time of modification.
    """
    root, digest = Path(__file__).parents[2], hashlib.sha256()
    for path in sorted(path for room in ROOMS for path in (root / room).rglob("*.py")):
        stat = path.stat()
        digest.update(f"{path.name} {stat.st_size} {stat.st_mtime_ns} {stat.st_ctime_ns}\n".encode())
    return digest.hexdigest()


def _make_room(folder: Path, size: int) -> None:
    """Remove what was not used for longest, killed writers' files too, until `size` more bytes fit into CAPACITY."""
    files = sorted(((p.stat(), p) for p in folder.iterdir() if p.is_file()), key=lambda found: found[0].st_mtime)
    room = CAPACITY - size - sum(stat.st_size for stat, _ in files)
    for stat, path in files:
        if room < 0:
            path.unlink(missing_ok=True)  # whoever reads it has it open
            room += stat.st_size


# The file: its header's length (8 bytes), the header's SHA-256, the header in JSON; from the next multiple of HUGE on,
# the matrices, each padded to ALIGN. The byte before them is 1 if the page cache has held the file in huge pages.


def _write(file: BinaryIO, packed: list[tuple[Entry, np.ndarray]]) -> int:
    """Returns where the matrices begin."""
    matrices = [np.pad(matrix, (0, -len(matrix) % ALIGN)) if len(matrix) % ALIGN else matrix for _, matrix in packed]
    checksum = sum(map(_checksum, matrices)) % 2**64
    listed = [[*map(int, entry), len(matrix)] for entry, matrix in packed]
    header = json.dumps({"checksum": checksum, "matrices": listed}).encode()
    header = len(header).to_bytes(8, "little") + hashlib.sha256(header).digest() + header
    start = _start(len(header) + 1)
    file.write(header.ljust(start, b"\0"))
    for matrix in matrices:
        file.write(matrix)
    return start


def _read_again(file: BinaryIO, start: int) -> None:
    """Have the page cache hold a file that was just written in the pages that reading gives it, and note which."""
    file.flush()
    os.fsync(file.fileno())  # only what is on the disk can be dropped
    _drop(file)
    data = _mapped(file)[start:]
    data[::HUGE].max()
    if _is_in_huge_pages(data):
        file.seek(start - 1)
        file.write(b"\1")


def _drop(file: BinaryIO) -> None:
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _mapped(file: BinaryIO) -> np.ndarray:
    """The file's bytes; what is not in memory yet is read into huge pages."""
    region = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        region.madvise(mmap.MADV_HUGEPAGE)
    return np.frombuffer(region, np.uint8)


def _start(header: int) -> int:
    """Where the matrices begin, behind a header of so many bytes."""
    return -(-header // HUGE) * HUGE


def _read(file: BinaryIO, reading: Callable[[], object]) -> tuple[np.ndarray, list[Place], bool]:
    """All matrices, mapped in one piece; where each is; whether the file came in huge pages. ValueError: damaged."""
    size, digest = int.from_bytes(file.read(8), "little"), file.read(32)
    header = file.read(min(size, SMALLEST))
    if hashlib.sha256(header).digest() != digest:
        raise ValueError("the header is damaged")
    known = json.loads(header)
    ends = np.cumsum([-(-length // ALIGN) * ALIGN for *_, length in known["matrices"]])
    start = _start(40 + len(header) + 1)
    if os.fstat(file.fileno()).st_size != start + int(ends[-1]):
        raise ValueError("the file is truncated")
    whole = _mapped(file)
    data = whole[start:]
    reading()
    if _checksum(data) != known["checksum"]:
        raise ValueError("the checksum differs")
    starts = [0, *ends.tolist()]
    places = [(tuple(entry), at, length) for (*entry, length), at in zip(known["matrices"], starts, strict=False)]
    return data, places, bool(whole[start - 1])


def _checksum(data: np.ndarray) -> int:
    """Sum of its 64-bit words: sees lost and changed pages, and costs little beside reading them."""
    return int(np.add.reduce(data.view(np.uint64)))


def _is_in_huge_pages(data: np.ndarray) -> bool:
    """Whether most of `data`, a mapped file of which every page was read, lies in huge pages."""
    rollup = Path("/proc/self/smaps_rollup")
    lines = rollup.read_text().splitlines() if rollup.exists() else []
    kilobytes = sum(int(line.split()[1]) for line in lines if line.startswith("FilePmdMapped:"))
    return kilobytes << 10 > 3 * len(data) // 4


def pages(size: int) -> mmap.mmap:
    """Zeroed memory that the system gives page by page, as it is written."""
    if not hasattr(mmap, "MAP_ANONYMOUS"):
        return mmap.mmap(-1, size)
    return mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)


def huge_pages(size: int) -> mmap.mmap:
    """Zeroed memory, in huge pages where the system has them: only private memory gets them when asked for."""
    region = pages(size)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        region.madvise(mmap.MADV_HUGEPAGE)
    return region
