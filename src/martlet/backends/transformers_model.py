"""A checkpoint as a Hugging Face model. The transformers library reads safetensors itself, so that it stays an
independent reference; GGUF and dummy weights are ours, written into its parameters, so that both compute the same."""

from __future__ import annotations

from contextlib import closing, contextmanager
from pathlib import Path

import numpy as np
import torch
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM, GenerationConfig, PreTrainedModel

from martlet import hub
from martlet.errors import BackendUnavailable, CheckpointError, OutOfMemory, UsageError
from martlet.hub import peft as folders
from martlet.hub.card import ModelCard
from martlet.hub.checkpoint import PackedTensor
from martlet.hub.dummy import DummyCheckpoint
from martlet.model import families, weights
from martlet.runners.base import LoadOptions

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def load_model(card: ModelCard, options: LoadOptions) -> PreTrainedModel:
    """The model, on its device and ready to generate. Code from the model's folder is never run."""
    if options.quant is not None:
        raise UsageError(
            f"the transformers backend does not quantise (quant {options.quant!r}); use the native one", param="quant"
        )
    if (kind := card.config.get("model_type")) not in CONFIG_MAPPING:
        raise CheckpointError(
            f"{card.name}: transformers knows no model_type {kind!r} here, and code in a model's folder is never run",
            param="infer_backend",
        )
    device = _device(options.device)
    dtype = _dtype(options.dtype, device)
    try:
        if card.format == "safetensors":
            model = AutoModelForCausalLM.from_pretrained(
                card.path, dtype=dtype, use_safetensors=True, local_files_only=True, trust_remote_code=False
            )
            if card.merge is not None:
                model = _merged(model, card.merge)
        else:
            config = AutoConfig.for_model(**card.config)
            with _default_dtype(dtype):
                model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
            _write(model, card, options.seed)
        model = model.to(device=device, dtype=dtype).eval()
    except torch.cuda.OutOfMemoryError as error:
        raise OutOfMemory(f"{card.name} does not fit in {dtype}: {error}", param="dtype") from error
    except (OSError, ValueError) as error:
        raise CheckpointError(f"transformers cannot load {card.path}: {error}") from error
    # The model's own defaults are applied above us, to every backend alike; its end tokens come from the tokenizer.
    model.generation_config = GenerationConfig()
    return model


def _merged(model: PreTrainedModel, path: Path) -> PreTrainedModel:
    """Merged by PEFT, so that this stays an independent reference; checked first, since PEFT would read pickles."""
    import peft

    folders.read(path)
    return peft.PeftModel.from_pretrained(model, folders.find(path)).merge_and_unload()


def _device(name: str) -> str:
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise BackendUnavailable("this torch finds no CUDA device; use --device cpu", param="device")
    return name


def _dtype(name: str, device: str) -> torch.dtype:
    if name == "auto":
        return torch.float32 if device == "cpu" else torch.bfloat16
    if name not in _DTYPES:
        raise UsageError(f"dtype must be auto, {', '.join(_DTYPES)}, got {name!r}", param="dtype")
    return _DTYPES[name]


@contextmanager
def _default_dtype(dtype: torch.dtype):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@torch.no_grad()
def _write(model: PreTrainedModel, card: ModelCard, seed: int) -> None:
    """Fill every parameter of the model from the card's checkpoint; our names are translated to Hugging Face's."""
    family = families.get(card.family)
    theirs = dict(model.named_parameters())
    spec = weights.read_spec(card)
    with closing(DummyCheckpoint(seed) if card.format == "dummy" else hub.open_checkpoint(card)) as checkpoint:
        for name, tensor in weights.load(card, spec, checkpoint):
            values = tensor.dequantise() if isinstance(tensor, PackedTensor) else np.asarray(tensor, np.float32)
            parameter = theirs.pop(family.source(spec, name, "safetensors").name)
            parameter.copy_(torch.from_numpy(np.require(values, requirements=("C", "W"))))  # maps are not writable
    if theirs:
        raise CheckpointError(f"{card.path} has no weights for {', '.join(sorted(theirs)[:3])} of {card.name}")
