"""The `martlet` command: finds the command's file, parses its flags and maps errors to exit codes.

Nothing heavy is imported before the flags are known to be right, so --help and a mistyped flag answer at once.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import sys
from collections.abc import Iterator, Sequence

from martlet._version import __version__
from martlet.cli.flags import Command, CommandGroup, HelpAsked, parse, usage
from martlet.errors import MartletError, UsageError, did_you_mean

COMMANDS = {
    "infer": "chat with a model in the terminal, answer one prompt, or run a file of prompts",
    "deploy": "serve a model over HTTP, OpenAI-compatible",
    "sft": "fine-tune a model on examples",
    "rlhf": "fine-tune a model on preferences: dpo, orpo, simpo, cpo or kto",
    "train": "run a recipe: several trainings in order, such as Zephyr's",
    "export": "merge an adapter into its base, quantise, write GGUF, upload",
    "models": "list, show, fetch and remove models",
    "bench": "measure speed and memory against other engines",
    "doctor": "check this machine and say what is missing",
}


ALIASES = {name: ["rlhf", "--rlhf_type", name] for name in ("dpo", "orpo", "simpo", "kto")}  # SWIFT's commands


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line and return its exit code: 0, a MartletError's own, 130 on Ctrl-C, 141 on a closed pipe.

    Any other exception is a bug and keeps its traceback.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    try:
        code = _dispatch(words)
        sys.stdout.flush()
        return code
    except MartletError as error:
        print(f"martlet: error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print(file=sys.stderr)
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # else the interpreter complains when it exits
        return 141


def _dispatch(words: list[str]) -> int:
    if not words or words[0] in ("-h", "--help", "help"):
        print(
            _overview("martlet", f"Martlet {__version__}: fine-tune, accelerate and serve language models.", COMMANDS)
        )
        return 0
    if words[0] in ("--version", "-V"):
        print(f"martlet {__version__}")
        return 0
    words = [*ALIASES.get(words[0], words[:1]), *words[1:]]
    name = _known(words[0], COMMANDS, "martlet")
    command: Command | CommandGroup = importlib.import_module(f"martlet.cli.{name}").COMMAND
    path, words = f"martlet {name}", words[1:]
    if isinstance(command, CommandGroup):
        commands = {sub: c.summary for sub, c in command.commands.items()}
        if not words or words[0] in ("-h", "--help"):
            print(_overview(path, command.summary, commands))
            return 0
        sub = _known(words[0], commands, path)
        command, path, words = command.commands[sub], f"{path} {sub}", words[1:]
    try:
        options = parse(command.options, words, not_yet=command.not_yet)
    except HelpAsked:
        print(usage(path, command.summary, command.options))
        return 0
    with _log_on_stderr() if command.startup_log else contextlib.nullcontext():
        return command.run(options)


def _known(word: str, commands: dict[str, str], path: str) -> str:
    name = word.replace("_", "-")
    if name not in commands:
        what = "flag" if word.startswith("-") else "command"
        raise UsageError(f"unknown {what} {word}.{did_you_mean(name, commands, count=1)} `{path} --help` lists them.")
    return name


def _overview(path: str, summary: str, commands: dict[str, str]) -> str:
    column = max(map(len, commands)) + 4
    lines = [f"usage: {path} COMMAND [flags]", "", summary, "", "Commands:"]
    lines += [f"  {name:{column}}{text}" for name, text in commands.items()]
    return "\n".join([*lines, "", f"`{path} COMMAND --help` shows a command's flags."])


@contextlib.contextmanager
def _log_on_stderr() -> Iterator[None]:
    """What the rooms below say while they start, in plain lines."""
    import logging

    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(message)s"))
    log = logging.getLogger("martlet")
    before = log.level, log.propagate
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    log.propagate = False
    try:
        yield
    finally:
        log.removeHandler(handler)
        log.setLevel(before[0])
        log.propagate = before[1]
