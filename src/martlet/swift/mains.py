"""SWIFT's entry points: each takes a list of command-line words, an arguments object, or None for sys.argv."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from martlet.cli.deploy import DeployOptions as DeployArguments
from martlet.cli.flags import parse
from martlet.cli.infer import InferOptions as InferArguments
from martlet.errors import UsageError
from martlet.export.arguments import ExportArguments
from martlet.train.arguments import RlhfArguments, SftArguments

__all__ = ["DeployArguments", "ExportArguments", "InferArguments", "RlhfArguments", "SftArguments"]

Words = Sequence[str] | Any | None


def sft_main(args: Words = None) -> dict[str, Any]:
    """Fine-tune; the run's folder, checkpoints, metric and log, by SWIFT's names."""
    return _train("sft", args)


def rlhf_main(args: Words = None) -> dict[str, Any]:
    """Fine-tune on preferences, by `rlhf_type`; returns what sft_main does."""
    return _train("rlhf", args)


def dpo_main(args: Words = None) -> dict[str, Any]:
    return _train("rlhf", args, "--rlhf_type", "dpo")


def orpo_main(args: Words = None) -> dict[str, Any]:
    return _train("rlhf", args, "--rlhf_type", "orpo")


def export_main(args: Words = None) -> str:
    """Export; the path of what was written."""
    from martlet.export.run import export

    return str(export(_options("export", args)))


def merge_lora(args: Words = None, replace_if_exists: bool = False, device_map: str | None = None) -> str:
    """Merge the adapter of `ckpt_dir` into its base; the `-merged` folder.

    args: ExportArguments, InferArguments, or words of the command. device_map: merges are added up on the CPU, so
    nothing but "cpu" or "auto" goes. Raises UsageError.
    """
    from dataclasses import fields, replace

    from martlet.export.arguments import SourceArguments
    from martlet.export.run import export

    if device_map not in (None, "cpu", "auto"):
        raise UsageError(f"device_map {device_map!r}: merges are added up on the CPU", param="device_map")
    options = _options("export", args)
    if not isinstance(options, ExportArguments):
        options = ExportArguments(**{field.name: getattr(options, field.name) for field in fields(SourceArguments)})
    replaces = replace_if_exists or options.replace_if_exists
    return str(export(replace(options, merge_lora=True, replace_if_exists=replaces)))


def merge_lora_main(args: Words = None) -> str:
    return merge_lora(args)


def infer_main(args: Words = None) -> dict[str, Any]:
    """Chat, answer a prompt, or answer the rows of a dataset, which are then the "result"."""
    from martlet.cli import evaluate, infer

    options = _options("infer", args)
    if evaluate.is_asked_for(options) and options.prompt is None and options.result_path is None:
        answers, _ = evaluate.evaluate(options)
    else:
        infer.run(options)
        if options.result_path is None:
            return {"result": []}
        answers = Path(options.result_path).expanduser()
    lines = answers.read_text(encoding="utf-8").splitlines()
    return {"result": [json.loads(line) for line in lines]}


def deploy_main(args: Words = None) -> int:
    """Serve until stopped."""
    return importlib.import_module("martlet.cli.deploy").run(_options("deploy", args))


def _train(command: str, args: Words, *extra: str) -> dict[str, Any]:
    options = _options(command, args, *extra)
    from martlet.train.launch import launch
    from martlet.train.run import as_dict

    return as_dict(launch(options))


def _options(command: str, args: Words, *extra: str) -> Any:
    """The command's options object. extra: words that come last, and so win, also over those of an object."""
    page = importlib.import_module(f"martlet.cli.{command}").COMMAND
    if args is None or isinstance(args, (list, tuple)):
        return parse(page.options, [*(sys.argv[1:] if args is None else args), *extra], not_yet=page.not_yet)
    if extra:
        from dataclasses import replace

        return replace(args, **{extra[0].removeprefix("--"): extra[1]})
    return args
