"""SWIFT's batch inference: a list of queries in, a list of responses with their histories out."""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from martlet.errors import InvalidRequest
from martlet.swift.history import HistoryPair

if TYPE_CHECKING:
    from martlet.chat import Template
    from martlet.engine.request import Output, Request
    from martlet.swift.engine import LoRARequest, VllmEngine
    from martlet.swift.generation_config import VllmGenerationConfig

Response = dict[str, Any]
_KEYS = ("query", "history", "system", "tools")


@dataclass(slots=True)
class _Task:
    """One entry of the request list on its way."""

    query: str
    history: list[HistoryPair]
    prompt: list[int]
    request: Request
    text: str = ""
    tokens: int = 0
    done: bool = False

    def take(self, output: Output) -> None:
        if output.error is not None:
            raise output.error
        self.text += output.text
        self.tokens += len(output.token_ids)
        self.done = output.last

    def response(self) -> Response:
        return {"response": self.text, "history": [*self.history, HistoryPair(self.query, self.text)]}


@dataclass(slots=True)
class _Batch:
    tasks: list[_Task]
    started: float = field(default_factory=time.perf_counter)

    def responses(self) -> list[Response]:
        return [task.response() for task in self.tasks]

    def info(self) -> dict[str, float]:
        seconds = time.perf_counter() - self.started
        tokens = sum(task.tokens for task in self.tasks)
        return {
            "num_prompt_tokens": sum(len(task.prompt) for task in self.tasks),
            "num_generated_tokens": tokens,
            "num_samples": len(self.tasks),
            "runtime": seconds,
            "samples/s": len(self.tasks) / seconds,
            "tokens/s": tokens / seconds,
        }


def inference_vllm(
    llm_engine: VllmEngine,
    template: Template,
    request_list: Sequence[Mapping[str, Any]],
    *,
    generation_config: VllmGenerationConfig | None = None,
    generation_info: dict[str, Any] | None = None,
    lora_request: LoRARequest | None = None,
    use_tqdm: bool = False,
    verbose: bool = False,
    prompt_prefix: str = "[PROMPT]",
    output_prefix: str = "[OUTPUT]",
) -> list[Response]:
    """Answer each {"query", "history", "system", "tools"}: a list of {"response", "history"} in the same order.

    history: (query, response) pairs, in and out; the lists given are not changed. generation_config goes before the
    engine's own. generation_info: filled with token counts and rates. use_tqdm: show progress. verbose: print each
    prompt and response. Raises InvalidRequest naming what is wrong with a request; then none of them runs.
    """
    batch = _batch(llm_engine, template, request_list, generation_config, lora_request, stream=False)
    for _ in _run(llm_engine, batch, use_tqdm):
        pass
    _report(llm_engine, batch, generation_info, verbose, prompt_prefix, output_prefix)
    return batch.responses()


def inference_stream_vllm(
    llm_engine: VllmEngine,
    template: Template,
    request_list: Sequence[Mapping[str, Any]],
    *,
    generation_config: VllmGenerationConfig | None = None,
    generation_info: dict[str, Any] | None = None,
    lora_request: LoRARequest | None = None,
    use_tqdm: bool = False,
    verbose: bool = False,
    prompt_prefix: str = "[PROMPT]",
    output_prefix: str = "[OUTPUT]",
) -> Iterator[list[Response]]:
    """Like `inference_vllm`, but yields the whole list each time some response has grown; responses are cumulative.

    Closing the iterator early stops what still runs. A wrong request raises here, before the first step.
    """
    batch = _batch(llm_engine, template, request_list, generation_config, lora_request, stream=True)

    def steps() -> Iterator[list[Response]]:
        for _ in _run(llm_engine, batch, use_tqdm):
            yield batch.responses()
        _report(llm_engine, batch, generation_info, verbose, prompt_prefix, output_prefix)

    return steps()


def _batch(
    engine: VllmEngine,
    template: Template,
    request_list: Sequence[Mapping[str, Any]],
    generation_config: VllmGenerationConfig | None,
    lora_request: LoRARequest | None,
    stream: bool,
) -> _Batch:
    from martlet.chat import history_to_messages
    from martlet.engine.request import Request

    if isinstance(request_list, Mapping) or not all(isinstance(r, Mapping) for r in request_list):
        raise InvalidRequest('request_list must be a list of {"query": ...}', param="request_list")
    adapter = engine.lora_requests.adapter(lora_request)
    params = (generation_config or engine.generation_config).sampling_params(template)
    tasks = []
    for i, request in enumerate(request_list):
        where = f"request_list[{i}]"
        if unknown := [key for key in request if key not in _KEYS]:
            raise InvalidRequest(f"{where} has {unknown[0]!r}; known keys are {', '.join(_KEYS)}", param=unknown[0])
        if not isinstance(request.get("query"), str):
            raise InvalidRequest(f"{where} needs a query of type str, got {request.get('query')!r}", param="query")
        messages = history_to_messages(request.get("history"), request["query"], request.get("system"))
        history = [HistoryPair(*pair) for pair in request.get("history") or ()]
        ids = template.render(messages, tools=request.get("tools"))
        job = Request(f"swift-{uuid.uuid4().hex}", ids, params, stream=stream, adapter=adapter)
        tasks.append(_Task(request["query"], history, ids, job))
    return _Batch(tasks)


def _run(engine: VllmEngine, batch: _Batch, show_progress: bool) -> Iterator[None]:
    """Run the batch; gives control back each time a response has grown or ended."""
    by_id = {task.request.id: task for task in batch.tasks}
    outputs = engine.backend.generate([task.request for task in batch.tasks])
    try:
        for output in _with_progress(outputs, len(by_id)) if show_progress else outputs:
            by_id[output.request_id].take(output)
            if output.text or output.last:
                yield
    finally:
        outputs.close()  # leaving early aborts the rest


def _with_progress(outputs: Iterator[Output], total: int) -> Iterator[Output]:
    from rich.progress import Progress

    with Progress() as progress:
        bar = progress.add_task("inference", total=total)
        for output in outputs:
            yield output
            progress.advance(bar, int(output.last))


def _report(
    engine: VllmEngine,
    batch: _Batch,
    generation_info: dict[str, Any] | None,
    verbose: bool,
    prompt_prefix: str,
    output_prefix: str,
) -> None:
    if generation_info is not None:
        generation_info.update(batch.info())
    if verbose:
        for task in batch.tasks:
            prompt = engine.hf_tokenizer.decode(task.prompt, skip_special=False)
            print(f"{prompt_prefix}{prompt}{output_prefix}{task.text}")
