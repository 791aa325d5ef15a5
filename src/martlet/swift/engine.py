"""SWIFT's get_vllm_engine: our engine behind the attributes that SWIFT puts on vLLM's."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from martlet.errors import MartletError, UsageError
from martlet.lora_request import LoRARequest, LoRARequests
from martlet.swift.generation_config import VllmGenerationConfig

__all__ = ["LoRARequest", "VllmEngine", "get_vllm_engine"]

if TYPE_CHECKING:
    from martlet.backends import Backend
    from martlet.hub import ModelCard, Tokenizer

_DTYPES = {
    "auto": "auto",
    "none": "auto",
    "fp32": "float32",
    "float": "float32",
    "float32": "float32",
    "bf16": "bfloat16",
    "bfloat16": "bfloat16",
    "fp16": "float16",
    "half": "float16",
    "float16": "float16",
}


class VllmEngine:
    """A loaded model. generation_config: default settings of its requests, to be changed at will."""

    def __init__(self, backend: Backend, model_type: str):
        self.backend = backend
        self.model_type = model_type
        self.lora_requests = LoRARequests(backend)
        self.generation_config = VllmGenerationConfig.from_model(backend.card.generation_config)

    @property
    def hf_tokenizer(self) -> Tokenizer:
        return self.backend.tokenizer

    @property
    def max_model_len(self) -> int:
        """Longest prompt and response together, in tokens."""
        return self.backend.max_model_len

    @property
    def model_dir(self) -> str:
        """The folder that holds the weights."""
        path = self.backend.card.path
        return str(path if path.is_dir() else path.parent)

    def close(self) -> None:
        """Free the model. Without it, the memory goes when the program ends."""
        self.backend.close()

    def __enter__(self) -> VllmEngine:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def get_vllm_engine(
    model_type: str,
    torch_dtype: Any = None,
    *,
    model_id_or_path: str | Path | None = None,
    revision: str | None = None,
    gpu_memory_utilization: float = 0.9,
    tensor_parallel_size: int = 1,
    max_model_len: int | None = None,
    engine_kwargs: Mapping[str, Any] | None = None,
    use_async: bool = False,
    enable_lora: bool = False,
    max_loras: int = 1,
    max_lora_rank: int = 16,
    max_num_seqs: int | None = None,
    enforce_eager: bool = False,
    **kwargs: Any,
) -> VllmEngine:
    """Load a model on our own engine.

    model_type: registry name. torch_dtype: a torch dtype or its name ("fp16", "bfloat16", ...), None to let the
    machine decide. model_id_or_path: weights other than the registered ones, such as a fine-tuned checkpoint; the
    template stays that of model_type. gpu_memory_utilization: share of the free memory to use. tensor_parallel_size:
    GPUs that share the model. max_num_seqs: most sequences in a batch. engine_kwargs: further options by name.
    enforce_eager: accepted either way, since this engine has no graphs to leave out. enable_lora: answers may name
    adapters, max_loras of them in a batch, of ranks up to max_lora_rank; without it the two do not count.

    Raises MartletError naming an option that cannot be had, and what resolving and loading raise.
    """
    if use_async:
        raise MartletError(
            "use_async=True cannot be had: martlet.backends.load gives a backend with an asynchronous `stream`",
            param="use_async",
        )
    for name, value in {**kwargs, **(engine_kwargs or {})}.items():
        raise UsageError(f"get_vllm_engine has no option {name!r} (given {value!r})", param=name)
    dtype = _dtype_name(torch_dtype)

    from martlet import backends
    from martlet.runners.base import LoadOptions

    card = _card(model_type, model_id_or_path, revision)
    load = LoadOptions(
        dtype=dtype,
        max_model_len=max_model_len,
        max_num_seqs=max_num_seqs,
        memory_utilization=gpu_memory_utilization,
        max_adapters=max_loras if enable_lora else 0,
        max_lora_rank=max_lora_rank,
        tensor_parallel_size=tensor_parallel_size,
    )
    return VllmEngine(backends.load(card, backend="native", load=load), model_type)


def _card(model_type: str, model_id_or_path: str | Path | None, revision: str | None) -> ModelCard:
    from martlet import hub

    if model_id_or_path is None:
        return hub.resolve(model_type, revision=revision)
    return hub.resolve(str(model_id_or_path), model_type=model_type, revision=revision)


def _dtype_name(dtype: Any) -> str:
    """ "float16" of torch.float16, "fp16" and the like, without importing torch."""
    name = _DTYPES.get(str(dtype).removeprefix("torch.").lower())
    if name is None:
        raise UsageError(f"unknown torch_dtype {dtype!r}; known are {', '.join(_DTYPES)}", param="torch_dtype")
    return name
