"""How kernels are launched: overlapped with their predecessor where the GPU can (programmatic dependent launch).

A step at batch 1 is some 170 kernels of 1 to 5 us, so the gaps between them would cost as much as the work. A kernel
launched this way starts while its predecessor drains: it asks for its weights, then waits for the predecessor's
results. The rule every kernel keeps: all its programs call `wait` before they read or write anything that a kernel of
the step may write, also programs that have nothing to do, because the wait of the next kernel covers only this one.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from typing import Any

import torch
import triton
import triton.language as tl
from triton.language.extra import cuda as tl_cuda

INTERPRETED = bool(triton.knobs.runtime.interpret)
overlap_allowed = True  # the benchmark switches it off to see what overlap gives
compiling = False  # what is launched now only gets compiled


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

    def submit(self, compile_kernel: Callable[[], Any], /) -> Future:  # type: ignore[override]
        def build() -> Any:
            kernel = compile_kernel()
            with suppress(triton.OutOfResources):  # which the launch tells of
                kernel.run  # noqa: B018  a property that makes the launcher and loads the kernel
            return kernel

        return super().submit(build)


@contextmanager
def compiled_together() -> Iterator[None]:
    """What is launched inside does not run: it is made ready, many kernels at a time, by the time this ends.

    A kernel takes half a second, mostly outside Python's lock, and a model needs some twenty.
    """
    global compiling
    device = torch.cuda.current_device()
    with _Builders(initializer=torch.cuda.set_device, initargs=(device,)) as pool, triton.AsyncCompileMode(pool):
        compiling = True
        try:
            yield
        finally:
            compiling = False


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
