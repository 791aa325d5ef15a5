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
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from martlet.errors import UsageError

LOG = "logging.jsonl"
RUN = re.compile(r"v(\d+)-")
ARGS = ("args.json", "sft_args.json")
SECRET = ("hub_token",)
FULL_DISK = re.compile(
    r"No space left|Not enough free space|PytorchStreamWriter failed|file write failed|\d+ requested and \d+ written"
)
WEIGHTS = ("*.safetensors", "pytorch_model_fsdp*", "global_step*")  # whole, or in the shards of FSDP or DeepSpeed


def new_run(output: Path, model: str, *, suffix: bool) -> Path:
    """A new, empty folder. Raises UsageError when none can be made; without `suffix`, when `output` holds something."""
    try:
        return _new_run(output, model, suffix=suffix)
    except OSError as error:
        raise UsageError(
            f"--output_dir {output}: no folder can be made there: {error.strerror}", param="output_dir"
        ) from error


def _new_run(output: Path, model: str, *, suffix: bool) -> Path:
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
        taken = [int(found[1]) for path in home.iterdir() if (found := RUN.match(path.name))]
        run = home / f"v{max(taken, default=-1) + 1}-{time.strftime('%Y%m%d-%H%M%S')}"
        try:
            run.mkdir()
        except FileExistsError:  # another run was quicker
            continue
        return run


@contextmanager
def gone_when_nothing_came_of_it(run: Path) -> Iterator[None]:
    """Around training into `run`, a folder made for it: what fails before its first line of the log leaves none."""
    try:
        yield
    except BaseException:
        if not (run / LOG).exists():
            shutil.rmtree(run, ignore_errors=True)
            if RUN.match(run.name):
                with suppress(OSError):  # OUTPUT/MODEL holds other runs
                    run.parent.rmdir()
        raise


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
        runs = sorted({one.parent for one in path.glob("*/v*-*/checkpoint-*")}, key=lambda run: run.stat().st_mtime)
        hint = f"; its last run is {runs[-1]}" if runs else ""
        raise UsageError(
            f"{path} is no checkpoint that training can go on from, nor a run that holds one{hint}",
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


def no_room(error: BaseException | None, folder: Path) -> str | None:
    """Why nothing more can be written to `folder`, when that is what an exception, or one that it came of, is about.

    The libraries that write raise their own. None for all other exceptions.
    """
    while error is not None:
        code, text = getattr(error, "errno", None), str(error)
        if code == errno.EFBIG or "File too large" in text:
            return f"files in {folder} may not be as large as what is to be written (ulimit -f)"
        if code in (errno.ENOSPC, errno.EDQUOT) or FULL_DISK.search(text):
            return f"the disk of {folder} is full ({shutil.disk_usage(folder).free / 1e6:.0f} MB free)"
        error = error.__cause__ or error.__context__
    return None


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
