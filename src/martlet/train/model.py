"""The model to train: a checkpoint as transformers has it, and the adapter that peft puts on it."""

from __future__ import annotations

import logging
import re
import tempfile
from pathlib import Path

import torch
from torch import nn
from transformers import AutoTokenizer, GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from martlet.backends.transformers_model import load_model
from martlet.errors import UsageError, did_you_mean
from martlet.hub import registry
from martlet.hub.card import ModelCard
from martlet.hub.tokenizer import Tokenizer
from martlet.runners.base import LoadOptions
from martlet.train.arguments import SftArguments

log = logging.getLogger("martlet")

DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32", "AUTO": "auto"}
INITS = {"true": True, "false": False, "gaussian": "gaussian"}


def load(card: ModelCard, arguments: SftArguments) -> PreTrainedModel:
    """The whole model, its weights in --dtype: a full fine-tune in 16 bits keeps them in float32 and computes in 16."""
    if arguments.quantization_bit:
        return _quantised(card, arguments)
    dtype = DTYPES[arguments.dtype]
    if arguments.sft_type == "full" and dtype != "float32":
        dtype = "float32"
    model = load_model(card, LoadOptions(device=arguments.device, dtype=dtype))
    model.config._name_or_path = model.name_or_path = base_name(card)  # peft writes the latter into adapters
    model.config.use_cache = False
    if card.generation_config:  # goes into checkpoints of all weights
        model.generation_config = GenerationConfig(**card.generation_for_transformers())
    return model.train()


def _quantised(card: ModelCard, arguments: SftArguments) -> PreTrainedModel:
    if card.format != "safetensors":
        raise UsageError(f"bitsandbytes quantises safetensors checkpoints; {card.path} is {card.format}", param="model")
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    four = arguments.quantization_bit == 4
    quant = BitsAndBytesConfig(
        load_in_4bit=four,
        load_in_8bit=not four,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    return AutoModelForCausalLM.from_pretrained(
        card.path, quantization_config=quant, local_files_only=True, trust_remote_code=False
    )


def base_name(card: ModelCard) -> str:
    """What an adapter says it belongs to, in words that `hub.resolve` takes: a path, a registered name, or a source."""
    if Path(card.source).exists():
        return str(card.path.resolve())
    return card.name if registry.find(card.name) else card.source


def tokenizer_for_trainer(tokenizer: Tokenizer) -> PreTrainedTokenizerBase:
    """The same tokenizer in transformers' clothes: trainers pad with it and save it beside the weights."""
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save(Path(folder))
        theirs = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    if theirs.pad_token is None:
        theirs.pad_token = theirs.eos_token
    return theirs


def linear_names(model: nn.Module) -> list[str]:
    """Last parts of the names of all linear layers but the head, such as q_proj: what an adapter may be put on."""
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    found = {
        name.rpartition(".")[2] for name, module in model.named_modules() if _is_linear(module) and module is not head
    }
    return sorted(found)


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) or type(module).__name__ in ("Conv1D", "Linear4bit", "Linear8bitLt")


def adapter_config(model: PreTrainedModel, card: ModelCard, arguments: SftArguments):
    """peft's LoraConfig of the arguments. Raises UsageError for target modules that the model does not have."""
    from peft import LoraConfig

    return LoraConfig(
        task_type="CAUSAL_LM",
        r=arguments.lora_rank,
        lora_alpha=arguments.lora_alpha,
        lora_dropout=arguments.lora_dropout,
        target_modules=_targets(model, card, arguments),
        modules_to_save=_existing(model, arguments.modules_to_save, "modules_to_save") or None,
        use_rslora=arguments.use_rslora,
        use_dora=arguments.use_dora,
        init_lora_weights=INITS[arguments.init_lora_weights],
    )


def _targets(model: PreTrainedModel, card: ModelCard, arguments: SftArguments) -> list[str] | str:
    if arguments.target_regex:
        names = [name for name, _ in model.named_modules()]
        if not any(re.fullmatch(arguments.target_regex, name) for name in names):
            raise UsageError(
                f"--target_regex {arguments.target_regex!r} is the whole name of no module, such as "
                f"{next(name for name, module in model.named_modules() if _is_linear(module))!r}",
                param="target_regex",
            )
        return arguments.target_regex
    every, wanted = linear_names(model), list(arguments.target_modules)
    if [w.upper() for w in wanted] in (["DEFAULT"], ["AUTO"]):
        own = [name for name in card.lora_target_modules if name in every]
        return own or every
    if "ALL" in [w.upper() for w in wanted] or "all-linear" in wanted:
        return every
    return _existing(model, wanted, "target_modules")


def _existing(model: PreTrainedModel, names: list[str] | tuple[str, ...], flag: str) -> list[str]:
    """`names`, each of which ends the name of some module."""
    modules = [name for name, _ in model.named_modules() if name]
    for name in names:
        if not any(module == name or module.endswith("." + name) for module in modules):
            there = linear_names(model)
            raise UsageError(
                f"--{flag}: the model has no module {name!r}; linear layers are {', '.join(there)}."
                f"{did_you_mean(name, there)}",
                param=flag,
            )
    return list(names)


def freeze(model: PreTrainedModel, arguments: SftArguments) -> None:
    """For a full fine-tune: leave out what --freeze_parameters and --freeze_parameters_ratio say."""
    parameters = list(model.named_parameters())
    for prefix in (*arguments.freeze_parameters, *arguments.additional_trainable_parameters):
        if not any(name.startswith(prefix) for name, _ in parameters):
            raise UsageError(
                f"no parameter begins with {prefix!r}, such as {parameters[0][0]!r}", param="freeze_parameters"
            )
    quota = arguments.freeze_parameters_ratio * sum(p.numel() for _, p in parameters)
    for name, parameter in parameters:
        frozen = quota > 0 or name.startswith(tuple(arguments.freeze_parameters))
        quota -= parameter.numel()
        parameter.requires_grad = not frozen or name.startswith(tuple(arguments.additional_trainable_parameters))
    if not any(parameter.requires_grad for _, parameter in parameters):
        raise UsageError("every parameter is frozen, so there is nothing to train", param="freeze_parameters")


def continue_adapter(model: PreTrainedModel, folder: str):
    """The model with the adapter in `folder` on it, to be trained further."""
    from peft import PeftModel

    if not (Path(folder) / "adapter_config.json").is_file():
        raise UsageError(f"--adapter {folder} holds no adapter_config.json", param="adapter")
    return PeftModel.from_pretrained(model, folder, is_trainable=True)
