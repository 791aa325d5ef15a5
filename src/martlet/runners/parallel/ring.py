"""A stream of messages from one process to several: written once into shared memory, read by each at its own pace.

The memory is a file without a name, so nothing is left of it when the processes are gone. Beside it each reader has a
pipe on which the writer says how far it has written: a reader sleeps on its pipe, and system calls order what one
process wrote before what another reads. The head of the memory holds, for each rank, what it tells the writer: how far
it has read, that it is alive, how many messages it has done, and which of them failed.
"""

from __future__ import annotations

import mmap
import os
import select
import tempfile
from collections.abc import Callable, Iterable

import numpy as np

READ, BEAT, DONE, FAILED = range(
    4
)  # what a rank tells: bytes read; heartbeats; messages done; 1 + the last that failed
WORDS = 8  # of 8 bytes a rank has, a cache line of its own
CAPACITY = 16 << 20  # bytes under way
_PATIENCE = 0.002  # seconds between looks at readers that have no room


def shared_file(name: str) -> int:
    """A file of no name, in memory where the system can."""
    if hasattr(os, "memfd_create"):
        return os.memfd_create(name)
    with tempfile.TemporaryFile() as file:
        return os.dup(file.fileno())


class _Memory:
    def __init__(self, fd: int, ranks: int, capacity: int):
        head = 8 * WORDS * ranks
        self._map = mmap.mmap(fd, head + capacity)
        self.told = np.frombuffer(self._map, np.uint64, WORDS * ranks).reshape(ranks, WORDS)
        self.data = np.frombuffer(self._map, np.uint8, capacity, head)

    def pieces(self, at: int, length: int) -> Iterable[slice]:
        """Where bytes at ... at + length - 1 of the stream lie."""
        begin = at % len(self.data)
        first = min(length, len(self.data) - begin)
        yield slice(begin, begin + first)
        if first < length:
            yield slice(0, length - first)


class Writer:
    """Rank 0's end. fd: of the memory, to be inherited by the readers. doorbells: their ends of the pipes, to be
    inherited too; whoever starts the readers closes them here.

    told: uint64 [ranks, WORDS], what the ranks tell; rank 0's line is not used.
    """

    def __init__(self, ranks: int, capacity: int = CAPACITY):
        self.fd = shared_file("martlet-ranks")
        os.ftruncate(self.fd, 8 * WORDS * ranks + capacity)
        self._memory = _Memory(self.fd, ranks, capacity)
        self.told = self._memory.told
        self.written = 0
        self.messages = 0
        pipes = [os.pipe() for _ in range(1, ranks)]
        self.doorbells = [read for read, _ in pipes]
        self._bells = [write for _, write in pipes]
        for bell in self._bells:
            os.set_blocking(bell, False)

    def send(self, pieces: Iterable[bytes | memoryview], check: Callable[[], None]) -> int:
        """Write a message; returns its number. Waits where a reader is far behind; `check` raises to end that."""
        pieces = [piece for piece in pieces if len(piece)]
        number, self.messages = self.messages, self.messages + 1
        length = sum(len(piece) for piece in pieces)
        for piece in (length.to_bytes(8, "little"), *pieces):
            source = np.frombuffer(piece, np.uint8)
            while len(source):
                room = len(self._memory.data) - (self.written - int(self.told[1:, READ].min()))
                if not room:
                    self._ring(check)
                    select.select([], [], [], _PATIENCE)
                    check()
                    continue
                now, source = source[:room], source[room:]
                for place in self._memory.pieces(self.written, len(now)):
                    here, now = now[: place.stop - place.start], now[place.stop - place.start :]
                    self._memory.data[place] = here
                    self.written += len(here)
        self._ring(check)
        return number

    def _ring(self, check: Callable[[], None]) -> None:
        """Tell all readers how far it is."""
        for bell in self._bells:
            while True:
                try:
                    os.write(bell, self.written.to_bytes(8, "little"))
                    break
                except BlockingIOError:
                    select.select([], [bell], [], _PATIENCE)
                    check()
                except BrokenPipeError:  # its reader is gone, as `check` will say
                    check()
                    break

    def close(self) -> None:
        for fd in (self.fd, *self._bells):
            os.close(fd)


class Closed(Exception):
    """The writer is gone."""


class Reader:
    """Another rank's end."""

    def __init__(self, fd: int, doorbell: int, rank: int, ranks: int, capacity: int = CAPACITY):
        self._memory = _Memory(fd, ranks, capacity)
        self._doorbell = doorbell
        self.told = self._memory.told[rank]
        self._read = self._limit = 0

    def receive(self) -> bytearray:
        """The next message, waiting for it. Raises Closed."""
        return self._take(int.from_bytes(self._take(8), "little"))

    def _take(self, length: int) -> bytearray:
        message, filled = bytearray(length), 0
        there = np.frombuffer(message, np.uint8) if length else np.empty(0, np.uint8)
        while filled < length:
            if self._limit == self._read:
                said = os.read(self._doorbell, 4096)
                if not said:
                    raise Closed
                self._limit = int.from_bytes(said[-8:], "little")
                continue
            for place in self._memory.pieces(self._read, min(length - filled, self._limit - self._read)):
                part = self._memory.data[place]
                there[filled : filled + len(part)] = part
                filled += len(part)
                self._read += len(part)
            self.told[READ] = self._read
        return message
