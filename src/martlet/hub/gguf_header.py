"""The header of a GGUF file: metadata and the list of tensors, read in milliseconds.

Layout (GGUF v2 and v3, little-endian): magic, version, number of tensors, number of keys; the keys; per tensor a name,
dims (innermost first), a type and an offset; then, aligned to `general.alignment`, the data. Every length and offset is
checked against the file before it is used, so a damaged file ends in a CheckpointError and in nothing else.
"""

from __future__ import annotations

import mmap
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import lru_cache
from math import prod
from pathlib import Path
from struct import Struct, unpack_from
from typing import Any, NamedTuple, TypeVar

import numpy as np

from martlet.errors import CheckpointError
from martlet.hub import gguf_strings

TOKENS = "tokenizer.ggml.tokens"
MAX_DIMS = 4
MAX_ITEMS = 1 << 26  # of a metadata array; the largest real ones are merge lists of about half a million
MAX_DEPTH = 4

_U32, _U64 = Struct("<I").unpack_from, Struct("<Q").unpack_from
_SCALARS = {  # metadata value type -> numpy dtype
    0: "<u1", 1: "<i1", 2: "<u2", 3: "<i2", 4: "<u4", 5: "<i4", 6: "<f4", 7: "?", 10: "<u8", 11: "<i8", 12: "<f8",
}  # fmt: skip
_STRING, _ARRAY = 8, 9
T = TypeVar("T")


class BlockType(NamedTuple):
    """How a tensor type lies in the file: `elements` values in `bytes` bytes."""

    name: str
    elements: int
    bytes: int


BLOCK_TYPES = {
    0: BlockType("f32", 1, 4),
    1: BlockType("f16", 1, 2),
    2: BlockType("q4_0", 32, 18),
    3: BlockType("q4_1", 32, 20),
    6: BlockType("q5_0", 32, 22),
    7: BlockType("q5_1", 32, 24),
    8: BlockType("q8_0", 32, 34),
    10: BlockType("q2_k", 256, 84),
    11: BlockType("q3_k", 256, 110),
    12: BlockType("q4_k", 256, 144),
    13: BlockType("q5_k", 256, 176),
    14: BlockType("q6_k", 256, 210),
    16: BlockType("iq2_xxs", 256, 66),
    17: BlockType("iq2_xs", 256, 74),
    18: BlockType("iq3_xxs", 256, 98),
    19: BlockType("iq1_s", 256, 50),
    20: BlockType("iq4_nl", 32, 18),
    21: BlockType("iq3_s", 256, 110),
    22: BlockType("iq2_s", 256, 82),
    23: BlockType("iq4_xs", 256, 136),
    24: BlockType("i8", 1, 1),
    25: BlockType("i16", 1, 2),
    26: BlockType("i32", 1, 4),
    27: BlockType("i64", 1, 8),
    28: BlockType("f64", 1, 8),
    29: BlockType("iq1_m", 256, 56),
    30: BlockType("bf16", 1, 2),
    34: BlockType("tq1_0", 256, 54),
    35: BlockType("tq2_0", 256, 66),
    39: BlockType("mxfp4", 32, 17),
}


class TensorInfo(NamedTuple):
    """Where a tensor lies. shape: outermost first. start: offset of its bytes from the beginning of the file."""

    type_id: int
    shape: tuple[int, ...]
    start: int
    nbytes: int


@dataclass(frozen=True, slots=True, eq=False)
class GGUFHeader:
    """The opened file. `map` keeps the bytes reachable for as long as a view of them lives.

    metadata: scalars and strings as Python values; arrays as `LazyArray`, read when asked for.
    """

    path: Path
    map: mmap.mmap
    metadata: dict[str, Any]
    tensors: dict[str, TensorInfo]

    def get(self, key: str, default: Any = None) -> Any:
        """A metadata value with arrays read out, or `default`."""
        value = self.metadata.get(key, default)
        return value.read() if isinstance(value, LazyArray) else value

    def items(self, key: str, indices: Iterable[int]) -> list[Any]:
        """Some of an array's items."""
        value = self.metadata[key]
        return value.items(indices) if isinstance(value, LazyArray) else [value[index] for index in indices]

    def pairs(self, key: str) -> list[tuple[str, ...]]:
        """An array of strings, each cut at its first space; [] when it is absent."""
        value = self.metadata.get(key)
        if value is not None and not (isinstance(value, LazyArray) and value.kind == _STRING):
            raise CheckpointError(f"{self.path}: {key} is no list of strings")
        return [] if value is None else value.pairs()

    def is_indexed(self, key: str) -> bool:
        """Whether `items` of an array are read without the others."""
        value = self.metadata.get(key)
        return isinstance(value, LazyArray) and value.places is not None

    def count(self, key: str) -> int:
        """Length of a metadata array, 0 when it is absent or no array; does not read it."""
        value = self.metadata.get(key)
        return value.count if isinstance(value, LazyArray) else 0

    @property
    def architecture(self) -> str:
        return str(self.metadata["general.architecture"])


def read_header(path: Path) -> GGUFHeader:
    """Open and check a GGUF file. Kept until the file changes, since config, tokenizer and weights all ask for it."""
    try:
        stat = path.stat()
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from error
    return _read_header(path, stat.st_mtime_ns, stat.st_size, stat.st_ino)


@lru_cache(maxsize=2)
def _read_header(path: Path, mtime_ns: int, size: int, inode: int) -> GGUFHeader:
    try:
        with path.open("rb") as file:
            data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except (OSError, ValueError) as error:  # ValueError: mmap of an empty file
        raise CheckpointError(f"{path}: cannot be read as GGUF: {error}") from error
    cursor = _Cursor(path, data)
    if cursor.take(4, "magic") != b"GGUF":
        raise CheckpointError(f"{path} is not a GGUF file: it begins with {data[:4]!r}, not b'GGUF'")
    version = cursor.u32("version")
    if version not in (2, 3):
        big = version in (2 << 24, 3 << 24)
        raise CheckpointError(
            f"{path}: {'big-endian GGUF' if big else f'GGUF version {version}'} is not supported; versions 2 and 3 are"
        )
    tensor_count = cursor.count("number of tensors", smallest=24)
    key_count = cursor.count("number of metadata keys", smallest=13)
    metadata: dict[str, Any] = {}
    for index in range(key_count):
        key = cursor.string(f"metadata key {index}")
        metadata[key] = cursor.value(cursor.u32(key), key)
    if not isinstance(metadata.get("general.architecture"), str):
        raise CheckpointError(f"{path}: metadata has no general.architecture, so the kind of model is unknown")
    alignment = metadata.get("general.alignment", 32)
    if not isinstance(alignment, int) or not 1 <= alignment <= 1 << 20 or alignment & (alignment - 1):
        raise CheckpointError(f"{path}: general.alignment is {alignment!r}, not a power of two")
    listed = [cursor.tensor(index) for index in range(tensor_count)]
    return GGUFHeader(path, data, metadata, _place(path, listed, -(-cursor.at // alignment) * alignment, len(data)))


def _place(
    path: Path, listed: list[tuple[str, int, tuple[int, ...], int]], base: int, end: int
) -> dict[str, TensorInfo]:
    """Turn offsets into file positions and check that every tensor's bytes are there."""
    tensors: dict[str, TensorInfo] = {}
    for name, type_id, shape, offset in listed:
        if name in tensors:
            raise CheckpointError(f"{path}: tensor {name} is listed twice")
        kind = BLOCK_TYPES.get(type_id)
        if kind is None:
            raise CheckpointError(f"{path}: tensor {name} has unknown type {type_id}")
        if shape[-1] % kind.elements:
            raise CheckpointError(f"{path}: tensor {name}: rows of {shape[-1]} do not divide into {kind.name} blocks")
        nbytes = prod(shape) // kind.elements * kind.bytes
        start = base + offset
        if start + nbytes > end:
            raise CheckpointError(
                f"{path}: tensor {name} should lie at bytes {start:,} to {start + nbytes:,}, but the file ends at "
                f"{end:,}: it is truncated or corrupt; fetch it again"
            )
        tensors[name] = TensorInfo(type_id, shape, start, nbytes)
    return tensors


@dataclass(frozen=True, slots=True, eq=False)
class LazyArray:
    """A metadata array that stays in the file until `read`: vocabularies are large and often not needed.

    places: of strings, what gguf_strings.find found.
    """

    cursor: _Cursor
    key: str
    kind: int
    count: int
    start: int
    places: np.ndarray | None = None

    def read(self) -> np.ndarray | list[Any]:
        """Numbers as a numpy array, strings as a list of str."""
        cursor = _Cursor(self.cursor.path, self.cursor.data, self.start)
        if dtype := _SCALARS.get(self.kind):
            return np.frombuffer(cursor.data, dtype, self.count, self.start)
        if self.kind == _STRING:
            found = None if self.places is None else cursor.text(gguf_strings.cut, self.places, self.key)
            return cursor.strings(self.count, self.key) if found is None else found
        items = [cursor.value(self.kind, self.key) for _ in range(self.count)]
        return [item.read() if isinstance(item, LazyArray) else item for item in items]

    def items(self, indices: Iterable[int]) -> list[Any]:
        """Some of the items, the rest unread where it is known where they lie."""
        if self.places is None:
            items = self.read()
            return [items[index] for index in indices]
        return [_Cursor(self.cursor.path, self.cursor.data, int(self.places[i])).string(self.key) for i in indices]

    def pairs(self) -> list[tuple[str, ...]]:
        """Strings, each cut at its first space."""
        places = self.places
        found = None if places is None else self.cursor.text(gguf_strings.cut_in_two, places, self.key)
        return [tuple(text.split(" ", 1)) for text in self.read()] if found is None else found


class _Cursor:
    """A place in the file that never runs past its end."""

    def __init__(self, path: Path, data: mmap.mmap, at: int = 0):
        self.path, self.data, self.at, self.end = path, data, at, len(data)

    def fail(self, what: str) -> CheckpointError:
        return CheckpointError(
            f"{self.path}: the header breaks off at byte {self.at:,} of {self.end:,}, at {what}: "
            "the file is truncated or corrupt; fetch it again"
        )

    def need(self, size: int, what: str) -> int:
        start = self.at
        if size > self.end - start:
            raise self.fail(what)
        self.at = start + size
        return start

    def take(self, size: int, what: str) -> bytes:
        start = self.need(size, what)
        return self.data[start : start + size]

    def u32(self, what: str) -> int:
        return _U32(self.data, self.need(4, what))[0]

    def u64(self, what: str) -> int:
        return _U64(self.data, self.need(8, what))[0]

    def count(self, what: str, *, smallest: int) -> int:
        """A number of items of at least `smallest` bytes each, which must fit into what is left of the file."""
        count = self.u64(what)
        if count > MAX_ITEMS or count * smallest > self.end - self.at:
            raise self.fail(f"{what} ({count:,})")
        return count

    def string(self, what: str) -> str:
        raw = self.take(self.u64(what), what)
        try:
            return raw.decode()
        except UnicodeDecodeError as error:
            raise self.fail(f"{what} (not UTF-8)") from error

    def text(self, cut: Callable[[mmap.mmap, np.ndarray], T], places: np.ndarray, what: str) -> T:
        try:
            return cut(self.data, places)
        except UnicodeDecodeError as error:
            raise self.fail(f"{what} (not UTF-8)") from error

    def strings(self, count: int, what: str) -> list[str]:
        at, data, found = self.at, self.data, []
        for _ in range(count):  # lengths were checked by skip_strings
            size = _U64(data, at)[0]
            found.append(data[at + 8 : at + 8 + size])
            at += 8 + size
        self.at = at
        try:
            return [raw.decode() for raw in found]
        except UnicodeDecodeError as error:
            raise self.fail(f"{what} (not UTF-8)") from error

    def skip_strings(self, count: int, what: str) -> None:
        at, last, data = self.at, self.end - 8, self.data
        for _ in range(count):
            if at > last:
                raise self.fail(what)
            at += 8 + _U64(data, at)[0]
        if at > self.end:
            raise self.fail(what)
        self.at = at

    def value(self, kind: int, key: str, depth: int = 0) -> Any:
        if dtype := _SCALARS.get(kind):
            number = np.frombuffer(self.take(np.dtype(dtype).itemsize, key), dtype)[0]
            return float(str(number)) if kind == 6 else number.item()  # float32 0.00001 reads as 1e-05
        if kind == _STRING:
            return self.string(key)
        if kind != _ARRAY or depth > MAX_DEPTH:
            raise self.fail(f"{key} (unknown value type {kind})")
        item_kind = self.u32(key)
        dtype = _SCALARS.get(item_kind)
        size = np.dtype(dtype).itemsize if dtype else 8
        count = self.count(key, smallest=size)
        start, places = self.at, None
        if dtype:
            self.need(count * size, key)
        elif item_kind == _STRING:
            places = gguf_strings.find(self.data, start, count)
            if places is None:
                self.skip_strings(count, key)
            else:
                self.at = int(places[-1])
        else:
            for _ in range(count):
                self.value(item_kind, key, depth + 1)
        return LazyArray(self, key, item_kind, count, start, places)

    def tensor(self, index: int) -> tuple[str, int, tuple[int, ...], int]:
        name = self.string(f"name of tensor {index}")
        rank = self.u32(f"tensor {name}")
        if not 1 <= rank <= MAX_DIMS:
            raise self.fail(f"tensor {name} ({rank} dimensions)")
        *dims, type_id, offset = unpack_from(f"<{rank}QIQ", self.data, self.need(8 * rank + 12, f"tensor {name}"))
        shape = tuple(reversed(dims))
        if not all(shape):
            raise self.fail(f"tensor {name} (shape {shape})")
        return name, type_id, shape, offset
