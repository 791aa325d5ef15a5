"""SWIFT 2.x's Python names over Martlet: `from swift.llm import ...` becomes `from martlet.swift import ...`.

Names are imported when first used; none of this brings in torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

_PUBLIC = {
    "ModelType": "registry",
    "TemplateType": "registry",
    "get_default_template_type": "registry",
    "get_template": "registry",
    "HistoryPair": "history",
    "LoRARequest": "engine",
    "VllmEngine": "engine",
    "VllmGenerationConfig": "generation_config",
    "get_vllm_engine": "engine",
    "inference_stream_vllm": "inference",
    "inference_vllm": "inference",
    "XRequestConfig": "client",
    "get_model_list_client": "client",
    "get_model_list_client_async": "client",
    "inference_client": "client",
    "inference_client_async": "client",
    "DeployArguments": "mains",
    "ExportArguments": "mains",
    "InferArguments": "mains",
    "RlhfArguments": "mains",
    "SftArguments": "mains",
    "deploy_main": "mains",
    "dpo_main": "mains",
    "export_main": "mains",
    "infer_main": "mains",
    "merge_lora": "mains",
    "merge_lora_main": "mains",
    "orpo_main": "mains",
    "rlhf_main": "mains",
    "sft_main": "mains",
}

if TYPE_CHECKING:
    from martlet.lora_request import LoRARequest
    from martlet.swift.client import (
        XRequestConfig,
        get_model_list_client,
        get_model_list_client_async,
        inference_client,
        inference_client_async,
    )
    from martlet.swift.engine import VllmEngine, get_vllm_engine
    from martlet.swift.generation_config import VllmGenerationConfig
    from martlet.swift.history import HistoryPair
    from martlet.swift.inference import inference_stream_vllm, inference_vllm
    from martlet.swift.mains import (
        DeployArguments,
        ExportArguments,
        InferArguments,
        RlhfArguments,
        SftArguments,
        deploy_main,
        dpo_main,
        export_main,
        infer_main,
        merge_lora,
        merge_lora_main,
        orpo_main,
        rlhf_main,
        sft_main,
    )
    from martlet.swift.registry import ModelType, TemplateType, get_default_template_type, get_template

__all__ = [
    "DeployArguments",
    "ExportArguments",
    "InferArguments",
    "RlhfArguments",
    "SftArguments",
    "deploy_main",
    "dpo_main",
    "export_main",
    "infer_main",
    "merge_lora",
    "merge_lora_main",
    "orpo_main",
    "rlhf_main",
    "sft_main",
    "HistoryPair",
    "LoRARequest",
    "ModelType",
    "TemplateType",
    "VllmEngine",
    "VllmGenerationConfig",
    "XRequestConfig",
    "get_default_template_type",
    "get_model_list_client",
    "get_model_list_client_async",
    "get_template",
    "get_vllm_engine",
    "inference_client",
    "inference_client_async",
    "inference_stream_vllm",
    "inference_vllm",
]


def __getattr__(name: str):
    if name in _PUBLIC:
        return getattr(importlib.import_module(f"martlet.swift.{_PUBLIC[name]}"), name)
    raise AttributeError(f"module 'martlet.swift' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
