"""An installed vLLM as a backend: its AsyncLLM on an event loop of its own, prompts as token ids, outputs as deltas."""

from __future__ import annotations

import asyncio
import json
import logging
import threading
from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
from vllm import SamplingParams as VllmParams
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.lora.request import LoRARequest
from vllm.sampling_params import RequestOutputKind
from vllm.v1.engine.async_llm import AsyncLLM

from martlet.backends.base import NO_SLOTS, Backend, Sink, check_adapter_name, check_request, warn_of_unused
from martlet.engine.options import EngineOptions
from martlet.engine.request import Output, Request, Stats
from martlet.errors import BackendUnavailable, InvalidRequest, MartletError, ModelNotFound, Overloaded, UsageError
from martlet.grammar import Grammar
from martlet.hub import peft
from martlet.hub.card import ModelCard
from martlet.hub.tokenizer import Tokenizer
from martlet.model.adapters import check as check_adapter
from martlet.runners.base import LoadOptions, TokenLogprobs
from martlet.sampling_params import SamplingParams

log = logging.getLogger("martlet")

_HONOURED = ("device", "dtype", "quant", "max_model_len", "max_num_seqs", "kv_cache_tokens", "memory_utilization")
_HONOURED += ("block_size", "max_num_batched_tokens", "enable_prefix_caching", "max_num_queued", "seed", "kv_dtype")
_HONOURED += ("max_adapters", "max_lora_rank", "tensor_parallel_size")
_KV_DTYPES = {"auto": "auto", "bf16": "bfloat16", "fp8": "fp8"}
_SAME_NAME = (
    "n",
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "presence_penalty",
    "frequency_penalty",
    "repetition_penalty",
    "seed",
    "include_stop_str_in_output",
    "ignore_eos",
    "max_tokens",
    "min_tokens",
    "logprobs",
    "prompt_logprobs",
    "detokenize",
)


class VllmBackend(Backend):
    """Statistics count what passes through here; vLLM keeps those of its memory to itself."""

    name = "vllm"

    def __init__(self, card: ModelCard, tokenizer: Tokenizer, args: AsyncEngineArgs, options: EngineOptions):
        self.card = card
        self._max_adapters = getattr(args, "max_loras", 0) if getattr(args, "enable_lora", False) else 0
        self._max_lora_rank = getattr(args, "max_lora_rank", 0)
        self._adapters: dict[str | None, LoRARequest] = {}
        self._adapter_numbers = count(1)
        self.tokenizer = tokenizer
        self._max_in_flight = options.max_num_queued and options.max_num_queued + (args.max_num_seqs or 0)
        self._lock = threading.Lock()
        self._tasks: dict[str, asyncio.Task[None] | None] = {}
        self._finished: Counter[str] = Counter()
        self._prompt_tokens = self._generated_tokens = self._cached_tokens = 0
        self._closed = False
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="martlet-vllm", daemon=True)
        self._thread.start()
        try:
            # vLLM's engine belongs to the loop that is running when it is made.
            self._engine = asyncio.run_coroutine_threadsafe(_start(args), self._loop).result()
        except Exception as error:
            self._stop_loop()
            raise BackendUnavailable(f"vLLM cannot load {card.name}: {error}", param="infer_backend") from error
        self.max_model_len = self._engine.model_config.max_model_len
        self.vocab_size = self._engine.model_config.get_vocab_size()

    def submit(self, requests: Iterable[Request], sink: Sink) -> None:
        requests = list(requests)
        for request in requests:
            check_request(request, self.vocab_size, self.max_model_len, self._adapters)
        with self._lock:
            if self._closed:
                raise MartletError("the backend is shut down")
            if self._max_in_flight and len(self._tasks) + len(requests) > self._max_in_flight:
                raise Overloaded(f"at most {self._max_in_flight} requests may run and wait; try again later")
            ids = [request.id for request in requests]
            if len(set(ids)) < len(ids) or not self._tasks.keys().isdisjoint(ids):
                raise InvalidRequest(
                    "request ids must differ from each other and from running ones", param="request_id"
                )
            loras = {request.id: self._adapters.get(request.adapter) for request in requests}
            self._tasks.update(dict.fromkeys(ids))
        self._loop.call_soon_threadsafe(self._begin, requests, sink, loras)

    def check_grammar(self, grammar: Grammar) -> None:
        structured_outputs(grammar)  # vLLM compiles it by itself, and says what is wrong with it when it runs

    def abort(self, request_ids: Iterable[str]) -> None:
        if not self._closed:
            self._loop.call_soon_threadsafe(self._cancel, list(request_ids))

    def adapters(self) -> Sequence[str]:
        return tuple(self._adapters)

    def load_adapter(self, name: str, path: str | Path) -> None:
        if not self._max_adapters:
            raise InvalidRequest(NO_SLOTS, param="adapters")
        check_adapter_name(name)
        check_adapter(path, self.card, self._max_lora_rank)
        # A number of its own makes vLLM read what lies there now; it does so when a request first names it.
        self._adapters[name] = LoRARequest(name, next(self._adapter_numbers), str(peft.find(path)))

    def unload_adapter(self, name: str) -> None:
        if self._adapters.pop(name, None) is None:
            raise ModelNotFound(f"no adapter is called {name!r}", param="model")

    def stats(self) -> Stats:
        return Stats(
            running=len(self._tasks),
            prompt_tokens=self._prompt_tokens,
            generated_tokens=self._generated_tokens,
            cached_tokens=self._cached_tokens,
            finished=dict(self._finished),
            error="vLLM's engine died; see the log" if self._engine.errored else None,
        )

    def close(self) -> None:
        with self._lock:
            if self._closed:
                return
            self._closed = True
        asyncio.run_coroutine_threadsafe(self._drain(), self._loop).result()
        self._engine.shutdown()
        self._stop_loop()

    # On the loop's thread

    def _begin(self, requests: list[Request], sink: Sink, loras: dict[str, LoRARequest | None]) -> None:
        for request in requests:
            self._tasks[request.id] = self._loop.create_task(self._run(request, sink, loras[request.id]))

    def _cancel(self, request_ids: list[str]) -> None:
        for request_id in request_ids:
            if (task := self._tasks.get(request_id)) is not None:
                # AsyncLLM.generate aborts its request when cancelled; not before the task has begun, which would then
                # end without a word to its sink.
                self._loop.call_soon(task.cancel)

    async def _drain(self) -> None:
        tasks = [task for task in self._tasks.values() if task is not None]  # all have begun: submit came before
        self._cancel(list(self._tasks))
        await asyncio.gather(*tasks, return_exceptions=True)

    def _stop_loop(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    async def _run(self, request: Request, sink: Sink, lora: LoRARequest | None) -> None:
        reason = "error"
        try:
            prompt: dict[str, Any] = {"prompt_token_ids": list(request.prompt_token_ids)}
            if request.cache_salt is not None:
                prompt["cache_salt"] = request.cache_salt
            params = vllm_params(request.params, stream=request.stream)
            async for news in self._engine.generate(
                prompt, params, request.id, priority=request.priority, lora_request=lora
            ):
                if news.finished:
                    reason = news.outputs[-1].finish_reason or "stop"
                outputs = self._translate(request, news)
                if outputs:
                    sink.put(outputs)
        except asyncio.CancelledError:
            reason = "abort"
            sink.put([_end(request, "abort")])
        except ValueError as error:  # what vLLM says of a request that it will not run
            sink.put([_end(request, "error", InvalidRequest(str(error)))])
        except Exception as error:
            log.error("vLLM failed on request %s", request.id, exc_info=error)
            sink.put([_end(request, "error", error)])
        finally:
            self._finished[reason] += 1
            self._tasks.pop(request.id, None)

    def _translate(self, request: Request, news: Any) -> list[Output]:
        params = request.params
        outputs = []
        for choice in news.outputs:
            token_ids = list(choice.token_ids)
            self._generated_tokens += len(token_ids)
            logprobs = None
            if params.logprobs is not None:
                logprobs = [
                    _logprobs(token, entries, params.logprobs)
                    for token, entries in zip(token_ids, choice.logprobs or (), strict=True)
                ]
            outputs.append(
                Output(
                    request_id=request.id,
                    index=choice.index,
                    token_ids=token_ids,
                    text=choice.text,
                    logprobs=logprobs,
                    finish_reason=choice.finish_reason,
                    stop_reason=choice.stop_reason,
                    prompt_tokens=len(request.prompt_token_ids),
                    cached_tokens=news.num_cached_tokens or 0,
                )
            )
        if outputs and news.prompt_logprobs:  # vLLM leaves an empty list where it gave them before
            outputs[0].prompt_logprobs = [
                entries and _logprobs(token, entries, params.prompt_logprobs or 0)
                for token, entries in zip(request.prompt_token_ids, news.prompt_logprobs, strict=True)
            ]
        if news.finished:
            self._prompt_tokens += len(request.prompt_token_ids)
            self._cached_tokens += news.num_cached_tokens or 0
            outputs[-1].last = True
        return outputs


async def _start(args: AsyncEngineArgs) -> AsyncLLM:
    return AsyncLLM.from_engine_args(args)


def vllm_params(params: SamplingParams, *, stream: bool) -> VllmParams:
    return VllmParams(
        **{name: getattr(params, name) for name in _SAME_NAME},
        # vLLM shows all control tokens or none; the end tokens are not in its text anyway.
        skip_special_tokens=params.skip_special_tokens and not params.shown_token_ids,
        stop=list(params.stop),
        stop_token_ids=list(params.stop_token_ids),
        logit_bias=dict(params.logit_bias) or None,
        allowed_token_ids=None if params.allowed_token_ids is None else list(params.allowed_token_ids),
        output_kind=RequestOutputKind.DELTA if stream else RequestOutputKind.FINAL_ONLY,
        **({} if params.grammar is None else {"structured_outputs": structured_outputs(params.grammar)}),
    )


def structured_outputs(grammar: Grammar) -> Any:
    """A grammar as vLLM takes it. Raises InvalidRequest for what it has no name for."""
    from vllm.sampling_params import StructuredOutputsParams

    if grammar.trigger is not None:
        raise InvalidRequest("the vllm backend has no grammars that begin at a trigger", param="grammar")
    if grammar.kind == "json_object":
        return StructuredOutputsParams(json_object=True)
    if grammar.kind == "choice":
        return StructuredOutputsParams(choice=json.loads(grammar.text))
    name = {"json_schema": "json", "regex": "regex", "lark": "grammar"}[grammar.kind]
    return StructuredOutputsParams(**{name: grammar.text})


def engine_args(card: ModelCard, load: LoadOptions, engine: EngineOptions) -> AsyncEngineArgs:
    """Only what was decided is passed on; the rest is vLLM's own default."""
    if card.merge is not None:
        raise UsageError("the vllm backend merges no adapters; the native one does", param="merge_lora")
    if load.device == "cpu":
        raise UsageError("vLLM runs where it was built for; --device cpu cannot be asked of it", param="device")
    if load.kv_dtype not in _KV_DTYPES:
        raise UsageError(
            f"kv_cache_dtype {load.kv_dtype!r}: vLLM has {', '.join(_KV_DTYPES)} of ours", param="kv_cache_dtype"
        )
    blocks = None if load.kv_cache_tokens is None else -(-load.kv_cache_tokens // load.block_size)
    wanted = {
        "max_model_len": load.max_model_len,
        "max_num_seqs": load.max_num_seqs,
        "max_num_batched_tokens": engine.max_num_batched_tokens,
        "quantization": load.quant,
        "num_gpu_blocks_override": blocks,
        "kv_cache_dtype": None if load.kv_dtype == "auto" else _KV_DTYPES[load.kv_dtype],
        "block_size": None if blocks is None else load.block_size,
        "seed": engine.seed,
        "tensor_parallel_size": load.tensor_parallel_size if load.tensor_parallel_size != 1 else None,
    }
    if load.max_adapters:
        wanted |= {"enable_lora": True, "max_loras": load.max_adapters, "max_lora_rank": _lora_rank(load.max_lora_rank)}
    return AsyncEngineArgs(
        model=str(card.path),
        dtype=load.dtype,
        load_format="dummy" if card.format == "dummy" else "auto",
        gpu_memory_utilization=load.memory_utilization,
        enable_prefix_caching=engine.enable_prefix_caching,
        max_logprobs=Backend.max_logprobs,
        scheduling_policy="priority",  # equal priorities run in order of arrival, as without
        trust_remote_code=False,
        **{name: value for name, value in wanted.items() if value is not None},
    )


def _lora_rank(rank: int) -> int:
    """The smallest that vLLM has room for."""
    ranks = (1, 8, 16, 32, 64, 128, 256, 320, 512)
    if rank > ranks[-1]:
        raise UsageError(f"vLLM takes ranks up to {ranks[-1]}, not {rank}", param="max_lora_rank")
    return next(each for each in ranks if each >= rank)


def load_vllm(card: ModelCard, tokenizer: Tokenizer, load: LoadOptions, engine: EngineOptions) -> VllmBackend:
    warn_of_unused("vllm", _HONOURED, load, engine)
    return VllmBackend(card, tokenizer, engine_args(card, load, engine), engine)


def _end(request: Request, reason: Any, error: Exception | None = None) -> Output:
    return Output(request.id, finish_reason=reason, prompt_tokens=len(request.prompt_token_ids), error=error, last=True)


def _logprobs(token: int, entries: Any, k: int) -> TokenLogprobs:
    """From vLLM's {token id: Logprob}, which holds the token itself and the k most likely ones."""
    ranked = sorted(entries.items(), key=lambda item: -item[1].logprob)[:k]
    return TokenLogprobs(
        token=token,
        logprob=entries[token].logprob,
        rank=entries[token].rank,
        top_ids=np.array([t for t, _ in ranked], np.int32),
        top_logprobs=np.array([entry.logprob for _, entry in ranked], np.float32),
    )
