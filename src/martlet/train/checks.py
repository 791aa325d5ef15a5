"""What cannot work is said before a model is loaded: values out of range, flags that a run has no use for."""

from __future__ import annotations

import importlib.util
import inspect
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from martlet.errors import BackendUnavailable, MartletError, UsageError, did_you_mean
from martlet.flag import refuse_strays
from martlet.train.arguments import RlhfArguments, SftArguments, json_object

AT_LEAST_ONE = (
    *("lora_rank", "batch_size", "eval_batch_size", "gradient_accumulation_steps", "eval_steps", "save_steps"),
    *("logging_steps", "max_prompt_length", "ddp_timeout"),
)
AT_LEAST_ONE_OR_ALL = ("max_steps", "max_length", "train_dataset_sample", "save_total_limit")  # -1: no limit
NOT_NEGATIVE = (
    *("warmup_steps", "weight_decay", "max_grad_norm", "adam_epsilon", "neftune_noise_alpha", "seed", "dataset_seed"),
    *("self_cognition_sample", "val_dataset_sample", "dataloader_num_workers", "desirable_weight"),
    *("undesirable_weight", "simpo_gamma", "cpo_alpha", "rpo_alpha"),
)
ABOVE_ZERO = ("learning_rate", "num_train_epochs", "lora_alpha", "beta")
PARTS = ("lora_dropout", "dataset_test_ratio", "adam_beta1", "adam_beta2", "freeze_parameters_ratio", "label_smoothing")

LOSSES = {  # by TRL's names
    "dpo": (
        *("sigmoid", "hinge", "ipo", "exo_pair", "nca_pair", "robust", "bco_pair", "sppo_hard", "aot", "aot_unpaired"),
        *("apo_zero", "apo_down", "discopop", "sigmoid_norm"),
    ),
    "kto": ("kto", "apo_zero_unpaired"),
    "cpo": ("sigmoid", "hinge", "ipo"),
    "simpo": ("simpo", "alphapo"),
}

RANGES: dict[str, tuple[Callable[[Any], bool], str]] = {
    **dict.fromkeys(AT_LEAST_ONE, (lambda value: value >= 1, "at least 1")),
    **dict.fromkeys(AT_LEAST_ONE_OR_ALL, (lambda value: value >= 1 or value == -1, "at least 1, or -1 for no limit")),
    **dict.fromkeys(NOT_NEGATIVE, (lambda value: value >= 0, "0 or more")),
    **dict.fromkeys(ABOVE_ZERO, (lambda value: value > 0, "above 0")),
    **dict.fromkeys(PARTS, (lambda value: 0 <= value < 1, "from 0 to below 1")),
    "warmup_ratio": (lambda value: 0 <= value <= 1, "from 0 to 1"),
    "quantization_bit": (lambda value: value in (0, 4, 8), "4 or 8"),
}

SHAPE = (
    *("target_modules", "target_regex", "modules_to_save", "lora_rank", "lora_alpha", "lora_dropout", "use_rslora"),
    *("use_dora", "init_lora_weights"),
)
FREEZING = ("freeze_parameters", "freeze_parameters_ratio", "additional_trainable_parameters")
HUB = ("hub_model_id", "hub_private_repo", "hub_token")


def number(variable: str) -> int:
    """A count in the environment, such as NPROC_PER_NODE; 1 where it is not set. Raises UsageError."""
    text = os.environ.get(variable, "1")
    if not text.isdigit() or not int(text):
        raise UsageError(f"{variable} must be a whole number above 0, got {text!r}", param=variable)
    return int(text)


def refuse(arguments: SftArguments) -> None:
    """Raises UsageError naming the flag, and BackendUnavailable for a library that is not here."""
    refuse_values(arguments)
    if arguments.logging_dir is not None:
        try:
            Path(arguments.logging_dir).expanduser().mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UsageError(
                f"--logging_dir {arguments.logging_dir}: no folder can be made there: {error.strerror}",
                param="logging_dir",
            ) from error
    for name, needed, wanted in (
        ("bitsandbytes", arguments.quantization_bit, "quantization_bit"),
        ("deepspeed", arguments.deepspeed, "deepspeed"),
    ):
        if needed and importlib.util.find_spec(name) is None:
            raise BackendUnavailable(f"--{wanted} needs {name}: pip install {name}", param=wanted)


def refuse_values(arguments: SftArguments) -> None:
    """What no machine could run. Raises UsageError naming the flag."""
    for name, (fits, wanted) in RANGES.items():
        value = getattr(arguments, name, None)
        if value is not None and not fits(value):
            raise UsageError(f"--{name} must be {wanted}, got {value}", param=name)
    _belonging(arguments)
    if arguments.push_to_hub and not arguments.hub_model_id:
        raise UsageError("--push_to_hub needs --hub_model_id NAMESPACE/NAME", param="hub_model_id")
    if arguments.packing and arguments.max_length == -1:
        raise UsageError("--packing fills sequences of --max_length tokens; give one", param="max_length")
    if arguments.target_regex:
        try:
            re.compile(arguments.target_regex)
        except re.error as error:
            raise UsageError(
                f"--target_regex {arguments.target_regex!r} is no regular expression: {error}", param="target_regex"
            ) from error


def _belonging(arguments: SftArguments) -> None:
    """Flags that this run would not look at."""
    full = arguments.sft_type == "full"
    kind = arguments.rlhf_type if isinstance(arguments, RlhfArguments) else "sft"
    several = number("WORLD_SIZE") > 1 or number("NPROC_PER_NODE") * number("NNODES") > 1
    about_itself = any(word.startswith("self-cognition") for word in (*arguments.dataset, *arguments.val_dataset))
    rules = (
        ((*SHAPE, "quantization_bit", "adapter"), not full, "--sft_type lora"),
        (SHAPE, not arguments.adapter, "a new adapter; that of --adapter is as it is"),
        (FREEZING, full, "--sft_type full"),
        (("packing",), kind == "sft", "supervised training"),
        (("ref_model_id_or_path", "ref_model_type"), full and kind in ("dpo", "kto"), "dpo and kto of --sft_type full"),
        (("label_smoothing",), kind in ("dpo", "cpo"), "dpo and cpo"),
        (("loss_type",), kind in ("dpo", "simpo", "kto", "cpo"), "dpo, simpo, kto and cpo"),
        (("rpo_alpha",), kind == "dpo", "dpo"),
        (("simpo_gamma",), kind == "simpo", "simpo"),
        (("cpo_alpha",), kind == "cpo", "cpo"),
        (("desirable_weight", "undesirable_weight"), kind == "kto", "kto"),
        (("resume_only_model", "ignore_data_skip"), arguments.resume_from_checkpoint, "--resume_from_checkpoint"),
        (HUB, arguments.push_to_hub, "--push_to_hub"),
        (("fsdp_config",), arguments.fsdp, "--fsdp"),
        (("fsdp", "ddp_backend"), several, "several processes: NPROC_PER_NODE=2 and more"),
        (
            ("model_name", "model_author"),
            about_itself or arguments.self_cognition_sample,
            "self-cognition rows: --self_cognition_sample N",
        ),
    )
    refuse_strays(arguments, rules)


def _loss_type(arguments: SftArguments) -> tuple[str, ...]:
    return (arguments.loss_type,) if isinstance(arguments, RlhfArguments) and arguments.loss_type else ()


def refuse_names(arguments: SftArguments) -> None:
    """What transformers knows by name: optimiser, schedule, reporters. Raises UsageError. Imports transformers."""
    from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK
    from transformers.optimization import TYPE_TO_SCHEDULER_FUNCTION
    from transformers.trainer_utils import SchedulerType
    from transformers.training_args import OptimizerNames

    schedules = [str(kind.value) for kind in SchedulerType]
    for flag, words, known in (
        ("optim", (arguments.optim,), [str(name.value) for name in OptimizerNames]),
        ("lr_scheduler_type", (arguments.lr_scheduler_type,), schedules),
        ("loss_type", _loss_type(arguments), LOSSES.get(getattr(arguments, "rlhf_type", ""), ())),
        ("report_to", arguments.report_to, [*INTEGRATION_TO_CALLBACK, "all", "none"]),
    ):
        for word in words:
            if word not in known:
                raise UsageError(
                    f"--{flag} {word!r} is not one of {', '.join(known)}.{did_you_mean(word, known, count=1)}",
                    param=flag,
                )
    for word in {*arguments.report_to} - {"all", "none"}:
        try:
            INTEGRATION_TO_CALLBACK[word]()
        except (RuntimeError, ImportError) as error:
            raise BackendUnavailable(f"--report_to {word}: {error}", param="report_to") from error
    settings = json_object(arguments.lr_scheduler_kwargs, "lr_scheduler_kwargs") or {}
    takes = inspect.signature(TYPE_TO_SCHEDULER_FUNCTION[SchedulerType(arguments.lr_scheduler_type)]).parameters
    for name in settings:
        if name not in takes:
            own = [one for one in takes if one not in ("optimizer", "num_warmup_steps", "num_training_steps")]
            raise UsageError(
                f"--lr_scheduler_kwargs: {arguments.lr_scheduler_type} has no {name!r}, only {', '.join(own)}",
                param="lr_scheduler_kwargs",
            )


def reach_hub(arguments: SftArguments) -> None:
    """Make the repository that checkpoints go to, where there is none. Raises MartletError for what the hub answers."""
    from huggingface_hub import HfApi

    try:
        HfApi(token=arguments.hub_token).create_repo(
            arguments.hub_model_id, private=arguments.hub_private_repo or None, exist_ok=True
        )
    except Exception as error:  # the library raises what it likes
        raise MartletError(
            f"--push_to_hub: {arguments.hub_model_id} could not be made: {error}", param="push_to_hub"
        ) from error
