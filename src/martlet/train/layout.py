"""Where a run's files go: OUTPUT/MODEL/vN-TIME/checkpoint-STEP, as SWIFT lays them out.

A run holds args.json (also sft_args.json, its name in SWIFT 2), logging.jsonl, images/ and runs/ (TensorBoard); each
checkpoint holds the arguments too, so that it can be served, merged or continued without being told of its model.
"""

from __future__ import annotations

import dataclasses
import errno
import json
import re
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from martlet.errors import UsageError

ARGS = ("args.json", "sft_args.json")
SECRET = ("hub_token",)
FULL_DISK = re.compile(r"No space left|PytorchStreamWriter failed|file write failed|\d+ requested and \d+ written")
WEIGHTS = ("*.safetensors", "pytorch_model_fsdp*", "global_step*")  # whole, or in the shards of FSDP or DeepSpeed


def new_run(output: Path, model: str, *, suffix: bool) -> Path:
    """A new, empty folder. Raises UsageError when `suffix` is off and the folder holds something."""
    if not suffix:
        if output.exists() and (not output.is_dir() or any(output.iterdir())):
            raise UsageError(
                f"--output_dir {output} is not empty; give another, or go on from one of its checkpoints with "
                "--resume_from_checkpoint",
                param="output_dir",
            )
        output.mkdir(parents=True, exist_ok=True)
        return output
    home = output / model
    home.mkdir(parents=True, exist_ok=True)
    while True:
        taken = [int(found[1]) for path in home.iterdir() if (found := re.match(r"v(\d+)-", path.name))]
        run = home / f"v{max(taken, default=-1) + 1}-{time.strftime('%Y%m%d-%H%M%S')}"
        try:
            run.mkdir()
        except FileExistsError:  # another run was quicker
            continue
        return run


def checkpoints(run: Path) -> list[Path]:
    """The complete checkpoints of a run, oldest first."""
    found = [(int(match[1]), path) for path in run.iterdir() if (match := re.fullmatch(r"checkpoint-(\d+)", path.name))]
    return [path for _, path in sorted(found) if is_whole(path)]


def is_whole(checkpoint: Path) -> bool:
    """Whether nothing of it is missing: trainer_state.json is what is written last, and may itself be cut off."""
    try:
        json.loads((checkpoint / "trainer_state.json").read_text("utf-8"))
    except (OSError, ValueError):
        return False
    return any(any(checkpoint.glob(weights)) for weights in WEIGHTS)


def find_checkpoint(path: Path) -> Path:
    """The checkpoint at `path`: itself, or the last complete one of a run. Raises UsageError."""
    if path.name.startswith("checkpoint-") and is_whole(path):
        return path
    found = checkpoints(path) if path.is_dir() else []
    if not found:
        raise UsageError(
            f"{path} is no checkpoint that training can go on from, nor a run that holds one",
            param="resume_from_checkpoint",
        )
    return found[-1]


def remove_incomplete(run: Path) -> list[str]:
    """Drop checkpoints whose writing was cut off; returns their names."""
    whole = set(checkpoints(run))
    broken = [path for path in run.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", path.name)]
    broken = [path for path in broken if path not in whole]
    for path in broken:
        shutil.rmtree(path, ignore_errors=True)
    return sorted(path.name for path in broken)


def disk_is_full(error: BaseException | None) -> bool:
    """Whether an exception, or one that it came of, is about a full disk; the libraries that write raise their own."""
    while error is not None:
        if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT):
            return True
        if FULL_DISK.search(str(error)):
            return True
        error = error.__cause__ or error.__context__
    return False


def write_args(folder: Path, arguments: Any, extra: Mapping[str, Any]) -> None:
    """The arguments of a run, with what `extra` adds, under both names."""
    values = {**dataclasses.asdict(arguments), **extra}
    values |= {name: None for name in SECRET if name in values}
    text = json.dumps(values, ensure_ascii=False, indent=2, default=str) + "\n"
    for name in ARGS:
        (folder / name).write_text(text, encoding="utf-8")


def read_args(folder: Path) -> dict[str, Any]:
    """What a checkpoint, or the run it belongs to, says of its arguments; empty when nobody says."""
    for place in (folder, folder.parent):
        for name in ARGS:
            if (place / name).is_file():
                return json.loads((place / name).read_text(encoding="utf-8"))
    return {}
