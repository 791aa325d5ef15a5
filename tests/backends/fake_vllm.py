"""A stand-in for the parts of vLLM that our backend calls, with the shapes that vLLM documents. It records the calls.

Its model repeats the prompt's tokens. A prompt that begins with token 13 breaks it, one with 14 is refused.
"""

from __future__ import annotations

import asyncio
import enum
import sys
import types
from dataclasses import dataclass, field
from typing import Any


class RequestOutputKind(enum.Enum):
    CUMULATIVE = 0
    DELTA = 1
    FINAL_ONLY = 2


class SamplingParams:
    FIELDS = [
        "n",
        "presence_penalty",
        "frequency_penalty",
        "repetition_penalty",
        "temperature",
        "top_p",
        "top_k",
        "min_p",
        "seed",
        "stop",
        "stop_token_ids",
        "ignore_eos",
        "max_tokens",
        "min_tokens",
        "logprobs",
        "prompt_logprobs",
        "detokenize",
        "skip_special_tokens",
        "include_stop_str_in_output",
        "logit_bias",
        "allowed_token_ids",
        "output_kind",
    ]

    def __init__(self, **given):
        unknown = set(given) - set(self.FIELDS)
        assert not unknown, f"vLLM has no sampling parameter {unknown}"
        self.__dict__.update(given)


class AsyncEngineArgs:
    FIELDS = [
        "model",
        "dtype",
        "load_format",
        "max_model_len",
        "max_num_seqs",
        "max_num_batched_tokens",
        "quantization",
        "num_gpu_blocks_override",
        "block_size",
        "seed",
        "gpu_memory_utilization",
        "enable_prefix_caching",
        "max_logprobs",
        "scheduling_policy",
        "trust_remote_code",
        "enable_lora",
        "max_loras",
        "max_lora_rank",
        "tensor_parallel_size",
    ]

    def __init__(self, **given):
        unknown = set(given) - set(self.FIELDS)
        assert not unknown, f"vLLM has no engine argument {unknown}"
        self.max_num_seqs = None
        self.__dict__.update(given)


@dataclass
class LoRARequest:
    lora_name: str
    lora_int_id: int
    lora_path: str


@dataclass
class Logprob:
    logprob: float
    rank: int
    decoded_token: str = ""


@dataclass
class CompletionOutput:
    index: int
    text: str
    token_ids: list[int]
    logprobs: Any = None
    finish_reason: str | None = None
    stop_reason: Any = None


@dataclass
class RequestOutput:
    request_id: str
    outputs: list[CompletionOutput]
    finished: bool
    prompt_logprobs: Any = None
    num_cached_tokens: int | None = None


@dataclass
class ModelConfig:
    max_model_len: int = 64

    def get_vocab_size(self) -> int:
        return 258


@dataclass
class AsyncLLM:
    args: AsyncEngineArgs
    model_config: ModelConfig = field(default_factory=ModelConfig)
    calls: list[tuple] = field(default_factory=list)
    aborted: list[str] = field(default_factory=list)
    loras: list[tuple | None] = field(default_factory=list)
    errored: bool = False
    stopped: bool = False

    @classmethod
    def from_engine_args(cls, args: AsyncEngineArgs) -> AsyncLLM:
        asyncio.get_running_loop()  # as vLLM's output handler needs one
        if args.model == "broken":
            raise ValueError("no such checkpoint")
        return cls(args)

    async def generate(self, prompt, sampling_params, request_id, *, priority=0, lora_request=None):
        self.calls.append((prompt, sampling_params, request_id, priority))
        self.loras.append(lora_request and (lora_request.lora_name, lora_request.lora_int_id, lora_request.lora_path))
        ids, params = prompt["prompt_token_ids"], sampling_params
        if ids[0] == 13:
            raise RuntimeError("CUDA error")
        if ids[0] == 14:
            raise ValueError("vLLM does not want this")
        delta = params.output_kind is RequestOutputKind.DELTA
        limit = params.max_tokens or 10**9
        kept: list[int] = []
        prompt_logprobs = None
        if params.prompt_logprobs is not None:
            prompt_logprobs = [None] + [{t: Logprob(-2.0, 2), 7: Logprob(-1.0, 1)} for t in ids[1:]]
        try:
            for at in range(limit):
                await asyncio.sleep(0.001)
                kept.append(ids[at % len(ids)])
                last = at + 1 == limit
                if not (delta or last):
                    continue
                logprobs = None
                if params.logprobs is not None:
                    logprobs = [{t: Logprob(-0.5, 1), 9: Logprob(-3.0, 2)} for t in kept]
                choices = [
                    CompletionOutput(i, bytes(kept).decode(), list(kept), logprobs, "length" if last else None)
                    for i in range(params.n)
                ]
                yield RequestOutput(request_id, choices, last, prompt_logprobs, 4)
                kept = []
                prompt_logprobs = prompt_logprobs and []
        except asyncio.CancelledError:
            self.aborted.append(request_id)
            raise

    def shutdown(self) -> None:
        self.stopped = True


def install(monkeypatch) -> None:
    """Make `import vllm` find this."""
    here = sys.modules[__name__]
    modules = ("vllm", "vllm.engine", "vllm.engine.arg_utils", "vllm.sampling_params", "vllm.lora")
    for name in (*modules, "vllm.lora.request", "vllm.v1", "vllm.v1.engine", "vllm.v1.engine.async_llm"):
        module = types.ModuleType(name)
        module.__dict__.update({k: v for k, v in vars(here).items() if not k.startswith("__")})
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.delitem(sys.modules, "martlet.backends.vllm_backend", raising=False)
