"""Running single operations of the native library from numpy, and the same operations in plain numpy."""

from __future__ import annotations

from dataclasses import dataclass, field

import gguf
import numpy as np

from martlet.hub.checkpoint import PackedTensor
from martlet.kernels.cpu import program as c
from martlet.kernels.cpu.library import ISAS, Executor, widest_isa
from martlet.kernels.cpu.program import Format

HERE = ISAS[: ISAS.index(widest_isa()) + 1]  # every instruction set that this machine runs

BLOCK_TYPES = {
    Format.Q4_0: gguf.GGMLQuantizationType.Q4_0,
    Format.Q4_1: gguf.GGMLQuantizationType.Q4_1,
    Format.Q5_0: gguf.GGMLQuantizationType.Q5_0,
    Format.Q5_1: gguf.GGMLQuantizationType.Q5_1,
    Format.Q8_0: gguf.GGMLQuantizationType.Q8_0,
    Format.Q4_K: gguf.GGMLQuantizationType.Q4_K,
    Format.Q5_K: gguf.GGMLQuantizationType.Q5_K,
    Format.Q6_K: gguf.GGMLQuantizationType.Q6_K,
}


INT4_SIZES = {Format.INT4_32: 32, Format.INT4_64: 64, Format.INT4_128: 128}


def random_int4(rng: np.random.Generator, form: Format, rows: int, inputs: int) -> PackedTensor:
    """Blocks of one scale and one zero: float16, uint8, a byte of anything, quants two a byte, low half first."""
    size = INT4_SIZES[form]
    data = rng.integers(0, 256, (rows, inputs // size, 4 + size // 2), dtype=np.uint8)
    data[..., :2] = rng.uniform(-0.02, 0.02, data.shape[:2]).astype(np.float16)[..., None].view(np.uint8)
    data[..., 2] %= 17

    def unpack(raw: np.ndarray) -> np.ndarray:
        blocks = raw.reshape(len(raw), -1, 4 + size // 2)
        scale = np.ascontiguousarray(blocks[..., :2]).view(np.float16).astype(np.float32)
        quants = np.stack([blocks[..., 4:] & 15, blocks[..., 4:] >> 4], -1).reshape(*blocks.shape[:2], size)
        return ((quants.astype(np.float32) - blocks[..., 2:3]) * scale).reshape(len(raw), -1)

    return PackedTensor(form.name.lower(), (rows, inputs), data.reshape(rows, -1), unpack)


def random_blocks(rng: np.random.Generator, form: Format, rows: int, inputs: int) -> PackedTensor:
    """A matrix of random blocks with sane scales. The gguf library has no quantiser for K blocks, so bits are drawn."""
    kind = BLOCK_TYPES[form]
    block, size = gguf.GGML_QUANT_SIZES[kind]
    data = rng.integers(0, 256, (rows, inputs // block, size), dtype=np.uint8)
    halves = {Format.Q6_K: (208,), Format.Q4_0: (0,), Format.Q5_0: (0,), Format.Q8_0: (0,)}.get(form, (0, 2))
    for at in halves:
        scale = rng.uniform(-0.02, 0.02, data.shape[:2]).astype(np.float16)
        data[..., at : at + 2] = scale[..., None].view(np.uint8)
    return PackedTensor(
        form.name.lower(), (rows, inputs), data.reshape(rows, -1), lambda raw: gguf.quants.dequantize(raw, kind)
    )


@dataclass
class Rows:
    """The row state and block tables a batch reads, and its arrays; kept alive here."""

    tokens: np.ndarray
    blocks: np.ndarray
    sampling: np.ndarray
    block_size: int = 16
    keep: list = field(default_factory=list)

    def batch(
        self, rows, start, count, queries=None, top: int = 0
    ) -> tuple[c.Batch, np.ndarray, np.ndarray, np.ndarray]:
        rows, start, count = (np.array(a, np.int32) for a in (rows, start, count))
        queries = np.array(queries if queries is not None else [], c.QUERY)
        answers = np.zeros(len(queries), c.ANSWER)
        ids, values = np.zeros((len(queries), top), np.int32), np.zeros((len(queries), top), np.float32)
        self.keep = [rows, start, count, queries, answers, ids, values]
        batch = c.Batch(
            len(rows), len(queries), rows.ctypes.data, start.ctypes.data, count.ctypes.data, self.tokens.ctypes.data,
            self.tokens.shape[1], self.blocks.ctypes.data, self.blocks.shape[1], self.block_size, top,
            queries.ctypes.data, self.sampling.ctypes.data, answers.ctypes.data, ids.ctypes.data, values.ctypes.data,
        )  # fmt: skip
        return batch, answers, ids, values


def plain_rows(tokens: int) -> Rows:
    """One row of `tokens` tokens, greedy, with its blocks in order."""
    sampling = np.zeros(1, c.SAMPLING)
    sampling["repetition"] = sampling["top_p"] = 1
    blocks = np.arange(-(-tokens // 16), dtype=np.int32)[None]
    return Rows(np.zeros((1, tokens + 1), np.int32), blocks, sampling)


def run_linear(
    executor: Executor, matrix: c.Matrix, x: np.ndarray, outputs: int, y=None, adapters: np.ndarray | None = None, **op
) -> np.ndarray:
    """The product of one LinearOp, float32 [M, outputs]. adapters: int32 [M], the slot of each row's."""
    y = np.zeros((len(x), outputs), np.float32) if y is None else y.copy()
    linear = c.LinearOp(matrix, x.ctypes.data, y=y.ctypes.data, x_stride=x.shape[1], y_stride=outputs, n_out=outputs)
    for name, value in op.items():
        setattr(linear, name, value.ctypes.data if isinstance(value, np.ndarray) else value)
    if adapters is None:
        batch, *_ = plain_rows(len(x)).batch([0], [0], [len(x)])
    else:  # which sequences have, of one token each
        batch, *_ = plain_rows(1).batch([0] * len(x), [0] * len(x), [1] * len(x))
        batch.adapters = adapters.ctypes.data
    executor.run(c.Program([linear]), batch)
    return y


def quantised(x: np.ndarray, group: int, most: int, pairs: bool = False) -> np.ndarray:
    """x [M, K] as the kernels see it: integers up to `most`, with one scale a group. pairs: two neighbours together."""
    padded = np.pad(x, ((0, 0), (0, -x.shape[1] % group))).reshape(len(x), -1, group)
    sizes = np.abs(padded)
    if pairs:
        sizes = sizes[..., ::2] + sizes[..., 1::2]
    largest = sizes.max(-1, keepdims=True)
    inverse = np.divide(np.float32(most), largest, out=np.zeros_like(largest), where=largest > 0)
    q = np.rint(padded * inverse)  # in float32, as there: a tie would round the other way
    return (q * (largest / np.float32(most))).reshape(len(x), -1)[:, : x.shape[1]]


def bf16(x: np.ndarray) -> np.ndarray:
    import ml_dtypes

    return x.astype(ml_dtypes.bfloat16).astype(np.float32)


def as_prepared(x: np.ndarray, form: Format, isa: str) -> np.ndarray:
    """Activations as a linear of this format sees them on an instruction set."""
    if form == Format.F32:
        return x
    if form == Format.BF16:
        return bf16(x)
    if form == Format.INT8:
        if isa == "avx2":
            return quantised(x, 32, 127, pairs=True)
        return quantised(x, 1024, 16256) if isa == "amx" else quantised(x, 64, 127)
    return quantised(x, 32, 16256)
