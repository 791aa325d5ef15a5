"""Weights in safetensors files, as views of the mapped files.

Layout: 8 bytes with the length of a JSON header, the header (name -> dtype, shape, [begin, end) in the data), the data.
Headers are checked in full before any tensor is given out.
"""

from __future__ import annotations

import json
import mmap
import struct
from math import prod
from pathlib import Path
from typing import NamedTuple

import numpy as np

from martlet.errors import CheckpointError
from martlet.hub.files import INDEX, missing_weights, weight_map

MAX_HEADER = 100 << 20  # the format's own limit

_DTYPES = {
    "F64": "<f8", "F32": "<f4", "F16": "<f2", "I64": "<i8", "I32": "<i4", "I16": "<i2", "I8": "|i1",
    "U64": "<u8", "U32": "<u4", "U16": "<u2", "U8": "|u1", "BOOL": "|b1",
}  # fmt: skip
_ML_DTYPES = {"BF16": "bfloat16", "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2"}


class _Place(NamedTuple):
    path: Path
    map: mmap.mmap
    dtype: np.dtype
    shape: tuple[int, ...]
    start: int


class SafetensorsCheckpoint:
    """A Checkpoint over the safetensors files of a folder, or over one file."""

    def __init__(self, folder: Path):
        self._places: dict[str, _Place] = {}
        files, promised = _files(folder)
        for file in files:
            for name, place in _read_header(file).items():
                if name in self._places:
                    raise CheckpointError(f"{file}: tensor {name} is in {self._places[name].path.name} too")
                self._places[name] = place
        for name, file in promised.items():
            if name not in self._places or self._places[name].path.name != file:
                raise CheckpointError(f"{folder / file}: tensor {name} is not there, though {INDEX} says so")
        self.folder = folder

    def names(self) -> list[str]:
        return list(self._places)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._places[name].shape

    def where(self, name: str) -> str:
        return str(self._places[name].path if name in self._places else self.folder)

    def tensor(self, name: str) -> np.ndarray:
        """A read-only view of the file (a copy where the file does not align it)."""
        place = self._places.get(name)
        if place is None:
            raise CheckpointError(f"{self.folder}: there is no tensor {name}")
        if prod(place.shape) == 0:
            return np.empty(place.shape, place.dtype)
        view = np.frombuffer(place.map, place.dtype, prod(place.shape), place.start).reshape(place.shape)
        return view if view.flags.aligned else view.copy()

    def close(self) -> None:
        """Forget the files; they are unmapped when the last view of them is gone."""
        self._places = {}


def _files(folder: Path) -> tuple[list[Path], dict[str, str]]:
    """The folder's weight files, and which tensor an index promises in which file."""
    if folder.is_file():
        return [folder], {}
    if (folder / INDEX).is_file():
        if missing := missing_weights(folder):
            raise CheckpointError(f"{folder}: weight files are missing: {', '.join(missing)}")
        promised = weight_map(folder)
        return [folder / name for name in sorted(set(promised.values()))], promised
    if (folder / "model.safetensors").is_file():
        return [folder / "model.safetensors"], {}
    found = sorted(folder.glob("*.safetensors"))
    if not found:
        raise CheckpointError(f"{folder} holds no *.safetensors")
    return found, {}


def _read_header(path: Path) -> dict[str, _Place]:
    try:
        with path.open("rb") as file:
            data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except (OSError, ValueError) as error:  # ValueError: mmap of an empty file
        raise CheckpointError(f"{path}: cannot be read as safetensors: {error}") from error
    size = struct.unpack_from("<Q", data)[0] if len(data) >= 8 else 0
    if not 2 <= size <= min(MAX_HEADER, len(data) - 8):
        raise CheckpointError(
            f"{path}: the header should take {size:,} bytes of a file of {len(data):,}: truncated, corrupt, or not "
            "safetensors"
        )
    try:
        header = json.loads(data[8 : 8 + size])
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: the header is not JSON: {error}") from error
    if not isinstance(header, dict):
        raise CheckpointError(f"{path}: the header is a JSON {type(header).__name__}, not an object")
    header.pop("__metadata__", None)
    base = 8 + size
    return {name: _place(path, data, name, info, base) for name, info in header.items()}


def _place(path: Path, data: mmap.mmap, name: str, info: object, base: int) -> _Place:
    def bad(what: str) -> CheckpointError:
        return CheckpointError(f"{path}: tensor {name}: {what}")

    if not isinstance(info, dict):
        raise bad("its entry in the header is no object")
    shape, offsets, dtype = info.get("shape"), info.get("data_offsets"), _dtype(info.get("dtype"))
    if dtype is None:
        raise bad(f"unknown dtype {info.get('dtype')!r}")
    if not _counts(shape) or len(shape) > 32:
        raise bad(f"bad shape {shape!r}")
    if not _counts(offsets) or len(offsets) != 2:
        raise bad(f"bad data_offsets {offsets!r}")
    begin, end = offsets
    if begin > end or base + end > len(data):
        raise bad(
            f"should lie at bytes {base + begin:,} to {base + end:,}, but the file ends at {len(data):,}: it is "
            "truncated or corrupt; fetch it again"
        )
    if end - begin != prod(shape) * dtype.itemsize:
        raise bad(f"shape {shape} of {info['dtype']} takes {prod(shape) * dtype.itemsize:,} bytes, not {end - begin:,}")
    return _Place(path, data, dtype, tuple(shape), base + begin)


def _counts(value: object) -> bool:
    return isinstance(value, list) and all(type(item) is int and item >= 0 for item in value)


def _dtype(name: object) -> np.dtype | None:
    if not isinstance(name, str):
        return None
    if name in _ML_DTYPES:
        import ml_dtypes

        return np.dtype(getattr(ml_dtypes, _ML_DTYPES[name]))
    return np.dtype(_DTYPES[name]) if name in _DTYPES else None
