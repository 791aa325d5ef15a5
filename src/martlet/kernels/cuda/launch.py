"""How kernels are launched: overlapped with their predecessor where the GPU can (programmatic dependent launch).

A step at batch 1 is some 170 kernels of 1 to 3 us, so the gaps between them would cost as much as the work. A kernel
launched this way starts while its predecessor drains: it asks for its weights, then waits for the predecessor's
results. The rule every kernel keeps: all its programs call `wait` before they read or write anything that a kernel of
the step may write, also programs that have nothing to do, because the wait of the next kernel covers only this one.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import triton
import triton.language as tl
from triton.language.extra import cuda as tl_cuda

INTERPRETED = bool(triton.knobs.runtime.interpret)
overlap = True  # the benchmark switches it off to see what it gives


@triton.jit
def wait(PDL: tl.constexpr):
    """Let the next kernel start, then wait until the previous one is done and its writes can be seen."""
    if PDL:
        tl_cuda.gdc_launch_dependents()
        tl_cuda.gdc_wait()


@triton.jit
def prefetch(pointers, PDL: tl.constexpr):
    """Ask for the 128-byte lines at `pointers` to be brought into L2; nothing waits for them."""
    if PDL:
        tl.inline_asm_elementwise(
            "prefetch.global.L2 [$1]; mov.u32 $0, 0;",
            "=r,l",
            [pointers.to(tl.int64)],
            dtype=tl.int32,
            is_pure=False,
            pack=1,
        )


def options(num_warps: int = 4, num_stages: int = 3) -> dict[str, Any]:
    """Launch options of a kernel with a PDL parameter."""
    pdl = overlap and not INTERPRETED and _has_overlap()
    base: dict[str, Any] = {"PDL": pdl, "num_warps": num_warps, "num_stages": num_stages}
    return {**base, "launch_pdl": True} if pdl else base


@functools.cache
def _has_overlap() -> bool:
    return torch.cuda.get_device_capability()[0] >= 9


@functools.cache
def num_sms() -> int:
    """Multiprocessors of the GPU; 4 under the interpreter, so that the paths that split work are walked."""
    return 4 if INTERPRETED else torch.cuda.get_device_properties("cuda").multi_processor_count
