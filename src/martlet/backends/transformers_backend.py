"""Hugging Face transformers as a backend: plain padded `generate`, a batch at a time, on a thread of its own.

It is the yardstick and the way to run what the native engine does not know, not a fast server: requests that come while
a batch runs wait for its end. A request that ends, or is aborted, ends between two tokens.
"""

from __future__ import annotations

import logging
import random
import threading
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import LogitsProcessorList, StoppingCriteria, StoppingCriteriaList

from martlet.backends.base import NO_SLOTS, Backend, Sink, check_request, warn_of_unused
from martlet.backends.transformers_adapters import PeftAdapters
from martlet.backends.transformers_model import load_model
from martlet.backends.transformers_sampler import RowSampler, SampledRow
from martlet.engine.detokenizer import Detokenizer
from martlet.engine.options import EngineOptions
from martlet.engine.request import FinishReason, Output, Request, Stats
from martlet.errors import InvalidRequest, MartletError, Overloaded
from martlet.hub.card import ModelCard
from martlet.hub.tokenizer import Tokenizer
from martlet.runners.base import LoadOptions, TokenLogprobs

log = logging.getLogger("martlet")

_HONOURED = (
    "device",
    "dtype",
    "quant",
    "max_model_len",
    "max_num_seqs",
    "max_num_queued",
    "seed",
    "max_adapters",
    "max_lora_rank",
)
MAX_ROWS = 32  # sequences in a batch, unless max_num_seqs says otherwise


@dataclass(slots=True)
class _Job:
    """A submitted request. open: its sequences that have not ended. adapter: what PEFT calls its adapter."""

    request: Request
    sink: Sink
    open: int
    adapter: str | None = None


class TransformersBackend(Backend):
    name = "transformers"

    def __init__(self, card: ModelCard, tokenizer: Tokenizer, model: Any, load: LoadOptions, engine: EngineOptions):
        self.card = card
        self.tokenizer = tokenizer
        self.vocab_size = int(model.config.vocab_size)
        longest = getattr(model.config, "max_position_embeddings", None) or 2**20
        self.max_model_len = min(longest, load.max_model_len or longest)
        self._model = model
        self._max_adapters = load.max_adapters
        self._adapters = PeftAdapters(card, model, load.max_lora_rank)
        self._max_rows = load.max_num_seqs or MAX_ROWS
        self._max_queued = engine.max_num_queued
        self._seeds = random.Random(engine.seed)
        self._wake = threading.Condition()
        self._waiting: list[_Job] = []
        self._running: dict[str, _Job] = {}
        self._aborted: set[str] = set()
        self._closing = False
        self._finished: Counter[str] = Counter()
        self._prompt_tokens = self._generated_tokens = self._steps = 0
        self._step_began: float | None = None
        self._thread = threading.Thread(target=self._work, name="martlet-transformers", daemon=True)
        self._thread.start()

    def submit(self, requests: Iterable[Request], sink: Sink) -> None:
        requests = list(requests)
        for request in requests:
            self._check(request)
        with self._wake:
            if self._closing:
                raise MartletError("the backend is shut down")
            if self._max_queued is not None and len(self._waiting) + len(requests) > self._max_queued:
                raise Overloaded(f"at most {self._max_queued} requests may wait; try again later")
            known = {job.request.id for job in self._waiting} | self._running.keys()
            ids = [request.id for request in requests]
            if len(set(ids)) < len(ids) or not known.isdisjoint(ids):
                raise InvalidRequest(
                    "request ids must differ from each other and from running ones", param="request_id"
                )
            self._waiting += [
                _Job(request, sink, request.params.n, self._adapters.key(request.adapter)) for request in requests
            ]
            self._wake.notify()

    def abort(self, request_ids: Iterable[str]) -> None:
        with self._wake:
            ids = set(request_ids)
            gone = [job for job in self._waiting if job.request.id in ids]
            self._waiting = [job for job in self._waiting if job.request.id not in ids]
            self._aborted |= ids & self._running.keys()
        for job in gone:
            self._finished["abort"] += 1
            job.sink.put([_last(job.request, "abort")])

    def adapters(self) -> Sequence[str]:
        return self._adapters.names()

    def load_adapter(self, name: str, path: str | Path) -> None:
        if not self._max_adapters:
            raise InvalidRequest(NO_SLOTS, param="adapters")
        self._adapters.load(name, path)

    def unload_adapter(self, name: str) -> None:
        with self._wake:  # between a request's check and its place in the queue nothing is unloaded
            self._adapters.unload(name)

    def stats(self) -> Stats:
        began = self._step_began
        return Stats(
            running=sum(job.open for job in list(self._running.values())),
            waiting=len(self._waiting),
            prompt_tokens=self._prompt_tokens,
            generated_tokens=self._generated_tokens,
            steps=self._steps,
            finished=dict(self._finished),
            error=None if self._closing or self._thread.is_alive() else "the backend's thread died; see the log",
            busy_seconds=0.0 if began is None else time.monotonic() - began,
        )

    def close(self) -> None:
        with self._wake:
            self._closing = True
            ids = [*(job.request.id for job in self._waiting), *self._running]
            self._wake.notify()
        self.abort(ids)
        if threading.current_thread() is not self._thread:
            self._thread.join()
        self._model = None

    def _check(self, request: Request) -> None:
        check_request(request, self.vocab_size, self.max_model_len, self._adapters.names())
        if request.params.grammar is not None:
            self.check_grammar(request.params.grammar)
        if request.params.prompt_logprobs is not None:
            raise InvalidRequest(
                "the transformers backend gives no prompt_logprobs; the native one does", param="prompt_logprobs"
            )

    # The worker thread

    def _work(self) -> None:
        while True:
            with self._wake:
                while not (self._waiting or self._closing):
                    self._wake.wait()
                if self._closing:
                    return
                jobs = self._next_batch()
                self._running = {job.request.id: job for job in jobs}
            self._step_began = time.monotonic()
            batch = _Batch(self, jobs)
            try:
                with self._adapters.using(jobs[0].adapter):
                    batch.generate(self._model)
            except Exception as error:
                log.error("a batch of %d requests failed: %s", len(jobs), error, exc_info=error)
                batch.fail(error)
            finally:
                self._step_began = None
                with self._wake:
                    self._running = {}
                    self._aborted.clear()
                    used = {job.adapter for job in self._waiting}
                self._adapters.forget(used)

    def _next_batch(self) -> list[_Job]:
        """The oldest requests of the most urgent priority that fit into a batch with one adapter; at least one."""
        self._waiting.sort(key=lambda job: (job.request.priority, job.request.arrival))
        jobs, later, rows = [], [], 0
        for job in self._waiting:
            rows += job.request.params.n
            fits = job.adapter == self._waiting[0].adapter and (not jobs or rows <= self._max_rows)
            (jobs if fits else later).append(job)
            rows -= 0 if fits else job.request.params.n
        self._waiting = later
        return jobs


@dataclass(slots=True)
class _Row:
    """One sequence of the batch. limit: most output tokens."""

    job: _Job
    index: int
    sampled: SampledRow
    limit: int
    detokenizer: Detokenizer | None
    logprobs: list[TokenLogprobs]
    reported: int = 0


class _Batch(StoppingCriteria):
    """A batch while `generate` runs: called after every token, it tells the sinks and says which rows have ended."""

    def __init__(self, backend: TransformersBackend, jobs: list[_Job]):
        self._backend = backend
        self.rows = [self._row(job, index) for job in jobs for index in range(job.request.params.n)]

    def _row(self, job: _Job, index: int) -> _Row:
        backend, request, params = self._backend, job.request, job.request.params
        seed = backend._seeds.getrandbits(64) if params.seed is None else params.seed
        draws = torch.Generator().manual_seed((seed + index) % 2**63)
        eos = () if params.ignore_eos else backend.tokenizer.eos_ids
        ends = tuple(dict.fromkeys((*eos, *params.stop_token_ids)))
        prompt = list(request.prompt_token_ids)
        room = backend.max_model_len - len(prompt)
        return _Row(
            job,
            index,
            SampledRow(params, prompt, ends, draws),
            min(params.max_tokens or room, room),
            Detokenizer(backend.tokenizer, params) if params.detokenize else None,
            [],
        )

    def generate(self, model: Any) -> None:
        width = max(len(row.sampled.prompt) for row in self.rows)
        device = model.device
        ids = torch.tensor([[0] * (width - len(r.sampled.prompt)) + r.sampled.prompt for r in self.rows])
        mask = torch.tensor([[0] * (width - len(r.sampled.prompt)) + [1] * len(r.sampled.prompt) for r in self.rows])
        model.generate(
            ids.to(device),
            attention_mask=mask.to(device),
            do_sample=False,
            max_new_tokens=max(row.limit for row in self.rows),
            pad_token_id=0,
            logits_processor=LogitsProcessorList([RowSampler([row.sampled for row in self.rows])]),
            stopping_criteria=StoppingCriteriaList([self]),
        )

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        backend = self._backend
        outputs: dict[int, tuple[Sink, list[Output]]] = {}
        for row, token in zip(self.rows, input_ids[:, -1].tolist(), strict=True):
            if not row.sampled.finished and (output := self._advance(row, token)) is not None:
                sink = row.job.sink
                outputs.setdefault(id(sink), (sink, []))[1].append(output)
        backend._steps += 1
        backend._step_began = time.monotonic()
        for sink, news in outputs.values():
            sink.put(news)
        return torch.tensor([row.sampled.finished for row in self.rows], device=input_ids.device)

    def fail(self, error: Exception) -> None:
        for row in self.rows:
            if not row.sampled.finished:
                row.job.sink.put([self._report(row, "error", error=error)])

    def _advance(self, row: _Row, token: int) -> Output | None:
        sampled, params = row.sampled, row.sampled.params
        if row.job.request.id in self._backend._aborted:
            return self._report(row, "abort")
        if not sampled.output:
            self._backend._prompt_tokens += len(sampled.prompt) if row.index == 0 else 0
        sampled.output.append(token)
        self._backend._generated_tokens += 1
        if sampled.logprobs is not None:
            row.logprobs.append(sampled.logprobs)
            sampled.logprobs = None
        ends = token in sampled.end_ids and len(sampled.output) > params.min_tokens
        if row.detokenizer and row.detokenizer.feed([] if ends else [token]) is not None:
            return self._report(row, "stop", row.detokenizer.stop)
        if ends:
            return self._report(row, "stop", token if token in params.stop_token_ids else None)
        if len(sampled.output) >= row.limit:
            return self._report(row, "length")
        return self._report(row) if row.job.request.stream else None

    def _report(
        self,
        row: _Row,
        reason: FinishReason | None = None,
        stop: str | int | None = None,
        error: Exception | None = None,
    ) -> Output:
        request, text = row.job.request, ""
        if row.detokenizer is not None:
            if reason is not None:
                row.detokenizer.finish()
            text = row.detokenizer.delta(final=reason is not None)
        output = Output(
            request_id=request.id,
            index=row.index,
            token_ids=row.sampled.output[row.reported :],
            text=text,
            logprobs=row.logprobs[row.reported :] if request.params.logprobs is not None else None,
            finish_reason=reason,
            stop_reason=stop,
            prompt_tokens=len(row.sampled.prompt),
            error=error,
        )
        row.reported = len(row.sampled.output)
        if reason is not None:
            row.sampled.finished = True
            row.job.open -= 1
            output.last = row.job.open == 0
            if output.last:
                self._backend._finished[reason] += 1
                self._backend._running.pop(request.id, None)
        return output


def _last(request: Request, reason: FinishReason) -> Output:
    return Output(request.id, finish_reason=reason, prompt_tokens=len(request.prompt_token_ids), last=True)


def load_transformers(
    card: ModelCard, tokenizer: Tokenizer, load: LoadOptions, engine: EngineOptions
) -> TransformersBackend:
    warn_of_unused("transformers", _HONOURED, load, engine)
    return TransformersBackend(card, tokenizer, load_model(card, load), load, engine)
