"""A recipe, step by step: each is the command that one could type, in a process of its own.

OUTPUT/1-sft, OUTPUT/2-dpo, ... are the runs; an adapter that a later step begins with is merged first, into
OUTPUT/1-sft-merged. A run that was stopped goes on where its last complete checkpoint is.
"""

from __future__ import annotations

import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from martlet.errors import MartletError, UsageError
from martlet.recipes.recipe import Progress, Recipe, Step
from martlet.train import checks, layout


def commands(recipe: Recipe, output: Path, *, check: bool = False) -> Iterator[list[str]]:
    """What `run` would start, were nothing done yet. Checkpoints that do not exist yet are called LAST."""
    model = recipe.model
    for step, place in _placed(recipe, output):
        if check:
            yield [step.command, "--model", recipe.model, *step.words(), "--check", "true"]
            continue
        yield [step.command, "--model", model, *step.words(), *_into(place)]
        if step is not recipe.steps[-1]:
            checkpoint, model = place / "checkpoint-LAST", str(_merged(place))
            if step.flags.get("sft_type") == "full":
                model = str(checkpoint)
            else:
                yield ["export", *_merging(checkpoint, place)]


def run(recipe: Recipe, output: Path) -> Path:
    """Do what is not done yet; the last checkpoint. Raises UsageError before, MartletError when a step fails."""
    progress = Progress(output, recipe)
    for step in recipe.steps:
        progress.begun(step)  # a flag that differs is found before hours are spent
    made: tuple[Path, Path] | None = None  # the last step's checkpoint and folder
    for step, place in _placed(recipe, output):
        done = progress.finished(step)
        if done is not None:
            checkpoint = output / done
            _say(f"step {step.name} is done: {checkpoint}")
            if not checkpoint.is_dir():
                raise UsageError(f"{checkpoint}, which step {step.name} made, is gone", param="output_dir")
        else:
            model = _whole(*made) if made else recipe.model
            resume = _resumable(place, begun=progress.begun(step))
            progress.begin(step)
            again = ["--resume_from_checkpoint", str(place)] if resume else []
            _martlet([step.command, "--model", model, *step.words(), *_into(place), *again])
            checkpoint = layout.checkpoints(place)[-1]
            progress.finish(step, str(checkpoint.relative_to(output)))
        made = checkpoint, place
    assert made is not None  # a recipe has a step
    return made[0]


def _whole(checkpoint: Path, place: Path) -> str:
    """What the next step begins with: the checkpoint, or the model that its adapter is merged into."""
    if not (checkpoint / "adapter_config.json").is_file():
        return str(checkpoint)
    _martlet(["export", *_merging(checkpoint, place)])  # which does nothing when that is there already
    return str(_merged(place))


def check(recipe: Recipe, output: Path) -> None:
    """Look at the data of every step, with the model that the first begins with."""
    for words in commands(recipe, output, check=True):
        _martlet(words)


def _placed(recipe: Recipe, output: Path) -> Iterator[tuple[Step, Path]]:
    for number, step in enumerate(recipe.steps, 1):
        yield step, output / f"{number}-{step.name}"


def _into(place: Path) -> list[str]:
    return ["--output_dir", str(place), "--add_output_dir_suffix", "false"]


def _merged(place: Path) -> Path:
    return place.with_name(f"{place.name}-merged")


def _merging(checkpoint: Path, place: Path) -> list[str]:
    return ["--ckpt_dir", str(checkpoint), "--merge_lora", "true", "--output", str(_merged(place))]


def _resumable(place: Path, *, begun: bool) -> bool:
    """Whether there is a checkpoint to go on from. A run of ours that was stopped before its first is removed."""
    if not begun or not place.exists():
        return False
    if layout.checkpoints(place):
        return True
    shutil.rmtree(place)
    return False


def _martlet(words: list[str]) -> None:
    """One command, its output ours; a signal that stops us stops it."""
    _say("$ martlet " + shlex.join(words))
    child = subprocess.Popen([sys.executable, "-m", "martlet", *words])
    before = signal.signal(signal.SIGTERM, lambda *_: child.terminate())
    try:
        code = child.wait()
    except KeyboardInterrupt:  # the terminal has told the child too
        child.wait()
        raise
    finally:
        signal.signal(signal.SIGTERM, before)
        if child.poll() is None:
            child.kill()
    if code:
        why = f"signal {-code}" if code < 0 else f"code {code}"
        raise MartletError(f"martlet {words[0]} ended with {why}; the same `martlet train` goes on from here")


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def devices() -> int:
    """How many processes train, as the launcher of `martlet sft` will read it."""
    return checks.number("NPROC_PER_NODE") * checks.number("NNODES")
