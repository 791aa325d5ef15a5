"""Numbers in e4m3 and their scales: how kernels make them and how they read them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from martlet.kernels.cuda import launch

INTERPRETED = tl.constexpr(launch.INTERPRETED)
PAIR_SCALE = tl.constexpr(256.0)  # what `unpacked` leaves to be multiplied with
LIFT = tl.constexpr(2.0**100)  # for what is multiplied with `unpacked_bf16`, so that products are of a usual size
LIFTED = tl.constexpr(2.0**20)  # what such products are then to be multiplied with


@triton.jit
def unpacked(pairs, dtype: tl.constexpr):
    """(first, second) e4m3 of each int16, over 256: their bits are float16's, but for the exponent's base."""
    if INTERPRETED:
        first = (((pairs & 0x80) << 8) | ((pairs & 0x7F) << 7)).to(tl.int16).to(tl.float16, bitcast=True)
        second = ((pairs & -0x8000) | ((pairs & 0x7F00) >> 1)).to(tl.int16).to(tl.float16, bitcast=True)
    else:  # the same, two pairs at a time
        first, second = tl.inline_asm_elementwise(
            """
            {
            .reg .b32 bits, sign;
            shl.b32 bits, $2, 7;
            and.b32 bits, bits, 0x3F803F80;
            shl.b32 sign, $2, 8;
            and.b32 sign, sign, 0x80008000;
            or.b32 $0, bits, sign;
            shr.u32 bits, $2, 1;
            and.b32 bits, bits, 0x3F803F80;
            and.b32 sign, $2, 0x80008000;
            or.b32 $1, bits, sign;
            }
            """,
            "=r,=r,r",
            [pairs],
            dtype=(tl.float16, tl.float16),
            is_pure=True,
            pack=2,
        )
    return first.to(dtype), second.to(dtype)


@triton.jit
def unpacked_bf16(pairs):
    """(first, second) e4m3 of each int16, times 2 ** -120: their bits are bfloat16's, but for the exponent's base.

    Triton's interpreter, which multiplies no bfloat16, gets the same numbers as float32.
    """
    if INTERPRETED:
        first = (((pairs & 0x80).to(tl.int32) << 24) | ((pairs & 0x7F).to(tl.int32) << 20)).to(tl.float32, bitcast=True)
        second = (((pairs & -0x8000).to(tl.int32) << 16) | ((pairs & 0x7F00).to(tl.int32) << 12)).to(
            tl.float32, bitcast=True
        )
    else:  # the same, two pairs at a time
        first, second = tl.inline_asm_elementwise(
            """
            {
            .reg .b32 bits, sign;
            shl.b32 bits, $2, 4;
            and.b32 bits, bits, 0x07F007F0;
            shl.b32 sign, $2, 8;
            and.b32 sign, sign, 0x80008000;
            or.b32 $0, bits, sign;
            shr.u32 bits, $2, 4;
            and.b32 bits, bits, 0x07F007F0;
            and.b32 sign, $2, 0x80008000;
            or.b32 $1, bits, sign;
            }
            """,
            "=r,=r,r",
            [pairs],
            dtype=(tl.bfloat16, tl.bfloat16),
            is_pure=True,
            pack=2,
        )
    return first, second


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
