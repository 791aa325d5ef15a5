"""The worker process seen from outside: messages out without waiting, answers in with a timeout, and an end to it."""

from __future__ import annotations

import mmap
import os
import select
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import orjson

from martlet.hub.tokenizer import Tokenizer

MEMORY = 4 << 30  # bytes of address space of a worker


def vocabulary(tokenizer: Tokenizer, size: int) -> bytes:
    """The worker's first message: the bytes of `size` tokens (empty for ids without one), control and end tokens."""
    tokens = [tokenizer.token_bytes(token).decode("latin-1") for token in range(size)]
    special = [token for token in sorted({*tokenizer.special_ids, *tokenizer.eos_ids}) if token < size]
    eos = [token for token in tokenizer.eos_ids if token < size]
    return orjson.dumps({"tokens": tokens, "special": special, "eos": eos}) + b"\n"


class Worker:
    """One worker process and the masks it writes. One thread at a time.

    masks: uint32 [slots, words], shared with the process.
    """

    def __init__(self, vocabulary: bytes, slots: int, words: int):
        fd = _shared_file()
        os.ftruncate(fd, 4 * slots * words)
        memory = mmap.mmap(fd, 4 * slots * words)
        self.masks = np.frombuffer(memory, np.uint32).reshape(slots, words)
        self._process = subprocess.Popen(
            [sys.executable, "-m", "martlet.grammar.worker", str(fd), str(words), str(MEMORY)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
            pass_fds=[fd],
        )
        os.close(fd)
        assert self._process.stdin is not None and self._process.stdout is not None
        self._to, self._from = self._process.stdin.fileno(), self._process.stdout.fileno()
        os.set_blocking(self._to, False)
        os.set_blocking(self._from, False)
        self._unsent, self._unread = bytearray(vocabulary), bytearray()
        self._number = 0
        self.waiting: list[int] = []  # numbers of the messages that have no answer yet, oldest first
        self.busy_since = time.monotonic()  # when the oldest of them got its turn
        self.alive = True
        self._write()

    def flush(self, timeout: float) -> None:
        """Wait until the process has taken all that was sent."""
        deadline = time.monotonic() + timeout
        while self._unsent and self.alive and (left := deadline - time.monotonic()) > 0:
            select.select([], [self._to], [], left)
            self._write()

    def send(self, what: str, *rest: Any) -> int:
        """Queue a message; returns its number."""
        self._number += 1
        if not self.waiting:
            self.busy_since = time.monotonic()
        self.waiting.append(self._number)
        self._unsent += orjson.dumps([self._number, what, *rest]) + b"\n"
        self._write()
        return self._number

    def receive(self, timeout: float) -> Sequence[tuple[int, Any]]:
        """Answers that are there, (number, answer); waits up to `timeout` seconds for the first."""
        deadline = time.monotonic() + timeout
        while self.alive:
            self._read()
            if b"\n" in self._unread or not self.alive:
                break
            left = deadline - time.monotonic()
            if left <= 0:
                return ()
            _, writable, _ = select.select([self._from], [self._to] if self._unsent else [], [], left)
            if writable:
                self._write()
        *lines, self._unread = self._unread.split(b"\n")
        if lines:
            self.busy_since = time.monotonic()
        answers = [orjson.loads(line) for line in lines]
        for number, _ in answers:
            self.waiting.remove(number)
        return [(number, answer) for number, answer in answers]

    def _write(self) -> None:
        try:
            while self._unsent:
                del self._unsent[: os.write(self._to, self._unsent[: 1 << 16])]
        except BlockingIOError:
            return
        except OSError:
            self.alive = False

    def _read(self) -> None:
        self._write()
        try:
            while data := os.read(self._from, 1 << 16):
                self._unread += data
            self.alive = False
        except BlockingIOError:
            return

    def close(self) -> None:
        """Kill the process, whatever it does. Idempotent."""
        self.alive = False
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            try:
                pipe.close()
            except OSError:
                continue


def _shared_file() -> int:
    """A file of no name, in memory where the system can."""
    if hasattr(os, "memfd_create"):
        return os.memfd_create("martlet-masks")
    with tempfile.TemporaryFile() as file:
        return os.dup(file.fileno())
