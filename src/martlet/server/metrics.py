"""Prometheus metrics under the names that vLLM's dashboards know, with our prefix.

Counters and gauges are read from the backend when they are scraped; only latencies and sizes are observed here, once a
request (and once a streamed chunk for inter_token), in histograms of ours: prometheus_client's take 4 us a value.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from itertools import accumulate

from prometheus_client import CollectorRegistry, Counter, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.utils import floatToGoString

from martlet.backends.base import Backend
from martlet.engine.histogram import Histogram
from martlet.server.record import Record

TEXT = "text/plain; version=0.0.4"
_REJECTIONS = "martlet:admission_rejections"
_ENGINE = "0"  # as vLLM numbers the engines of a server
_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 40, 80, 160, 320, 640)
_TOKEN_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 1, 2.5)
_TOKENS = tuple(m * 10**e for e in range(6) for m in (1, 2, 5))


class Rejections:
    """Requests refused with 429. registry: where they are told; None for one of their own."""

    def __init__(self, model_name: str, registry: CollectorRegistry | None = None):
        self._registry = registry or CollectorRegistry()
        said = "Requests refused with 429: the queue was full, or the key had too many running"
        counter = Counter(_REJECTIONS, said, ["model_name", "engine"], registry=self._registry)
        self.inc = counter.labels(model_name, _ENGINE).inc

    def text(self) -> str:
        return generate_latest(self._registry).decode()


def merged(texts: Mapping[int, str]) -> str:
    """One exposition of several servers', each family once, `engine` saying whose a sample is.

    Refusals are left out: a front that passes requests on has seen them all.
    """
    families: dict[str, tuple[list[str], list[str]]] = {}  # name -> (comments, samples), which belong together
    for number, text in texts.items():
        name = ""
        for line in text.split("\n"):
            if line.startswith("# "):
                name = line.split(" ", 3)[2]
                comments, samples = families.setdefault(name, ([], []))
                if line not in comments:
                    comments.append(line)
            elif line:
                samples.append(line.replace(f'engine="{_ENGINE}"', f'engine="{number}"'))
    told = (parts for name, parts in families.items() if not name.startswith(_REJECTIONS))
    return "".join(f"{line}\n" for parts in told for part in parts for line in part)


class Metrics:
    """Histograms are touched by the event loop's thread only."""

    def __init__(self, backend: Backend, model_name: str):
        self._backend = backend
        self._labels = {"model_name": model_name, "engine": _ENGINE}
        self._registry = CollectorRegistry()
        self._registry.register(self)
        self.rejections = Rejections(model_name, self._registry)
        self._histograms: list[tuple[str, str, Histogram]] = []
        made = self._histogram
        self.inter_token = made(
            "inter_token_latency_seconds", "Time from one token to the next, of streams", _TOKEN_SECONDS
        )
        self._first_token = made(
            "time_to_first_token_seconds", "From the request to its first token, of streams", _SECONDS
        )
        self._total = made("e2e_request_latency_seconds", "From the request to the end", _SECONDS)
        self._per_token = made(
            "request_time_per_output_token_seconds", "Mean after the first token, of streams", _TOKEN_SECONDS
        )
        self._queued = made("request_queue_time_seconds", "In the queue, of the slowest prompt", _SECONDS)
        self._inference = made("request_inference_time_seconds", "After the queue", _SECONDS)
        self._prefill = made("request_prefill_time_seconds", "From the queue to the first token, of streams", _SECONDS)
        self._decode = made("request_decode_time_seconds", "From the first token to the last, of streams", _SECONDS)
        self._prompt = made("request_prompt_tokens", "Prompt tokens of a request", _TOKENS)
        self._output = made("request_generation_tokens", "Tokens generated for a request", _TOKENS)
        self._n = made("request_params_n", "n of a request", (1, 2, 5, 10, 20, 50, 100))
        self._max_tokens = made("request_params_max_tokens", "max_tokens of a request", _TOKENS)

    def observe(self, record: Record) -> None:
        """Count a generation that ran to its end."""
        now = time.perf_counter()
        self._total.observe(now - record.started)
        self._prompt.observe(record.prompt_tokens)
        self._output.observe(record.output_tokens)
        self._n.observe(record.n)
        if record.max_tokens is not None:
            self._max_tokens.observe(record.max_tokens)
        if record.queued is not None:
            self._queued.observe(record.queued)
            self._inference.observe(now - record.started - record.queued)
        if record.first_token is not None:
            self._prefill.observe(record.first_token - record.started - (record.queued or 0.0))
            self._decode.observe(now - record.first_token)
            self._first_token.observe(record.first_token - record.started)
            later = record.output_tokens - record.n * record.prompts
            if later > 0:
                self._per_token.observe((now - record.first_token) * record.n * record.prompts / later)

    def text(self) -> bytes:
        return generate_latest(self._registry)

    def collect(self) -> Iterator[Metric]:
        """All but the refusals, for prometheus_client."""
        stats = self._backend.stats()
        used = stats.kv_blocks_used / stats.kv_blocks_total if stats.kv_blocks_total else 0.0
        gauges = (
            ("num_requests_running", "Sequences in the batch", stats.running),
            ("num_requests_waiting", "Sequences that wait for room", stats.waiting),
            ("kv_cache_usage_perc", "Used part of the KV blocks, 1 is all", used),
        )
        counters = (
            ("num_preemptions", "Sequences that lost their blocks and were recomputed", stats.preemptions),
            ("prompt_tokens", "Prompt tokens of requests", stats.prompt_tokens),
            ("prompt_tokens_cached", "Prompt tokens that the prefix cache gave", stats.cached_tokens),
            ("generation_tokens", "Tokens generated", stats.generated_tokens),
            ("prefix_cache_queries", "Tokens looked up in the prefix cache", stats.prefix_queries),
            ("prefix_cache_hits", "Tokens found in the prefix cache", stats.prefix_hits),
            ("spec_decode_num_drafts", "Guesses at a sequence's next tokens", stats.guesses),
            ("spec_decode_num_draft_tokens", "Tokens guessed", stats.guessed_tokens),
            ("spec_decode_num_accepted_tokens", "Guessed tokens that were right", sum(stats.right_guesses)),
        )
        for name, about, value in gauges:
            yield self._family(GaugeMetricFamily, name, about, [({}, value)])
        for name, about, value in counters:
            yield self._family(CounterMetricFamily, name, about, [({}, value)])
        right = [({"position": str(at)}, count) for at, count in enumerate(stats.right_guesses)]
        about = "Guessed tokens that were right, by their place in the guess"
        yield self._family(CounterMetricFamily, "spec_decode_num_accepted_tokens_per_pos", about, right)
        ended = [({"finished_reason": reason}, count) for reason, count in sorted(stats.finished.items())]
        yield self._family(CounterMetricFamily, "request_success", "Requests that ended, by reason", ended)
        if stats.max_adapters:
            names = {"running_lora_adapters": stats.running_adapters, "waiting_lora_adapters": stats.waiting_adapters}
            told = {name: ",".join(of) for name, of in names.items()} | {"max_lora": str(stats.max_adapters)}
            about = "The adapters of running and of waiting sequences; the value is the time"
            yield self._family(GaugeMetricFamily, "lora_requests_info", about, [(told, time.time())])
        steps = [] if stats.step_tokens is None else [("iteration_tokens_total", "Tokens of a step", stats.step_tokens)]
        for name, about, histogram in self._histograms + steps:
            yield self._histogram_family(name, about, histogram)

    def _family(self, kind: type, name: str, about: str, samples: Sequence[tuple[Mapping[str, str], float]]) -> Metric:
        """samples: labels beside those of all metrics, and the value."""
        more = list(samples[0][0]) if samples else []
        family = kind(f"martlet:{name}", about, labels=[*self._labels, *more])
        for labels, value in samples:
            family.add_metric([*self._labels.values(), *labels.values()], value)
        return family

    def _histogram(self, name: str, about: str, bounds: Sequence[float]) -> Histogram:
        histogram = Histogram(bounds)
        self._histograms.append((name, about, histogram))
        return histogram

    def _histogram_family(self, name: str, about: str, histogram: Histogram) -> Metric:
        bounds = map(floatToGoString, (*histogram.bounds, float("inf")))
        buckets = list(zip(bounds, accumulate(histogram.counts), strict=True))
        family = HistogramMetricFamily(f"martlet:{name}", about, labels=list(self._labels))
        family.add_metric(list(self._labels.values()), buckets, histogram.total)
        return family
