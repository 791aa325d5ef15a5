"""Offline generation: `LLM(model).generate(prompts, SamplingParams(...))`, in the names that vLLM users know."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import count
from typing import TYPE_CHECKING, Any

import numpy as np

from martlet.engine.options import EngineOptions
from martlet.engine.request import Output, Request
from martlet.errors import InvalidRequest, MartletError
from martlet.hub.tokenizer import Tokenizer
from martlet.lora_request import LoRARequest, LoRARequests
from martlet.runners.base import LoadOptions, TokenLogprobs
from martlet.sampling_params import SamplingParams

if TYPE_CHECKING:
    from martlet.backends.base import Backend
    from martlet.chat import Template

Prompt = str | Sequence[int] | Mapping[str, Any]
"""A text, token ids, {"prompt": text} or {"prompt_token_ids": [...]}."""
Lora = LoRARequest | Sequence[LoRARequest | None] | None
Conversation = Sequence[Mapping[str, Any]]


@dataclass(frozen=True, slots=True)
class Logprob:
    """rank: 1 for the most likely token of the vocabulary."""

    logprob: float
    rank: int
    decoded_token: str


@dataclass(slots=True)
class CompletionOutput:
    """One continuation. logprobs: for each token, {token id: Logprob} of it and of the most likely ones.

    finish_reason: "stop" or "length". stop_reason: the stop string or stop token that ended it, else None.
    """

    index: int
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    cumulative_logprob: float | None = None
    logprobs: list[dict[int, Logprob]] | None = None
    finish_reason: str | None = None
    stop_reason: str | int | None = None


@dataclass(frozen=True, slots=True)
class RequestMetrics:
    """Seconds on time.monotonic()'s clock."""

    arrival_time: float
    finished_time: float


@dataclass(slots=True)
class RequestOutput:
    """A prompt and its n continuations. prompt is None where token ids were given.

    prompt_logprobs: None for the first token, then {token id: Logprob} for each prompt token, when asked for.
    """

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    finished: bool = False
    prompt_logprobs: list[dict[int, Logprob] | None] | None = None
    num_cached_tokens: int = 0
    metrics: RequestMetrics | None = None


class LLM:
    """A model for offline use. Closing it (or leaving `with`) frees its memory.

    model: anything hub.resolve takes. dtype: "auto", "float32", "bfloat16", "float16". max_model_len: prompt and output
    tokens together. gpu_memory_utilization: share of the free memory to use, on a GPU as on a CPU. kv_cache_tokens:
    size of the KV cache instead. kv_cache_dtype: "auto", "bf16", "fp8" or "int8", where the runner has it. seed: makes
    unseeded sampling repeatable. enable_lora: calls may name LoRA adapters, max_loras of them in a batch, of ranks up
    to max_lora_rank. tensor_parallel_size: GPUs that share the model. load_format: "dummy" for random
    weights from a config.json alone. backend: "native", "pt" or "vllm", or a Backend that is loaded already.

    Raises ModelNotFound, CheckpointError, OutOfMemory, BackendUnavailable or UsageError.
    """

    def __init__(
        self,
        model: str = "",
        *,
        dtype: str = "auto",
        quant: str | None = None,
        max_model_len: int | None = None,
        max_num_seqs: int | None = None,
        gpu_memory_utilization: float = 0.9,
        kv_cache_tokens: int | None = None,
        kv_cache_dtype: str = "auto",
        device: str = "auto",
        enable_prefix_caching: bool = True,
        max_num_batched_tokens: int | None = None,
        seed: int | None = None,
        enable_lora: bool = False,
        max_loras: int = 16,
        max_lora_rank: int = 64,
        tensor_parallel_size: int = 1,
        load_format: str = "auto",
        backend: str | Backend = "native",
    ):
        from martlet import backends, hub

        if isinstance(backend, str):
            load = LoadOptions(
                device=device,
                dtype=dtype,
                quant=quant,
                max_model_len=max_model_len,
                max_num_seqs=max_num_seqs,
                kv_cache_tokens=kv_cache_tokens,
                kv_dtype=kv_cache_dtype,
                memory_utilization=gpu_memory_utilization,
                seed=seed or 0,
                max_adapters=max_loras if enable_lora else 0,
                max_lora_rank=max_lora_rank,
                tensor_parallel_size=tensor_parallel_size,
            )
            engine = EngineOptions(
                max_num_batched_tokens=max_num_batched_tokens, enable_prefix_caching=enable_prefix_caching, seed=seed
            )
            card = hub.resolve(model or hub.DEFAULT_MODEL, load_format=load_format)
            backend = backends.load(card, backend=backend, load=load, engine=engine)
        self.backend = backend
        self._lora_requests = LoRARequests(backend)
        self._template: Template | None = None
        self._ids = count()

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: bool = False,
        lora_request: Lora = None,
    ) -> list[RequestOutput]:
        """Continue raw prompts; answers in the order of the prompts.

        sampling_params, lora_request: for all, or one each; None: what the model recommends, and no adapter.
        use_tqdm: show a progress bar.
        Raises InvalidRequest for a prompt that can never run or an adapter that does not fit, before anything is
        generated.
        """
        prompts = _as_list(prompts)
        params = self._params(sampling_params, len(prompts))
        return self._run([self._read(prompt) for prompt in prompts], params, use_tqdm, lora_request)

    def chat(
        self,
        messages: Conversation | Sequence[Conversation],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: bool = False,
        lora_request: Lora = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        tools: Sequence[Mapping[str, Any]] | None = None,
    ) -> list[RequestOutput]:
        """Answer one conversation, or several. Arguments as for `generate` and Template.render."""
        conversations = [messages] if not messages or isinstance(messages[0], Mapping) else messages
        params = self._params(sampling_params, len(conversations))
        template = self._chat_template()
        style = {"add_generation_prompt": add_generation_prompt, "continue_final_message": continue_final_message}
        read = [(None, template.render(turns, tools=tools, **style)) for turns in conversations]
        return self._run(read, [self._with_ends(each, template) for each in params], use_tqdm, lora_request)

    def embed(self, prompts: Prompt | Sequence[Prompt]) -> np.ndarray:
        """A vector of length one for each text: float32 [number of prompts, width].

        Raises InvalidRequest when the model makes no embeddings or a text is longer than it takes.
        """
        vectors = self.backend.embed([self._read(prompt)[1] for prompt in _as_list(prompts)])
        return vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), np.float32(1e-12))

    def get_tokenizer(self) -> Tokenizer:
        return self.backend.tokenizer

    def get_default_sampling_params(self) -> SamplingParams:
        """What the model's generation_config recommends."""
        from martlet.backends import generation_defaults

        return SamplingParams(**generation_defaults(self.backend.card))

    def close(self) -> None:
        self.backend.close()

    def __enter__(self) -> LLM:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _chat_template(self) -> Template:
        from martlet import chat

        if self._template is None:
            self._template = chat.template_for(self.backend.card, self.backend.tokenizer)
        return self._template

    def _params(self, given: SamplingParams | Sequence[SamplingParams] | None, size: int) -> list[SamplingParams]:
        if given is None:
            given = self.get_default_sampling_params()
        if isinstance(given, SamplingParams):
            return [given] * size
        if len(given) != size:
            raise InvalidRequest(f"{size} prompts but {len(given)} sampling_params", param="sampling_params")
        return list(given)

    def _adapters(self, given: Lora, size: int) -> list[str | None]:
        """What the requests name; loads what is new."""
        if given is None or isinstance(given, LoRARequest):
            return [self._lora_requests.adapter(given)] * size
        if len(given) != size:
            raise InvalidRequest(f"{size} prompts but {len(given)} lora_requests", param="lora_request")
        if len({one.lora_name for one in given if one}) < len({one for one in given if one}):
            raise InvalidRequest("one lora_name stands for different adapters in one call", param="lora_request")
        return [self._lora_requests.adapter(one) for one in given]

    def _with_ends(self, params: SamplingParams, template: Template) -> SamplingParams:
        """Also stop where the template ends a turn; at the model's end tokens a request stops anyway."""
        if params.ignore_eos:
            return params
        more = [token for token in template.stop_ids if token not in self.backend.tokenizer.eos_ids]
        texts = template.stop if params.detokenize else ()
        return replace(params, stop_token_ids=(*params.stop_token_ids, *more), stop=(*params.stop, *texts))

    def _read(self, prompt: Prompt) -> tuple[str | None, list[int]]:
        if isinstance(prompt, Mapping):
            found = [name for name in ("prompt_token_ids", "prompt") if prompt.get(name) is not None]
            if not found or len(prompt.keys() - {"prompt_token_ids", "prompt"}):
                raise InvalidRequest(
                    f"a prompt has prompt or prompt_token_ids, this one has {', '.join(map(str, prompt)) or 'nothing'}",
                    param="prompts",
                )
            text = prompt.get("prompt")
            return (text, list(prompt["prompt_token_ids"])) if found[0] == "prompt_token_ids" else self._read(text)
        if isinstance(prompt, str):
            return prompt, self.backend.tokenizer.encode_prompt(prompt)
        return None, list(prompt)

    def _run(
        self, prompts: list[tuple[str | None, list[int]]], params: list[SamplingParams], progress: bool, lora: Lora
    ) -> list[RequestOutput]:
        adapters = self._adapters(lora, len(prompts))
        requests = [
            Request(f"llm-{next(self._ids)}", ids, each, adapter=adapter)
            for (_, ids), each, adapter in zip(prompts, params, adapters, strict=True)
        ]
        answers = {
            request.id: RequestOutput(request.id, text, ids, [CompletionOutput(i) for i in range(request.params.n)])
            for request, (text, ids) in zip(requests, prompts, strict=True)
        }
        arrivals = {request.id: request.arrival for request in requests}
        with _bar(len(requests), progress) as advance:
            for output in self.backend.generate(requests):
                answer = answers[output.request_id]
                self._take(answer, output)
                if output.last:
                    answer.finished = True
                    answer.metrics = RequestMetrics(arrivals[answer.request_id], time.monotonic())
                    advance()
        return list(answers.values())

    def _take(self, answer: RequestOutput, output: Output) -> None:
        if output.finish_reason in ("error", "abort"):
            if isinstance(output.error, MartletError):
                raise output.error
            raise MartletError(
                f"request {answer.request_id} ended by {output.finish_reason}; the log has the cause"
            ) from output.error
        choice = answer.outputs[output.index]
        choice.text += output.text
        choice.token_ids += output.token_ids
        choice.finish_reason, choice.stop_reason = output.finish_reason, output.stop_reason
        if output.index == 0:
            answer.num_cached_tokens = max(answer.num_cached_tokens, output.cached_tokens)
        if output.prompt_logprobs is not None:
            answer.prompt_logprobs = [at and self._logprobs(at) for at in output.prompt_logprobs]
        if output.logprobs is not None:
            choice.logprobs = (choice.logprobs or []) + [self._logprobs(at) for at in output.logprobs]
            choice.cumulative_logprob = (choice.cumulative_logprob or 0.0) + sum(at.logprob for at in output.logprobs)

    def _logprobs(self, at: TokenLogprobs) -> dict[int, Logprob]:
        def entry(token: int, logprob: float, rank: int) -> Logprob:
            return Logprob(logprob, rank, self.backend.tokenizer.token_bytes(token).decode("utf-8", "replace"))

        found = {at.token: entry(at.token, at.logprob, at.rank)}
        for rank, (token, logprob) in enumerate(zip(at.top_ids.tolist(), at.top_logprobs.tolist(), strict=True), 1):
            found.setdefault(token, entry(token, logprob, rank))
        return found


def _as_list(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    if isinstance(prompts, (str, Mapping)):
        return [prompts]
    prompts = list(prompts)
    return [prompts] if prompts and isinstance(prompts[0], int) else prompts


@contextmanager
def _bar(total: int, show: bool) -> Iterator[Any]:
    if not show:
        yield lambda: None
        return
    from rich.progress import Progress

    with Progress() as bar:
        task = bar.add_task("generating", total=total)
        yield lambda: bar.advance(task)
