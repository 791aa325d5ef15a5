"""The structs of csrc/cpu/program.hpp and formats.hpp, field for field: a program and a step's batch as C reads them.

Pointers are plain addresses; whoever fills a struct keeps the arrays alive.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from ctypes import c_float, c_int32, c_int64, c_void_p
from enum import IntEnum

import numpy as np

PANEL = 32  # outputs of a panel
MAX_HEAD_DIM = 512


class Format(IntEnum):
    F32 = 0
    BF16 = 1
    INT8 = 2
    Q4_0 = 3
    Q4_1 = 4
    Q5_0 = 5
    Q5_1 = 6
    Q8_0 = 7
    Q4_K = 8
    Q5_K = 9
    Q6_K = 10
    INT4_32 = 11
    INT4_64 = 12
    INT4_128 = 13
    SCREEN = 14  # of a head, made from its panels
    F16 = 32  # only as a source


class Epilogue(IntEnum):
    STORE = 0
    ADD = 1
    ACTIVATE = 2
    MULTIPLY = 3
    GATED = 4


class CacheKind(IntEnum):
    F32 = 0
    BF16 = 1
    INT8 = 2  # with one float32 scale for each token and head

    def bytes_per_token(self, head_dim: int) -> int:
        """Of one head's keys, or of its values."""
        return {CacheKind.F32: 4 * head_dim, CacheKind.BF16: 2 * head_dim, CacheKind.INT8: head_dim + 4}[self]


ACTIVATIONS = {"silu": 0, "gelu_tanh": 1, "gelu": 2, "tanh": 3, "sigmoid": 4, "squared_relu": 5}


class Matrix(ctypes.Structure):
    _fields_ = [("panels", c_void_p), ("format", c_int32), ("n", c_int32), ("k", c_int32), ("reserved", c_int32)]


class EmbedOp(ctypes.Structure):
    KIND = 0
    _fields_ = [
        ("table", Matrix),
        ("y", c_void_p),
        ("y_stride", c_int64),
        ("scale", c_float),
        ("reserved", c_int32),
    ]


class AnglesOp(ctypes.Structure):
    KIND = 1
    _fields_ = [
        ("frequencies", c_void_p),
        ("cosines", c_void_p),
        ("sines", c_void_p),
        ("half", c_int32),
        ("magnitude", c_float),
    ]


class LinearOp(ctypes.Structure):
    KIND = 2
    _fields_ = [
        ("w", Matrix),
        ("x", c_void_p),
        ("norm", c_void_p),
        ("bias", c_void_p),
        ("y", c_void_p),
        ("x_stride", c_int64),
        ("y_stride", c_int64),
        ("eps", c_float),
        ("epilogue", c_int32),
        ("activation", c_int32),
        ("n_out", c_int32),
        ("loras", c_void_p),
        ("order", c_void_p),
    ]


class AttentionOp(ctypes.Structure):
    KIND = 3
    _fields_ = [
        ("qkv", c_void_p),
        ("y", c_void_p),
        ("k_cache", c_void_p),
        ("v_cache", c_void_p),
        ("cosines", c_void_p),
        ("sines", c_void_p),
        ("q_norm", c_void_p),
        ("k_norm", c_void_p),
        ("qkv_stride", c_int64),
        ("y_stride", c_int64),
        ("heads", c_int32),
        ("kv_heads", c_int32),
        ("dim", c_int32),
        ("rotary", c_int32),
        ("interleaved", c_int32),
        ("window", c_int32),
        ("cache", c_int32),
        ("scale", c_float),
        ("eps", c_float),
        ("softcap", c_float),
    ]


class HeadOp(ctypes.Structure):
    KIND = 4
    _fields_ = [
        ("w", Matrix),
        ("x", c_void_p),
        ("norm", c_void_p),
        ("x_stride", c_int64),
        ("eps", c_float),
        ("softcap", c_float),
        ("screen_rows", c_int32),
        ("reserved", c_int32),
        ("screen", c_void_p),
    ]


class NormAddOp(ctypes.Structure):
    KIND = 5
    _fields_ = [
        ("x", c_void_p),
        ("norm", c_void_p),
        ("y", c_void_p),
        ("x_stride", c_int64),
        ("y_stride", c_int64),
        ("n", c_int32),
        ("eps", c_float),
    ]


class RouteOp(ctypes.Structure):
    KIND = 6
    _fields_ = [
        ("ratings", c_void_p),
        ("stride", c_int64),
        ("count", c_int32),
        ("active", c_int32),
        ("renormalise", c_int32),
        ("reserved", c_int32),
    ]


class ExpertsOp(ctypes.Structure):
    KIND = 7
    _fields_ = [("linear", LinearOp), ("experts", c_void_p), ("gather", c_int32), ("reserved", c_int32)]


class CombineOp(ctypes.Structure):
    KIND = 8
    _fields_ = [
        ("pairs", c_void_p),
        ("shared", c_void_p),
        ("gate", c_void_p),
        ("y", c_void_p),
        ("pairs_stride", c_int64),
        ("shared_stride", c_int64),
        ("gate_stride", c_int64),
        ("y_stride", c_int64),
        ("n", c_int32),
        ("add", c_int32),
    ]


class LayerNormOp(ctypes.Structure):
    KIND = 9
    _fields_ = [
        ("x", c_void_p),
        ("norm", c_void_p),
        ("bias", c_void_p),
        ("y", c_void_p),
        ("x_stride", c_int64),
        ("y_stride", c_int64),
        ("n", c_int32),
        ("eps", c_float),
    ]


class ShiftOp(ctypes.Structure):
    KIND = 10
    _fields_ = [
        ("x", c_void_p),
        ("state", c_void_p),
        ("shares", c_void_p),
        ("moved", c_void_p),
        ("y", c_void_p),
        ("x_stride", c_int64),
        ("state_stride", c_int64),
        ("moved_stride", c_int64),
        ("y_stride", c_int64),
        ("n", c_int32),
        ("parts", c_int32),
    ]


class Rows(ctypes.Structure):
    _fields_ = [("x", c_void_p), ("stride", c_int64)]


class RecurOp(ctypes.Structure):
    KIND = 11
    _fields_ = [
        *((name, Rows) for name in ("r", "k", "v", "decay", "gate", "rate", "value", "first")),
        *((name, c_void_p) for name in ("removal", "renewal", "bonus", "norm", "bias", "y", "state")),
        ("y_stride", c_int64),
        ("state_stride", c_int64),
        ("heads", c_int32),
        ("dim", c_int32),
        ("delta", c_int32),
        ("eps", c_float),
    ]


class RememberOp(ctypes.Structure):
    KIND = 12
    _fields_ = [
        ("x", c_void_p),
        ("state", c_void_p),
        ("x_stride", c_int64),
        ("state_stride", c_int64),
        ("n", c_int32),
        ("reserved", c_int32),
    ]


class GateAddOp(ctypes.Structure):
    KIND = 13
    _fields_ = [
        ("x", c_void_p),
        ("gate", c_void_p),
        ("y", c_void_p),
        ("x_stride", c_int64),
        ("gate_stride", c_int64),
        ("y_stride", c_int64),
        ("n", c_int32),
        ("reserved", c_int32),
    ]


class PickOp(ctypes.Structure):
    KIND = 14
    _fields_ = [
        ("x", c_void_p),
        ("mixed", c_void_p),
        ("x_stride", c_int64),
        ("mixed_stride", c_int64),
        ("width", c_int32),
        ("mixed_width", c_int32),
    ]


AttentionOps = AnglesOp | AttentionOp | NormAddOp | RouteOp | ExpertsOp | CombineOp | PickOp
RecurrenceOps = LayerNormOp | ShiftOp | RecurOp | RememberOp | GateAddOp
AnyOp = EmbedOp | LinearOp | HeadOp | AttentionOps | RecurrenceOps


class Op(ctypes.Structure):
    _fields_ = [("kind", c_int64), ("op", c_void_p)]


BEFORE_HEAD = ctypes.CFUNCTYPE(None)


class Batch(ctypes.Structure):
    _fields_ = [
        ("n_seqs", c_int32),
        ("n_queries", c_int32),
        ("rows", c_void_p),
        ("start", c_void_p),
        ("count", c_void_p),
        ("tokens", c_void_p),
        ("tokens_stride", c_int64),
        ("blocks", c_void_p),
        ("blocks_stride", c_int64),
        ("block_size", c_int32),
        ("top_stride", c_int32),
        ("queries", c_void_p),
        ("sampling", c_void_p),
        ("answers", c_void_p),
        ("top_ids", c_void_p),
        ("top_logprobs", c_void_p),
        ("before_head", BEFORE_HEAD),
        ("adapters", c_void_p),
        ("kept", c_void_p),
    ]


LORA = np.dtype([("a", "u8"), ("b", "u8"), ("halves", "u8"), ("rank", "i4"), ("rows", "i4")])
SAMPLING = np.dtype(
    [
        ("seed", "u8"),
        ("bias_ids", "u8"),
        ("biases", "u8"),
        ("allowed_ids", "u8"),
        ("end_ids", "u8"),
        ("mask", "u8"),
        ("n_bias", "i4"),
        ("n_allowed", "i4"),
        ("n_end", "i4"),
        ("prompt_len", "i4"),
        ("min_tokens", "i4"),
        ("top_k", "i4"),
        ("temperature", "f4"),
        ("top_p", "f4"),
        ("min_p", "f4"),
        ("presence", "f4"),
        ("frequency", "f4"),
        ("repetition", "f4"),
    ]
)
QUERY = np.dtype([("token", "i4"), ("row", "i4"), ("target", "i4"), ("top", "i4")])
ANSWER = np.dtype([("token", "i4"), ("rank", "i4"), ("logprob", "f4"), ("reserved", "i4")])


class Program:
    """Operations in the order they run, as one array that C walks."""

    def __init__(self, ops: Sequence[AnyOp]):
        self.ops = list(ops)
        self.array = (Op * len(self.ops))(*(Op(op.KIND, ctypes.addressof(op)) for op in self.ops))

    def __len__(self) -> int:
        return len(self.ops)


def address(array: np.ndarray | None) -> int | None:
    """Where an array's data lies; None, C's null, for None."""
    return None if array is None else array.ctypes.data
