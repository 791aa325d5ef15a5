"""What `martlet sft` and `martlet rlhf` may be told: SWIFT 2.x's flags, one field each, with SWIFT's defaults.

None means that the value follows from others; `resolved` in martlet.train.run fills it in and the run's args.json
tells what it became. Flags of SWIFT that are not here are refused by name (martlet.cli.swift_flags).
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from typing import Any

from martlet.errors import UsageError
from martlet.flag import flag


@dataclass(frozen=True)
class DataArguments:
    """Data."""

    dataset: tuple[str, ...] = flag(
        "[HF::|MS::]NAME|PATH[:SUBSET][#ROWS]: a named dataset, a json, jsonl, csv or parquet file, or a repository",
        (),
        metavar="DATASET",
        commas=True,
        aliases=("custom_train_dataset_path",),
    )
    val_dataset: tuple[str, ...] = flag(
        "rows to evaluate on (default: a part of --dataset)",
        (),
        metavar="DATASET",
        commas=True,
        aliases=("custom_val_dataset_path",),
    )
    dataset_test_ratio: float = flag("part of the rows to evaluate on, where no --val_dataset is given", 0.01)
    dataset_seed: int | None = flag("of sampling and splitting (default: --seed)", None)
    train_dataset_sample: int = flag("most rows to train on; -1 for all", -1)
    val_dataset_sample: int | None = flag("most rows to evaluate on", None)
    self_cognition_sample: int = flag("rows about who the model is, to add; see --model_name", 0)
    model_name: tuple[str, ...] = flag("what self-cognition rows call the model: in Chinese, in English", ())
    model_author: tuple[str, ...] = flag("and its maker", ())
    columns: str | None = flag('renames, such as {"frage": "query"}', None, metavar="JSON")
    custom_dataset_info: str | None = flag("a JSON file of further named datasets", None, metavar="PATH")
    max_length: int = flag("most tokens of a row; -1 for no limit", 2048)
    truncation_strategy: str = flag(
        "what becomes of longer rows: left out, or cut at their beginning or end",
        "delete",
        choices=("delete", "truncation_left", "truncation_right"),
    )
    check_dataset_strategy: str = flag(
        "error stops at the first bad row; else bad rows are left out and reported",
        "none",
        choices=("none", "discard", "warning", "error"),
    )
    packing: bool = flag("put several rows into one sequence of --max_length tokens", False)
    system: str | None = flag("system text of conversations that bring none", None)
    check: bool = flag("only look at the data: what is left out, lengths, one row as the model sees it", False)

    @property
    def longest(self) -> int:
        """--max_length as a number that rows can be compared with."""
        return sys.maxsize if self.max_length == -1 else self.max_length


@dataclass(frozen=True)
class TunerArguments:
    """What is trained."""

    sft_type: str = flag("lora trains an adapter, full the model itself", "lora", choices=("lora", "full"))
    target_modules: tuple[str, ...] = flag(
        "linear layers that get an adapter: DEFAULT (the model's own list), ALL, or their names",
        ("DEFAULT",),
        metavar="NAME",
        aliases=("lora_target_modules",),
    )
    target_regex: str | None = flag(
        "instead, a regular expression over module names", None, aliases=("lora_target_regex",)
    )
    modules_to_save: tuple[str, ...] = flag(
        "modules to train whole, beside the adapter", (), metavar="NAME", aliases=("lora_modules_to_save",)
    )
    lora_rank: int = flag("rank of the adapter", 8)
    lora_alpha: float = flag("its scale is alpha / rank (with rslora alpha / sqrt(rank))", 32)
    lora_dropout: float = flag("share of its inputs that are dropped", 0.05, aliases=("lora_dropout_p",))
    use_rslora: bool = flag("rank-stabilised scaling", False)
    use_dora: bool = flag("also learn the size of each weight vector", False)
    init_lora_weights: str = flag(
        "how an adapter begins: true and gaussian change nothing at first, false does",
        "true",
        choices=("true", "gaussian", "false"),
    )
    quantization_bit: int = flag("QLoRA: bits of the frozen weights, 4 or 8, by bitsandbytes", 0)
    freeze_parameters: tuple[str, ...] = flag("full: parameters that begin so are not trained", (), metavar="PREFIX")
    freeze_parameters_ratio: float = flag("full: this part of the parameters, from the bottom, is not trained", 0.0)
    additional_trainable_parameters: tuple[str, ...] = flag("full: and these are, after all", (), metavar="PREFIX")


@dataclass(frozen=True)
class OptimiserArguments:
    """Optimisation."""

    learning_rate: float | None = flag("peak rate (default: 1e-4 for adapters, 1e-5 for all weights)", None)
    num_train_epochs: float = flag("times that every row is seen", 1.0)
    max_steps: int = flag("steps to take, over --num_train_epochs; -1 for no limit", -1)
    batch_size: int = flag("rows a device and forward pass", 1, aliases=("per_device_train_batch_size",))
    eval_batch_size: int | None = flag("and when evaluating", None, aliases=("per_device_eval_batch_size",))
    gradient_accumulation_steps: int | None = flag("passes a step (default: as many as make 16 rows a step)", None)
    optim: str = flag("optimiser, by transformers' names", "adamw_torch")
    adam_beta1: float = flag("of Adam", 0.9)
    adam_beta2: float = flag("of Adam", 0.95)
    adam_epsilon: float = flag("of Adam", 1e-8)
    weight_decay: float = flag("of Adam", 0.1)
    max_grad_norm: float = flag("gradients are cut to this norm", 1.0)
    lr_scheduler_type: str = flag("how the rate falls", "cosine")
    lr_scheduler_kwargs: str | None = flag("settings of the scheduler", None, metavar="JSON")
    warmup_ratio: float = flag("part of the steps in which the rate rises", 0.05)
    warmup_steps: int = flag("steps in which it rises, over --warmup_ratio", 0)
    neftune_noise_alpha: float | None = flag("noise on embeddings", None, aliases=("neftune_alpha",))
    gradient_checkpointing: bool | None = flag("compute activations twice to keep fewer (default: on a GPU, yes)", None)
    seed: int = flag("of everything random", 42)
    full_determinism: bool = flag("deterministic kernels, slower", False)


@dataclass(frozen=True)
class RunArguments:
    """The run."""

    output_dir: str = flag("where runs go, as DIR/MODEL/vN-TIME", "output", metavar="DIR")
    add_output_dir_suffix: bool = flag("false writes to --output_dir itself", True)
    resume_from_checkpoint: str | None = flag("go on from this checkpoint, as if never stopped", None, metavar="DIR")
    resume_only_model: bool = flag("take only its weights, and start anew", False)
    ignore_data_skip: bool = flag("go on without skipping the rows already seen", False)
    logging_steps: int = flag("steps between two lines of the log", 5)
    eval_steps: int | None = flag("steps between evaluations (default: 50 for adapters, 200 for all weights)", None)
    save_steps: int | None = flag("steps between checkpoints (default: --eval_steps)", None)
    evaluation_strategy: str = flag(
        "when to evaluate", "steps", choices=("steps", "epoch", "no"), aliases=("eval_strategy",)
    )
    save_strategy: str = flag("when to save", "steps", choices=("steps", "epoch", "no"))
    save_total_limit: int = flag("checkpoints to keep, the best and the last among them; -1 for all", 2)
    save_only_model: bool = flag("checkpoints without the optimiser: smaller, but nothing resumes from them", False)
    logging_dir: str | None = flag("where TensorBoard's files go (default: RUN/runs)", None, metavar="DIR")
    report_to: tuple[str, ...] = flag("who else is told, by transformers' names, or none", ("tensorboard",))
    disable_tqdm: bool = flag("no progress bar", False)
    dataloader_num_workers: int = flag("processes that prepare batches", 0)
    deepspeed: str | None = flag(
        "a configuration of DeepSpeed: a JSON file, default-zero2 or default-zero3", None, metavar="PATH"
    )
    fsdp: str = flag("options of FSDP, as transformers takes them", "")
    fsdp_config: str | None = flag("its configuration", None, metavar="PATH")
    ddp_backend: str | None = flag(
        "what several processes (NPROC_PER_NODE) talk through", None, choices=("nccl", "gloo")
    )
    ddp_timeout: int = flag("seconds that processes wait for one another", 1800)
    push_to_hub: bool = flag("upload checkpoints to the Hugging Face hub", False)
    hub_model_id: str | None = flag("repository to upload to", None, metavar="NAME")
    hub_private_repo: bool = flag("make it a private one", False)
    hub_token: str | None = flag("token of the hub", None)


@dataclass(frozen=True)
class BaseModelArguments:
    """Model."""

    model: str | None = flag(
        "a registered name, a folder or .gguf file, or a source such as hf:NAME", None, metavar="NAME"
    )
    model_type: str | None = flag("a registered model by its SWIFT key, such as llama2-7b-chat", None, metavar="KEY")
    model_id_or_path: str | None = flag("SWIFT's name for --model", None, metavar="PATH")
    model_revision: str | None = flag("branch, tag or commit of a repository", None, metavar="NAME")
    template_type: str | None = flag("chat template to use instead of the model's own", None, metavar="NAME")
    dtype: str = flag(
        "number type of the weights (AUTO: bf16 on a GPU, else fp32)", "AUTO", choices=("AUTO", "bf16", "fp16", "fp32")
    )
    device: str = flag("where to train", "auto", choices=("auto", "cpu", "cuda"))
    adapter: str | None = flag("go on training this adapter", None, metavar="DIR")


@dataclass(frozen=True)
class SftArguments(RunArguments, OptimiserArguments, TunerArguments, DataArguments, BaseModelArguments):
    """Supervised fine-tuning."""


@dataclass(frozen=True)
class RlhfArguments(SftArguments):
    """Preferences."""

    rlhf_type: str = flag("the loss", "dpo", choices=("dpo", "orpo", "simpo", "kto", "cpo"))
    beta: float | None = flag("how far answers may move (default: 0.1; simpo 2.0)", None)
    label_smoothing: float = flag("dpo, cpo: share of pairs assumed to be the wrong way round", 0.0)
    loss_type: str | None = flag("variant of the loss, by TRL's names (default: sigmoid; simpo)", None)
    rpo_alpha: float | None = flag("dpo: weight of the chosen answer's own likelihood (default: none)", None)
    simpo_gamma: float = flag("simpo: margin", 1.0)
    cpo_alpha: float = flag("cpo: weight of the chosen answer's own likelihood", 1.0)
    desirable_weight: float = flag("kto: weight of desirable rows", 1.0)
    undesirable_weight: float = flag("kto: weight of the others", 1.0)
    max_prompt_length: int | None = flag(
        "most tokens of a prompt; of a longer one the beginning is dropped (default: no limit but --max_length)", None
    )
    ref_model_id_or_path: str | None = flag(
        "full: reference model (default: the model as it begins)", None, metavar="PATH"
    )
    ref_model_type: str | None = flag("its registered name", None, metavar="KEY")


def json_object(text: str | None, flag: str) -> dict[str, Any] | None:
    """The object that a flag's JSON spells. Raises UsageError."""
    if text is None:
        return None
    try:
        value = json.loads(text)
    except ValueError as error:
        raise UsageError(f"--{flag} is not JSON: {error}", param=flag) from error
    if not isinstance(value, dict):
        raise UsageError(f"--{flag} must be a JSON object, such as {{}}", param=flag)
    return value
