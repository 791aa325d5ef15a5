"""Servers as child processes: started on a free port, waited for, measured, and stopped whatever happens."""

from __future__ import annotations

import contextlib
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import httpx

from martlet.bench.processes import tree_peak_mb
from martlet.errors import MartletError

READY_SECONDS = 900.0  # a vLLM that compiles takes minutes


@dataclass(frozen=True, slots=True)
class Server:
    port: int
    process: subprocess.Popen[bytes]
    ready_seconds: float

    @property
    def peak_mb(self) -> float:
        """Largest resident memory so far of the process and, where it has any, of its children; 0 if unknown."""
        return tree_peak_mb(self.process.pid)


@contextlib.contextmanager
def serving(command: Sequence[str], env: dict[str, str] | None = None) -> Iterator[Server]:
    """Run `command` with {port} filled in until GET /health says 200. Raises MartletError with the end of its log."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    words = [word.replace("{port}", str(port)) for word in command]
    began = time.monotonic()
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(words, stdout=log, stderr=log, stdin=subprocess.DEVNULL, env=env)
        try:
            while not _healthy(port):
                if process.poll() is not None or time.monotonic() - began > READY_SECONDS:
                    raise MartletError(f"`{' '.join(words)}` did not come up:\n{_tail(log)}")
                time.sleep(0.05)
            yield Server(port, process, time.monotonic() - began)
        finally:
            process.terminate()
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _healthy(port: int) -> bool:
    try:
        return httpx.get(f"http://127.0.0.1:{port}/health", timeout=5).status_code == 200
    except httpx.HTTPError:
        return False


def _tail(log, lines: int = 15) -> str:
    log.seek(0)
    return "\n".join(log.read().decode(errors="replace").splitlines()[-lines:])
