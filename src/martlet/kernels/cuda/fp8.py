"""Numbers in e4m3 and their scales: how kernels make them and how they read them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from martlet.kernels.cuda import launch

INTERPRETED = tl.constexpr(launch.INTERPRETED)


@triton.jit
def unpacked(pairs):
    """(first, second) e4m3 of each int16, in float16, which holds them exactly."""
    if INTERPRETED:  # from the bits: they are float16's, but for the exponent's base
        first = (((pairs & 0x80) << 8) | ((pairs & 0x7F) << 7)).to(tl.int16).to(tl.float16, bitcast=True) * 256.0
        second = ((pairs & -0x8000) | ((pairs & 0x7F00) >> 1)).to(tl.int16).to(tl.float16, bitcast=True) * 256.0
    else:  # two pairs at a time, their first ones side by side and their second ones
        first, second = tl.inline_asm_elementwise(
            """
            {
            .reg .b32 sorted;
            .reg .b16 firsts, seconds;
            prmt.b32 sorted, $2, 0, 0x3120;
            mov.b32 {firsts, seconds}, sorted;
            cvt.rn.f16x2.e4m3x2 $0, firsts;
            cvt.rn.f16x2.e4m3x2 $1, seconds;
            }
            """,
            "=r,=r,r",
            [pairs],
            dtype=(tl.float16, tl.float16),
            is_pure=True,
            pack=2,
        )
    return first, second


@triton.jit
def log2_of(x):
    """The logarithm to base 2, in one instruction where there is one."""
    if INTERPRETED:
        y = tl.log2(x)
    else:
        y = tl.inline_asm_elementwise("lg2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)
    return y


@triton.jit
def in_units(query):
    """(query / unit, unit) of each row, for products with float8: float16 holds both exactly, and cannot overflow."""
    x = query.to(tl.float32)
    unit = tl.maximum(tl.max(tl.abs(x), 1), 1e-30)
    x = x / unit[:, None]
    if query.dtype != tl.float32:
        x = x.to(tl.float16)
    return x, unit


@triton.jit
def to_three_bits(x):
    """float32 x with the mantissa of e4m3, nearest and ties to even: Triton's interpreter would lose a carry there."""
    bits = x.to(tl.int32, bitcast=True)
    return ((bits + 0x7FFFF + ((bits >> 20) & 1)) & -0x100000).to(tl.float32, bitcast=True)


@dataclass(frozen=True, slots=True)
class Fp8:
    """Rows in e4m3: values float8_e4m3fn [T, K], to be multiplied by scales float32 [T]."""

    values: torch.Tensor
    scales: torch.Tensor


def room_for(count: int, width: int, device: torch.device) -> Fp8:
    values = torch.empty(count, width, dtype=torch.float8_e4m3fn, device=device)
    return Fp8(values, torch.empty(count, dtype=torch.float32, device=device))
