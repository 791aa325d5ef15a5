"""Weights in a GGUF file (or in the parts of a split one), as views of the mapped file.

Quantised tensors come as PackedTensor, blocks untouched; they are unpacked by the tables of the `gguf` library.

**Rotary layout.** Converters store the q and k rows of the `llama` architecture in another order than Hugging Face
does: within a head, row 2i + j of the file is row j * head_dim / 2 + i of the original (see `INTERLEAVED_QK`). This
reader gives rows as they lie; the family page puts them back.
"""

from __future__ import annotations

import re
from functools import partial
from pathlib import Path

import numpy as np

from martlet.errors import CheckpointError
from martlet.hub.checkpoint import PackedTensor, Tensor
from martlet.hub.gguf_header import BLOCK_TYPES, GGUFHeader, TensorInfo, read_header

INTERLEAVED_QK = frozenset({"llama"})
"""GGUF architectures whose attn_q and attn_k rows are permuted for rotary over adjacent pairs (2i, 2i + 1)."""

_PLAIN = {"f32": "<f4", "f16": "<f2", "f64": "<f8", "i8": "<i1", "i16": "<i2", "i32": "<i4", "i64": "<i8"}


class GGUFCheckpoint:
    """A Checkpoint over one GGUF file, or over all parts `NAME-00001-of-0000N.gguf` of a split one."""

    def __init__(self, path: Path):
        self.header = read_header(path)
        self._tensors: dict[str, tuple[GGUFHeader, TensorInfo]] = {}
        for part in self._parts(path):
            for name, info in part.tensors.items():
                if name in self._tensors:
                    raise CheckpointError(f"{part.path}: tensor {name} is in another part too")
                self._tensors[name] = part, info

    def _parts(self, path: Path) -> list[GGUFHeader]:
        count = self.header.get("split.count", 0)
        if not isinstance(count, int) or count <= 1:
            return [self.header]
        match = re.fullmatch(r"(.+)-\d{5}-of-(\d{5})\.gguf", path.name)
        if match is None or int(match[2]) != count:
            raise CheckpointError(f"{path} is one of {count} parts, but its name is not NAME-00001-of-{count:05}.gguf")
        names = [path.with_name(f"{match[1]}-{i:05}-of-{count:05}.gguf") for i in range(1, count + 1)]
        if missing := [part.name for part in names if not part.exists()]:
            raise CheckpointError(f"{path.parent}: the model has {count} parts and these are missing: {missing}")
        return [read_header(part) for part in names]

    @property
    def interleaved_qk(self) -> bool:
        """Whether q and k rows are in the order of `INTERLEAVED_QK`."""
        return self.header.architecture in INTERLEAVED_QK

    def names(self) -> list[str]:
        return list(self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._tensors[name][1].shape

    def where(self, name: str) -> str:
        return str(self._tensors[name][0].path if name in self._tensors else self.header.path)

    def tensor(self, name: str) -> Tensor:
        """A numpy view for plain types; a PackedTensor for quantised matrices; quantised vectors come unpacked."""
        if name not in self._tensors:
            raise CheckpointError(f"{self.header.path}: there is no tensor {name}")
        header, info = self._tensors[name]
        kind = BLOCK_TYPES[info.type_id]
        if kind.name == "bf16":
            import ml_dtypes

            return np.frombuffer(header.map, ml_dtypes.bfloat16, info.nbytes // 2, info.start).reshape(info.shape)
        if dtype := _PLAIN.get(kind.name):
            return np.frombuffer(header.map, dtype, info.nbytes // kind.bytes, info.start).reshape(info.shape)
        row_bytes = info.shape[-1] // kind.elements * kind.bytes
        data = np.frombuffer(header.map, np.uint8, info.nbytes, info.start).reshape(*info.shape[:-1], row_bytes)
        packed = PackedTensor(kind.name, info.shape, data, partial(unpack, info.type_id), block=kind.elements)
        return packed.dequantise() if len(info.shape) == 1 else packed

    def close(self) -> None:
        """Forget the file; it is unmapped when the last view of it is gone."""
        self._tensors = {}


def unpack(type_id: int, data: np.ndarray) -> np.ndarray:
    """Blocks of a GGML type, uint8 [..., bytes per row], as float32 [..., elements per row]."""
    from gguf.constants import GGMLQuantizationType
    from gguf.quants import dequantize

    return dequantize(data, GGMLQuantizationType(type_id))
