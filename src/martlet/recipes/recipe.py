"""A recipe as it stands in its file, and how far a run of it has come.

about = "..."
model = "NAME"              # what the first step begins with; each later one begins with what the last one made
[[steps]]
name = "sft"                # of the step, and of its folder
command = "sft"             # of martlet
rows_per_step = 128         # optional: rows that one step of the optimiser sees, on however many devices
[steps.flags]               # of that command, by name
learning_rate = 2e-5
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from martlet.errors import UsageError, did_you_mean

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

HERE = Path(__file__).parent
STATE = "recipe.json"
COMMANDS = ("sft", "dpo", "orpo", "simpo", "kto")
OURS = ("output_dir", "add_output_dir_suffix", "resume_from_checkpoint", "check")  # what a run of a recipe decides

Value = str | int | float | bool | list[str]


@dataclass(frozen=True, slots=True)
class Step:
    """One training. flags: of its command, by their own names."""

    name: str
    command: str
    flags: Mapping[str, Value]
    rows_per_step: int | None = None

    def words(self) -> list[str]:
        """Its flags as they would be typed."""
        typed = []
        for name, value in self.flags.items():
            items = value if isinstance(value, list) else [value]
            if items:  # a list of nothing is the flag left out
                typed += [f"--{name}", *(str(item).lower() if isinstance(item, bool) else str(item) for item in items)]
        return typed


@dataclass(frozen=True, slots=True)
class Recipe:
    """name: as it is asked for. model: what the first step begins with."""

    name: str
    about: str
    model: str
    steps: tuple[Step, ...]


def names() -> dict[str, Path]:
    """The recipes that come with Martlet: NAME of NAME/recipe.toml, NAME/VARIANT of other files there."""
    found = {}
    for path in sorted(HERE.glob("*/*.toml")):
        found[path.parent.name if path.stem == "recipe" else f"{path.parent.name}/{path.stem}"] = path
    return found


def load(name: str) -> Recipe:
    """The recipe called `name`, or in the file or folder of that path. Raises UsageError saying what is wrong where."""
    path = names().get(name)
    if path is None:
        path = Path(name).expanduser()
        path = path / "recipe.toml" if path.is_dir() else path
        if not path.is_file():
            known = names()
            raise UsageError(
                f"recipe {name!r} is neither a file nor one of {', '.join(known)}.{did_you_mean(name, known)}",
                param="recipe",
            )
    try:
        with open(path, "rb") as file:
            table = tomllib.load(file)
    except tomllib.TOMLDecodeError as error:
        raise UsageError(f"recipe {path}: {error}", param="recipe") from error
    return _recipe(name, path, table)


def _recipe(name: str, path: Path, table: Mapping[str, Any]) -> Recipe:
    def wrong(what: str) -> UsageError:
        return UsageError(f"recipe {path}: {what}", param="recipe")

    for key, kind in (("model", str), ("steps", list)):
        if not isinstance(table.get(key), kind) or not table[key]:
            raise wrong(f"{key} is missing")
    steps = []
    for at, one in enumerate(table["steps"]):
        unknown = set(one) - {"name", "command", "rows_per_step", "flags"}
        if unknown:
            raise wrong(f"steps[{at}] has {', '.join(sorted(unknown))}, which no step has")
        if one.get("command") not in COMMANDS:
            raise wrong(f"steps[{at}].command must be one of {', '.join(COMMANDS)}, got {one.get('command')!r}")
        label, rows = one.get("name", one["command"]), one.get("rows_per_step")
        if rows is not None and (not isinstance(rows, int) or rows < 1):
            raise wrong(f"steps[{at}].rows_per_step must be a whole number above 0, got {rows!r}")
        if any(step.name == label for step in steps):
            raise wrong(f"two steps are called {label!r}")
        for flag in (*OURS, "model"):
            if flag in one.get("flags", {}):
                raise wrong(f"steps[{at}].flags.{flag} is not a recipe's to say")
        steps.append(Step(label, one["command"], dict(one.get("flags", {})), rows))
    return Recipe(name, str(table.get("about", "")), table["model"], tuple(steps))


def shared_out(step: Step, devices: int) -> dict[str, Value]:
    """The step's flags with as much accumulation as gives `rows_per_step` on so many devices. Raises UsageError."""
    flags = dict(step.flags)
    if step.rows_per_step is None or flags.get("gradient_accumulation_steps") is not None:
        return flags
    rows = int(flags.get("batch_size", 1)) * devices
    if step.rows_per_step % rows:
        raise UsageError(
            f"step {step.name}: {step.rows_per_step} rows a step are not a multiple of --batch_size "
            f"{flags.get('batch_size', 1)} on {devices} devices; --set {step.name}.batch_size=N, or say "
            f"{step.name}.gradient_accumulation_steps=N to change how many rows a step has",
            param="set",
        )
    return {**flags, "gradient_accumulation_steps": step.rows_per_step // rows}


class Progress:
    """What is done of a run, in OUTPUT/recipe.json, which is replaced whole after each change.

    A step is told apart by its flags: one that was begun or finished with other flags is an error, never run silently
    with half of each.
    """

    def __init__(self, output: Path, recipe: Recipe):
        self.file = output / STATE
        self.steps: dict[str, dict[str, Any]] = {}
        self.recipe = recipe
        if self.file.is_file():
            state = json.loads(self.file.read_text("utf-8"))
            if state.get("recipe") != recipe.name or state.get("model") != recipe.model:
                raise UsageError(
                    f"{output} holds a run of {state.get('recipe')!r} on {state.get('model')!r}, not of "
                    f"{recipe.name!r} on {recipe.model!r}; give another --output_dir",
                    param="output_dir",
                )
            self.steps = state["steps"]

    def finished(self, step: Step) -> str | None:
        """The checkpoint, relative to the output, that the step ended with; None when it has not. Raises UsageError."""
        return self._known(step).get("checkpoint")

    def begun(self, step: Step) -> bool:
        return bool(self._known(step))

    def begin(self, step: Step) -> None:
        self._write(step, None)

    def finish(self, step: Step, checkpoint: str) -> None:
        self._write(step, checkpoint)

    def _known(self, step: Step) -> dict[str, Any]:
        known = self.steps.get(step.name, {})
        before = known.get("flags", {})
        for flag in {**before, **step.flags} if known else ():
            if flag == "gradient_accumulation_steps" and step.rows_per_step:
                continue  # follows from how many devices there are today
            if str(before.get(flag)) != str(step.flags.get(flag)):
                raise UsageError(
                    f"step {step.name} in {self.file.parent} has {flag} = {before.get(flag)!r}, and is now asked for "
                    f"with {step.flags.get(flag)!r}; give another --output_dir, or the same flags",
                    param="set",
                )
        return known

    def _write(self, step: Step, checkpoint: str | None) -> None:
        self.steps[step.name] = {"flags": dict(step.flags), "checkpoint": checkpoint}
        text = json.dumps({"recipe": self.recipe.name, "model": self.recipe.model, "steps": self.steps}, indent=2)
        self.file.parent.mkdir(parents=True, exist_ok=True)
        beside = self.file.with_suffix(".tmp")
        beside.write_text(text + "\n", encoding="utf-8")
        os.replace(beside, self.file)
