"""The other ranks as processes: started, told what to do, watched, and never left behind.

A rank that dies is noticed by its exit, one that hangs by its heartbeat or by a step it does not finish. Either ends
all of them: what a rank computes without the others is worth nothing. A rank whose rank 0 is gone ends by itself, since
the pipe that only rank 0 holds closes (`worker`).
"""

from __future__ import annotations

import contextlib
import logging
import os
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable

import orjson

from martlet import errors
from martlet.errors import MartletError
from martlet.runners.parallel.ring import BEAT, DONE, FAILED, Writer, shared_file

log = logging.getLogger("martlet")

LOOK = 0.1  # seconds between looks at the ranks
SILENT = 5.0  # seconds without a heartbeat after which a rank counts as hung
STUCK = 60.0  # seconds a rank may take for a step, the capture of a graph included
AGREE = 2.0  # seconds in which ranks fail alike, when they do
LEAVE = 5.0  # seconds that ranks have to leave


class RankFailure(MartletError):
    """A rank died or hangs; nothing runs any more. Clients are told."""

    http_status = 503


class Processes:
    """Ranks 1 ... size - 1. failure: why nothing runs any more; set once. store: a path all ranks can open."""

    def __init__(self, size: int):
        self.size = size
        self.failure: MartletError | None = None
        self._writer = Writer(size)
        # Never closed: torch opens its path again whenever it destroys what met there, in threads of its own too, and
        # by then the number could be another file's.
        self._store = shared_file("martlet-store")
        self.store = f"/proc/self/fd/{self._store}"
        self._lock = threading.Lock()
        self._listeners: list[Callable[[MartletError], None]] = []
        self._closing = threading.Event()
        self._ready = False  # all ranks beat their hearts
        self._succeeded = -1  # number of the last message that rank 0 did as well
        self._alike = 0  # what FAILED says of the last one that all ranks failed at
        self._reports: list[int] = []
        self._lifelines: list[int] = []
        self._processes = [self._start(rank) for rank in range(1, size)]
        self._watcher = threading.Thread(target=self._watch, name="martlet-ranks", daemon=True)
        self._watcher.start()

    def _start(self, rank: int) -> subprocess.Popen:
        """Its ends of the pipes: the doorbell, the lifeline (to notice that rank 0 is gone), and one to report on."""
        lifeline, ours = os.pipe()
        report, theirs = os.pipe()
        os.set_blocking(report, False)
        doorbell = self._writer.doorbells[rank - 1]
        inherited = [self._writer.fd, doorbell, lifeline, theirs, self._store]
        words = [rank, self.size, *inherited]
        process = subprocess.Popen(
            [sys.executable, "-m", "martlet.runners.parallel.worker", *map(str, words)],
            stdin=subprocess.DEVNULL,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
            pass_fds=inherited,
        )
        for fd in (lifeline, theirs, doorbell):
            os.close(fd)
        self._reports.append(report)
        self._lifelines.append(ours)
        return process

    # What rank 0 does

    def send(self, message: Iterable[bytes | memoryview]) -> int:
        """Tell all ranks something; returns the message's number. Raises the failure if there is one."""
        self.check()
        return self._writer.send(message, self.check)

    def check(self) -> None:
        if self.failure is not None:
            raise self.failure

    def on_failure(self, tell: Callable[[MartletError], None]) -> None:
        """Call `tell` once, on the watcher's thread, when a rank has failed."""
        with self._lock:
            self._listeners.append(tell)
            late = self.failure
        if late is not None:
            tell(late)

    def loaded(self) -> None:
        """Rank 0 has its share; wait for the others. From now on they beat their hearts."""
        while int(self._writer.told[1:, DONE].min()) < 1:
            self.check()
            time.sleep(0.01)
        self._succeeded, self._ready = 0, True

    def succeeded(self, number: int) -> None:
        """Rank 0 did message `number`: a rank that fails at it has failed alone."""
        self._succeeded = number

    def failed(self, number: int) -> None:
        """Rank 0 failed at message `number`. Raises the failure unless all ranks failed at it too, and so can go on."""
        deadline = time.monotonic() + AGREE
        while time.monotonic() < deadline and self.failure is None:
            if (self._writer.told[1:, FAILED] == number + 1).all():
                self._alike = number + 1
                for rank in range(1, self.size):
                    self._reported(rank - 1)  # not to be taken for what ranks say of a later failure
                return
            time.sleep(0.005)
        self._fail(RankFailure("rank 0 failed at a step that the other ranks did; see the log"))
        self.check()

    # The watcher

    def _watch(self) -> None:
        """By a clock that stops while this thread does not run: a busy or sleeping machine stops ranks as well."""
        now, looked = 0.0, time.monotonic()
        beats, heard = [0] * (self.size - 1), [now] * (self.size - 1)
        done, moved = [0] * (self.size - 1), list(heard)
        while not self._closing.wait(LOOK):
            since, looked = looked, time.monotonic()
            now += min(looked - since, 2 * LOOK)
            for i, process in enumerate(self._processes):
                told = self._writer.told[i + 1]
                if not self._ready or int(told[BEAT]) != beats[i]:
                    beats[i], heard[i] = int(told[BEAT]), now
                if int(told[DONE]) != done[i] or not self._ready or done[i] >= self._writer.messages:
                    done[i], moved[i] = int(told[DONE]), now
                name = f"rank {i + 1} of {self.size} (process {process.pid})"
                if process.poll() is not None:
                    self._fail(self._exit(i, name, process.returncode))
                elif now - heard[i] > SILENT:
                    self._fail(RankFailure(f"{name} has given no sign of life for {SILENT:.0f} s"))
                elif now - moved[i] > STUCK:
                    self._fail(RankFailure(f"{name} has been at one step for {STUCK:.0f} s"))
                elif self._alike < int(told[FAILED]) <= self._succeeded + 1 and self._ready:
                    self._fail(self._reported(i) or RankFailure(f"{name} failed at a step that rank 0 did"))
            if self.failure is not None:
                return

    def _exit(self, i: int, name: str, code: int) -> MartletError:
        if reported := self._reported(i):
            return reported
        if code < 0:
            return RankFailure(f"{name} was ended by {signal.Signals(-code).name}")
        return RankFailure(f"{name} left with exit code {code}; its errors are above")

    def _reported(self, i: int) -> MartletError | None:
        """What a rank said before it left or after a step failed."""
        said = b""
        with contextlib.suppress(OSError):
            while select.select([self._reports[i]], [], [], 0)[0] and (data := os.read(self._reports[i], 1 << 16)):
                said += data
        if not said:
            return None
        kind, message, param = orjson.loads(said.splitlines()[-1])
        known = getattr(errors, kind, None)
        if isinstance(known, type) and issubclass(known, MartletError):
            return known(message, param=param)
        log.error("rank %d: %s: %s", i + 1, kind, message)
        return RankFailure(f"rank {i + 1} of {self.size} failed with {kind}; see the log")

    def _fail(self, error: MartletError) -> None:
        with self._lock:
            if self.failure is not None or self._closing.is_set():
                return
            self.failure = error
            listeners, self._listeners = self._listeners, []
        log.error("%s; all ranks are stopped", error)
        for process in self._processes:
            process.kill()
        for tell in listeners:
            tell(error)

    def close(self) -> None:
        """End all ranks, in good order where they can. May be called twice."""
        if self._closing.is_set():
            return
        self._closing.set()
        self._writer.close()
        for fd in self._lifelines:
            os.close(fd)
        deadline = time.monotonic() + LEAVE
        for process in self._processes:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(max(0.0, deadline - time.monotonic()))
            process.kill()
            process.wait()
        if threading.current_thread() is not self._watcher:
            self._watcher.join()
        for fd in self._reports:
            os.close(fd)
