"""TRL's trainers on rows that we encoded: the losses are TRL's, the tokens are those that inference will see."""

from __future__ import annotations

import dataclasses
import functools
import math
import os
from collections.abc import Sequence
from typing import Any

os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")  # orpo and cpo live in trl.experimental, and say so on import

from datasets import Dataset as Table
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.constants import EMBEDDING_LAYER_NAMES
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback, TrainingArguments
from trl import DPOConfig, DPOTrainer, KTOConfig, KTOTrainer, SFTConfig, SFTTrainer, pack_dataset
from trl.experimental.cpo import CPOConfig, CPOTrainer
from trl.experimental.orpo import ORPOConfig, ORPOTrainer

from martlet.train.arguments import RlhfArguments, SftArguments, json_object
from martlet.train.encode import Encoded

IGNORED = -100  # the label of a token that is not learned
RENAMED = {  # settings whose names changed between the releases of transformers 5, new to old
    "activation_checkpointing": "gradient_checkpointing",
    "activation_checkpointing_kwargs": "gradient_checkpointing_kwargs",
}

Pair = tuple[list[int], list[int], list[int]]  # prompt, chosen, rejected
Labelled = tuple[list[int], list[int], bool]  # prompt, completion, whether it is desirable


def trainer_for(
    arguments: SftArguments,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    train: Sequence[Any],
    held: Sequence[Any],
    *,
    adapter: Any,
    reference: PreTrainedModel | None,
    output_dir: str,
    callbacks: list[TrainerCallback],
):
    """The trainer of `arguments` over encoded rows: Encoded for sft, Pair for preferences, Labelled for kto.

    adapter: a LoraConfig to put on the model, or None. reference: what preferences are measured against where the whole
    model is trained; with an adapter it is the model without it.
    """
    kind = arguments.rlhf_type if isinstance(arguments, RlhfArguments) else "sft"
    trainer, config, own, table = KINDS[kind]
    settings = common_settings(arguments, output_dir, rows=len(train), evaluates=bool(held))
    names = {field.name for field in dataclasses.fields(config)}
    settings |= {key: value for key, value in own(arguments).items() if key in names and value is not None}
    for new, old in RENAMED.items():
        if new not in names:
            settings[old] = settings.pop(new)
    takes_reference = {"ref_model": reference} if kind in ("dpo", "kto") else {}
    made = trainer(
        model=model,
        args=config(**settings),
        train_dataset=table(train),
        eval_dataset=table(held) if held else None,
        processing_class=tokenizer,
        peft_config=adapter,
        callbacks=callbacks,
        **takes_reference,
    )
    if isinstance(made.model, PeftModel):
        _ask_no_hub(made.model)
    return made


def _ask_no_hub(model: PeftModel) -> None:
    """Save without asking a hub about the base, as peft does to see whether its vocabulary grew: ours never does."""
    adapted = [name.rpartition(".")[2] for name, module in model.named_modules() if isinstance(module, BaseTunerLayer)]
    with_embeddings = not set(adapted).isdisjoint(EMBEDDING_LAYER_NAMES)
    model.save_pretrained = functools.partial(model.save_pretrained, save_embedding_layers=with_embeddings)


def common_settings(arguments: SftArguments, output_dir: str, *, rows: int, evaluates: bool) -> dict[str, Any]:
    """What all trainers are told, in transformers' words."""
    full = arguments.sft_type == "full"
    world = int(os.environ.get("WORLD_SIZE", 1))
    accumulate = arguments.gradient_accumulation_steps or max(1, math.ceil(16 / arguments.batch_size / world))
    steps = arguments.max_steps
    if steps < 0:
        steps = math.ceil(rows / (arguments.batch_size * accumulate * world)) * arguments.num_train_epochs
    strategy = arguments.evaluation_strategy if evaluates else "no"
    every = arguments.eval_steps or (200 if full else 50)
    saves = arguments.save_steps or every
    tracks_best = strategy != "no" and arguments.save_strategy != "no"
    import torch

    on_gpu = arguments.device != "cpu" and torch.cuda.is_available()
    checkpointing = arguments.gradient_checkpointing
    return {
        "output_dir": output_dir,
        "learning_rate": arguments.learning_rate or (1e-5 if full else 1e-4),
        "num_train_epochs": arguments.num_train_epochs,
        "max_steps": arguments.max_steps,
        "per_device_train_batch_size": arguments.batch_size,
        "per_device_eval_batch_size": arguments.eval_batch_size or arguments.batch_size,
        "gradient_accumulation_steps": accumulate,
        "optim": arguments.optim,
        "adam_beta1": arguments.adam_beta1,
        "adam_beta2": arguments.adam_beta2,
        "adam_epsilon": arguments.adam_epsilon,
        "weight_decay": arguments.weight_decay,
        "max_grad_norm": arguments.max_grad_norm,
        "lr_scheduler_type": arguments.lr_scheduler_type,
        "lr_scheduler_kwargs": json_object(arguments.lr_scheduler_kwargs, "lr_scheduler_kwargs"),
        "warmup_steps": arguments.warmup_steps or math.ceil(arguments.warmup_ratio * steps),
        "neftune_noise_alpha": arguments.neftune_noise_alpha,
        "activation_checkpointing": on_gpu if checkpointing is None else checkpointing,
        "activation_checkpointing_kwargs": {"use_reentrant": False},
        "seed": arguments.seed,
        "data_seed": arguments.seed,
        "full_determinism": arguments.full_determinism,
        "bf16": on_gpu and arguments.dtype in ("AUTO", "bf16"),
        "fp16": on_gpu and arguments.dtype == "fp16",
        "use_cpu": not on_gpu,
        "logging_steps": arguments.logging_steps,
        "logging_first_step": True,
        "eval_strategy": strategy,
        "eval_steps": every,
        "save_strategy": arguments.save_strategy,
        "save_steps": saves,
        "save_total_limit": None if arguments.save_total_limit < 0 else arguments.save_total_limit,
        "save_only_model": arguments.save_only_model,
        "metric_for_best_model": "eval_loss" if tracks_best else None,
        "greater_is_better": False if tracks_best else None,
        "ignore_data_skip": arguments.ignore_data_skip,
        "report_to": "none" if "none" in arguments.report_to else list(arguments.report_to),
        "disable_tqdm": arguments.disable_tqdm,
        "dataloader_num_workers": arguments.dataloader_num_workers,
        "dataloader_pin_memory": on_gpu,
        "deepspeed": _deepspeed(arguments.deepspeed),
        "fsdp": arguments.fsdp or None,
        "fsdp_config": arguments.fsdp_config,
        "ddp_backend": arguments.ddp_backend or (None if on_gpu or world == 1 else "gloo"),
        "ddp_timeout": arguments.ddp_timeout,
        "ddp_find_unused_parameters": False if world > 1 else None,
        "push_to_hub": arguments.push_to_hub,
        "hub_model_id": arguments.hub_model_id,
        "hub_private_repo": arguments.hub_private_repo or None,
        "hub_token": arguments.hub_token,
        "remove_unused_columns": False,
    }


def _deepspeed(name: str | None) -> str | dict[str, Any] | None:
    """SWIFT's two presets, or the path of a configuration. "auto" is what transformers fills in from its arguments."""
    if name not in ("default-zero2", "default-zero3"):
        return name
    auto = "auto"
    zero: dict[str, Any] = {"stage": int(name[-1]), "overlap_comm": True, "contiguous_gradients": True}
    if zero["stage"] == 3:
        zero["stage3_gather_16bit_weights_on_model_save"] = True
    return {
        "bf16": {"enabled": auto},
        "fp16": {"enabled": auto},
        "zero_optimization": zero,
        "gradient_accumulation_steps": auto,
        "gradient_clipping": auto,
        "train_batch_size": auto,
        "train_micro_batch_size_per_gpu": auto,
    }


def _sft_settings(arguments: SftArguments) -> dict[str, Any]:
    return {"max_length": _limit(arguments), "packing": arguments.packing}


def _limit(arguments: SftArguments) -> int | None:
    return None if arguments.max_length == -1 else arguments.max_length


def _preference_settings(arguments: SftArguments) -> dict[str, Any]:
    assert isinstance(arguments, RlhfArguments)
    kind, loss = arguments.rlhf_type, arguments.loss_type
    settings: dict[str, Any] = {
        "max_length": _limit(arguments),
        "beta": arguments.beta if arguments.beta is not None else 2.0 if kind == "simpo" else 0.1,
        "label_smoothing": arguments.label_smoothing,
        "desirable_weight": arguments.desirable_weight,
        "undesirable_weight": arguments.undesirable_weight,
    }
    if kind == "dpo":
        settings["loss_type"] = [loss or "sigmoid"]
        if arguments.rpo_alpha:
            settings |= {"loss_type": [loss or "sigmoid", "sft"], "loss_weights": [1.0, arguments.rpo_alpha]}
    elif kind == "simpo":
        settings |= {"loss_type": loss or "simpo", "simpo_gamma": arguments.simpo_gamma, "cpo_alpha": 0.0}
    elif kind == "cpo":
        settings |= {"loss_type": loss, "cpo_alpha": arguments.cpo_alpha}
    elif kind == "kto":  # estimates its KL term from neighbours in a batch, so their order must stay
        settings |= {"loss_type": loss, "train_sampling_strategy": "sequential"}
    return settings


def _sft_table(rows: Sequence[Encoded]) -> Table:
    labels = [[i if keep else IGNORED for i, keep in zip(r.ids, r.learned, strict=True)] for r in rows]
    return Table.from_dict({"input_ids": [row.ids for row in rows], "labels": labels})


def _pair_table(rows: Sequence[Pair]) -> Table:
    prompts, chosen, rejected = zip(*rows, strict=True)
    return Table.from_dict({"prompt_ids": prompts, "chosen_ids": chosen, "rejected_ids": rejected})


def _text_pair_table(rows: Sequence[Pair]) -> Table:
    """ORPO and CPO look for texts before they tokenise; the ids are what counts."""
    blank = [""] * len(rows)
    table = _pair_table(rows)
    for name in ("prompt", "chosen", "rejected"):
        table = table.add_column(name, blank)
    return table


def _labelled_table(rows: Sequence[Labelled]) -> Table:
    prompts, completions, labels = zip(*rows, strict=True)
    return Table.from_dict({"prompt_ids": prompts, "completion_ids": completions, "label": labels})


class _Encoded:
    """Rows come encoded: there is nothing left to prepare."""

    def _prepare_dataset(self, dataset: Table, *_: Any, **__: Any) -> Table:
        return dataset


class _Sft(SFTTrainer):
    def _prepare_dataset(
        self, dataset: Table, processing_class: Any, args: TrainingArguments, packing: bool, *_: Any
    ) -> Table:
        """Packed rows keep positions of their own, from which attention knows them apart."""
        return pack_dataset(dataset, args.max_length, args.packing_strategy) if packing else dataset


class _Dpo(_Encoded, DPOTrainer):
    pass


class _Kto(_Encoded, KTOTrainer):
    def _prepare_dataset(self, dataset: Table, processing_class: Any, args: TrainingArguments, *_: Any, **__: Any):
        """Each row also gets the answer of its neighbour in the batch, from which the KL term is estimated."""
        if not self.calculate_KL:
            return dataset

        def rotate(batch: dict[str, list]) -> dict[str, list]:
            answers = batch["completion_ids"]
            return {"KL_completion_ids": [answers[-1], *answers[:-1]]}

        return dataset.map(rotate, batched=True, batch_size=args.per_device_train_batch_size)


class _EncodedPairs:
    def tokenize_row(self, feature: dict[str, Any], model: Any = None) -> dict[str, Any]:
        row: dict[str, Any] = {}
        for name, ids in (("chosen", feature["chosen_ids"]), ("rejected", feature["rejected_ids"])):
            whole = feature["prompt_ids"] + ids
            row[f"{name}_input_ids"], row[f"{name}_attention_mask"] = whole, [1] * len(whole)
            row[f"{name}_labels"] = [IGNORED] * len(feature["prompt_ids"]) + ids
        row["prompt_input_ids"], row["prompt_attention_mask"] = feature["prompt_ids"], [1] * len(feature["prompt_ids"])
        return row


class _Orpo(_EncodedPairs, ORPOTrainer):
    pass


class _Cpo(_EncodedPairs, CPOTrainer):
    pass


KINDS = {
    "sft": (_Sft, SFTConfig, _sft_settings, _sft_table),
    "dpo": (_Dpo, DPOConfig, _preference_settings, _pair_table),
    "kto": (_Kto, KTOConfig, _preference_settings, _labelled_table),
    "orpo": (_Orpo, ORPOConfig, _preference_settings, _text_pair_table),
    "cpo": (_Cpo, CPOConfig, _preference_settings, _text_pair_table),
    "simpo": (_Cpo, CPOConfig, _preference_settings, _text_pair_table),
}
