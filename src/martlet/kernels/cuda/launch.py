"""How kernels are launched: overlapped with their predecessor where the GPU can (programmatic dependent launch).

A step at batch 1 is some 170 kernels of 1 to 5 us, so the gaps between them would cost as much as the work. A kernel
launched this way starts while its predecessor drains: it asks for its weights, then waits for the predecessor's
results. The rule every kernel keeps: all its programs call `wait` before they read or write anything that a kernel of
the step may write, also programs that have nothing to do, because the wait of the next kernel covers only this one.
"""

from __future__ import annotations

import contextvars
import functools
import logging
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from typing import Any

import torch
import triton
import triton.language as tl
from triton.language.extra import cuda as tl_cuda

log = logging.getLogger("martlet")

INTERPRETED = bool(triton.knobs.runtime.interpret)
overlap_allowed = True  # the benchmark switches it off to see what overlap gives
compiling = False  # what is launched now only gets compiled
BEHIND = 4  # kernels at a time that are compiled while others work: they take turns for Python's lock


@triton.jit
def wait(PDL: tl.constexpr):
    """Let the next kernel start, then wait until the previous one is done and its writes can be seen."""
    if PDL:
        tl_cuda.gdc_launch_dependents()
        tl_cuda.gdc_wait()


def run(
    kernel: Any,
    grid: tuple[int, ...],
    *arguments: Any,
    warps: int = 4,
    stages: int = 3,
    overlap: bool = True,
    **more: Any,
) -> None:
    """Launch a kernel that has a PDL parameter; inside `compiled_together`, only have it compiled."""
    pdl = overlap and overlap_allowed and is_hopper()
    options = {**more, "PDL": pdl, "num_warps": warps, "num_stages": stages}
    if pdl:
        options["launch_pdl"] = True
    if compiling:
        kernel.warmup(*arguments, grid=grid, **options)
    else:
        kernel[grid](*arguments, **options)


class _Builders(ThreadPoolExecutor):
    """Compiles kernels, each with its launcher: Triton would have a C compiler make those later, one after another."""

    stopped = False

    def submit(self, compile_kernel: Callable[[], Any], /) -> Future:  # type: ignore[override]
        def build() -> Any:
            if self.stopped:
                raise CancelledError
            kernel = compile_kernel()
            with suppress(triton.OutOfResources):  # which the launch tells of
                kernel.run  # noqa: B018  a property that makes the launcher and loads the kernel
            return kernel

        return super().submit(build)


def _builders(most: int | None = None) -> _Builders:
    device = torch.cuda.current_device()
    return _Builders(most, initializer=torch.cuda.set_device, initargs=(device,))


@contextmanager
def _only_compiled() -> Iterator[None]:
    global compiling
    compiling = True
    try:
        yield
    finally:
        compiling = False


@contextmanager
def compiled_together() -> Iterator[None]:
    """What is launched inside does not run: it is made ready, many kernels at a time, by the time this ends.

    A kernel takes half a second and more, half of it with Python's lock, and a model needs some fifty.
    """
    with _builders() as pool, triton.AsyncCompileMode(pool), _only_compiled():
        yield


class CompiledBehind(threading.Thread):
    """What `launches` launches does not run: it is made ready by a few threads, while this one goes on.

    Who needs one of these kernels before it is there compiles it as if nobody else did.
    """

    def __init__(self, launches: Callable[[], None]):
        super().__init__(name="martlet-compile", daemon=True)
        self._pool = _builders(BEHIND)
        self._mode = triton.AsyncCompileMode(self._pool)
        contextvars.copy_context().run(self._collect, launches)  # the mode holds there alone
        self.start()

    def _collect(self, launches: Callable[[], None]) -> None:
        self._mode.__enter__()
        with _only_compiled():
            launches()

    def run(self) -> None:
        try:
            with self._pool:
                self._mode.__exit__(None, None, None)
        except CancelledError:
            pass
        except Exception:
            log.warning("some kernels could not be compiled ahead; steps that need them will try", exc_info=True)

    def cancel(self) -> None:
        """Kernels that are not begun are left."""
        self._pool.stopped = True


@functools.cache
def is_hopper() -> bool:
    """Whether the GPU is one, or a later one."""
    return not INTERPRETED and torch.cuda.get_device_capability()[0] >= 9


@functools.cache
def has_wgmma() -> bool:
    """Whether the GPU is a Hopper, whose warp groups multiply from shared memory; no other has these instructions."""
    return not INTERPRETED and torch.cuda.get_device_capability()[0] == 9


@functools.cache
def num_sms() -> int:
    """Multiprocessors of the GPU; 4 under the interpreter, so that the paths that split work are walked."""
    return 4 if INTERPRETED else torch.cuda.get_device_properties("cuda").multi_processor_count
