"""Small files beside the weights."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from martlet.errors import CheckpointError

INDEX = "model.safetensors.index.json"


def read_json(path: Path, *, missing: dict[str, Any] | None = None) -> dict[str, Any]:
    """A JSON object from a file. CheckpointError when it cannot be read, or is absent and `missing` is None."""
    try:
        value = json.loads(path.read_bytes())
    except FileNotFoundError as error:
        if missing is not None:
            return missing
        raise CheckpointError(f"{path} is missing") from error
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} holds a JSON {type(value).__name__}, not an object")
    return value


def missing_weights(folder: Path) -> list[str]:
    """Weight files that a folder should hold and does not; [INDEX's shards], or ["*.safetensors"] when it has none."""
    if (folder / INDEX).is_file():
        return sorted({name for name in weight_map(folder).values() if not (folder / name).is_file()})
    return [] if next(folder.glob("*.safetensors"), None) else ["*.safetensors"]


def weight_map(folder: Path) -> dict[str, str]:
    """Which file the index says holds each tensor."""
    table = read_json(folder / INDEX).get("weight_map")
    if not isinstance(table, dict) or not table:
        raise CheckpointError(f"{folder / INDEX} has no weight_map")
    for name, file in table.items():
        if not isinstance(file, str) or Path(file).name != file:
            raise CheckpointError(f"{folder / INDEX}: tensor {name} lies in {file!r}, which is no plain file name")
    return table


HEAD = 64 << 10  # bytes at the beginning of a weight file that count for its identity


def fingerprint(model: Path) -> str:
    """Tells a model's weight files as they lie on the disk now from any others, without reading them whole.

    model: a .gguf file or a folder of safetensors. Path, inode, size, times and first bytes of each file count.
    """
    digest = hashlib.sha256()
    for path in [model] if model.is_file() else sorted(model.glob("*.safetensors")):
        path = path.resolve()
        stat = path.stat()
        digest.update(repr((str(path), stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns)).encode())
        with path.open("rb") as file:
            digest.update(file.read(HEAD))
    return digest.hexdigest()
