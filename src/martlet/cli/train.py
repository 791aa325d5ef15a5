"""`martlet train`: the steps of a recipe in order, such as Zephyr's dSFT and dDPO."""

from __future__ import annotations

import dataclasses
import importlib
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from martlet.cli import ALIASES
from martlet.cli.flags import Command, flags_of, parse
from martlet.errors import UsageError, did_you_mean
from martlet.flag import flag
from martlet.recipes import recipe as recipes
from martlet.recipes import run as running
from martlet.recipes.recipe import Recipe, Step, Value
from martlet.train import checks


@dataclass(frozen=True)
class TrainOptions:
    """Recipe."""

    recipe: str | None = flag(f"one of {', '.join(recipes.names())}, or a TOML file", None, metavar="NAME|PATH")
    output_dir: str | None = flag(
        "where the runs of its steps go; the same again goes on where it stopped (default: output/RECIPE)",
        None,
        metavar="DIR",
    )
    model: str | None = flag("begin with this model instead of the recipe's", None, metavar="NAME")
    set: tuple[str, ...] = flag(
        "flags to change, of one step (dpo.beta=0.2) or of all (max_steps=10); a list is written a,b, nothing leaves "
        "a flag out",
        (),
        metavar="[STEP.]FLAG=VALUE",
    )
    check: bool = flag("only look at the data of each step", False)
    dry_run: bool = flag("print the commands, and run none", False)


def run(options: TrainOptions) -> int:
    if options.recipe is None:
        known = "".join(f"\n  {name}: {recipes.load(name).about}" for name in recipes.names())
        raise UsageError(f"which recipe? --recipe NAME, or the path of a TOML file. Known are{known}", param="recipe")
    recipe = changed(recipes.load(options.recipe), options.model, options.set)
    output = Path(options.output_dir or f"output/{recipe.name if recipe.name in recipes.names() else 'recipe'}")
    if options.dry_run:
        for words in running.commands(recipe, output, check=options.check):
            print("martlet", shlex.join(words))
        return 0
    if options.check:
        running.check(recipe, output)
        return 0
    print(f"last checkpoint: {running.run(recipe, output)}")
    return 0


def changed(recipe: Recipe, model: str | None, changes: Sequence[str]) -> Recipe:
    """The recipe with `model` and with [STEP.]FLAG=VALUE changes, every flag of every step known to be right.

    Raises UsageError naming the step and the flag.
    """
    given = [_change(text, recipe) for text in changes]
    steps = []
    for step in recipe.steps:
        flags = dict(step.flags)
        for where, name, value in given:
            if where in (None, step.name):
                known = _flags(step)
                if name not in known:
                    if where is None and any(name in _flags(other) for other in recipe.steps):
                        continue
                    raise UsageError(
                        f"--set: {step.command} has no flag --{name}.{did_you_mean(name, known, count=1)}", param="set"
                    )
                own, many = known[name]
                if own in (*recipes.OURS, "model"):
                    raise UsageError(f"--set {own}: `martlet train` says this itself (see --help)", param="set")
                flags.pop(own, None)
                if value:
                    flags[own] = value.split(",") if many else value
        whole = dataclasses.replace(step, flags=flags)
        _parsed(whole)
        whole = dataclasses.replace(whole, flags=recipes.shared_out(whole, running.devices()))
        steps.append(whole)
    return dataclasses.replace(recipe, model=model or recipe.model, steps=tuple(steps))


def _change(text: str, recipe: Recipe) -> tuple[str | None, str, Value]:
    """(step or None, flag, value) of [STEP.]FLAG=VALUE."""
    name, equals, value = text.partition("=")
    where, dot, flag_name = name.rpartition(".")
    if not equals or not flag_name:
        raise UsageError(f"--set wants [STEP.]FLAG=VALUE, got {text!r}", param="set")
    if dot and where not in [step.name for step in recipe.steps]:
        raise UsageError(
            f"--set {text}: {recipe.name} has no step {where!r}, only {', '.join(s.name for s in recipe.steps)}",
            param="set",
        )
    return where or None, flag_name.replace("-", "_"), value


def _command(step: Step) -> tuple[Command, list[str]]:
    name, *more = ALIASES.get(step.command, [step.command])
    return importlib.import_module(f"martlet.cli.{name}").COMMAND, more


def _flags(step: Step) -> dict[str, tuple[str, bool]]:
    """Every name of a flag of the step's command: its own name, and whether it takes a list."""
    command, _ = _command(step)
    return {name: (f.name, f.many) for f in flags_of(command.options) for name in (f.name, *f.aliases)}


def _parsed(step: Step) -> None:
    command, more = _command(step)
    try:
        checks.refuse_values(parse(command.options, [*more, *step.words()], not_yet=command.not_yet))
    except UsageError as error:
        raise UsageError(f"step {step.name}: {error.message}", param=error.param) from error


COMMAND = Command(
    "Run the steps of a recipe in order, each as the command that one could type. What is done is not done again.",
    TrainOptions,
    run,
    startup_log=True,
)
