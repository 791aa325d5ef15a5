"""Kernels that are compiled behind what goes on; that they are the right ones needs a GPU (bench/gpu/check.py)."""

import contextvars
import threading
from concurrent.futures import as_completed

import pytest

from martlet.kernels.cuda import launch

active: contextvars.ContextVar = contextvars.ContextVar("active", default=None)


class Mode:
    """As Triton's: the one that is active compiles on `pool`, and its end waits for all."""

    def __init__(self, pool):
        self.pool, self.futures = pool, {}

    def __enter__(self):
        active.set(self)

    def __exit__(self, *error):
        for future in as_completed(self.futures.values()):
            future.result()
        active.set(None)

    def submit(self, name, compile_kernel):
        if name not in self.futures:
            self.futures[name] = self.pool.submit(compile_kernel)


@pytest.fixture(autouse=True)
def no_gpu(monkeypatch):
    monkeypatch.setattr(launch.torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(launch.torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(launch.triton, "AsyncCompileMode", Mode)


class Kernel:
    run = None  # its launcher


def test_nobody_waits_for_kernels_that_are_compiled_behind():
    may_end, compiled = threading.Event(), []

    def compile_kernel():
        may_end.wait(10)
        compiled.append(threading.current_thread())
        return Kernel()

    def launches():
        assert launch.compiling
        for name in ("first", "second", "first"):
            active.get().submit(name, compile_kernel)

    behind = launch.CompiledBehind(launches)
    assert not launch.compiling and active.get() is None, "who goes on compiles and launches as ever"
    behind.join(0.05)
    assert behind.is_alive() and not compiled
    may_end.set()
    behind.join(10)
    assert len(compiled) == 2 and threading.current_thread() not in compiled


def test_a_kernel_that_does_not_compile_is_told_of_and_a_cancelled_one_is_not(caplog):
    def fails():
        raise ValueError("no such instruction")

    launch.CompiledBehind(lambda: active.get().submit("k", fails)).join(10)
    assert "no such instruction" in caplog.text
    caplog.clear()

    begun, may_end = threading.Semaphore(0), threading.Event()

    def compile_kernel():
        begun.release()
        may_end.wait(10)
        return Kernel()

    def launches():
        for number in range(3 * launch.BEHIND):
            active.get().submit(number, compile_kernel)

    behind = launch.CompiledBehind(launches)
    for _ in range(launch.BEHIND):
        begun.acquire()
    behind.cancel()
    may_end.set()
    behind.join(10)
    assert not behind.is_alive() and not begun.acquire(blocking=False) and not caplog.text
