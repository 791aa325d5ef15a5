"""Prometheus metrics under the names that vLLM's dashboards know, with our prefix.

Counters and gauges are read from the backend when they are scraped; only latencies and sizes are observed here, once a
request (and once a streamed chunk for inter_token).
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from martlet.backends.base import Backend
from martlet.server.record import Record
from martlet.server.token_latency import TokenLatency

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
    def __init__(self, backend: Backend, model_name: str):
        self._backend = backend
        self._labels = {"model_name": model_name, "engine": _ENGINE}
        self._registry = CollectorRegistry()
        self.inter_token = TokenLatency(
            "martlet:inter_token_latency_seconds",
            "Time from one token to the next, of streams",
            _TOKEN_SECONDS,
            self._labels,
        )
        self._registry.register(self)
        self._first_token = self._histogram(
            "time_to_first_token_seconds", "From the request to its first token, of streams", _SECONDS
        )
        self._total = self._histogram("e2e_request_latency_seconds", "From the request to the end", _SECONDS)
        self._per_token = self._histogram(
            "request_time_per_output_token_seconds", "Mean after the first token, of streams", _TOKEN_SECONDS
        )
        self._queued = self._histogram("request_queue_time_seconds", "In the queue, of the slowest prompt", _SECONDS)
        self._inference = self._histogram("request_inference_time_seconds", "After the queue", _SECONDS)
        self._prefill = self._histogram(
            "request_prefill_time_seconds", "From the queue to the first token, of streams", _SECONDS
        )
        self._decode = self._histogram(
            "request_decode_time_seconds", "From the first token to the last, of streams", _SECONDS
        )
        self.rejections = Rejections(model_name, self._registry)
        self._prompt = self._histogram("request_prompt_tokens", "Prompt tokens of a request", _TOKENS)
        self._output = self._histogram("request_generation_tokens", "Tokens generated for a request", _TOKENS)
        self._n = self._histogram("request_params_n", "n of a request", (1, 2, 5, 10, 20, 50, 100))
        self._max_tokens = self._histogram("request_params_max_tokens", "max_tokens of a request", _TOKENS)

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
        """The backend's numbers, for prometheus_client."""
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
        )
        for name, help_text, value in gauges:
            yield self._family(GaugeMetricFamily, name, help_text, value)
        for name, help_text, value in counters:
            yield self._family(CounterMetricFamily, name, help_text, value)
        success = CounterMetricFamily(
            "martlet:request_success", "Requests that ended, by reason", labels=[*self._labels, "finished_reason"]
        )
        for reason, count in sorted(stats.finished.items()):
            success.add_metric([*self._labels.values(), reason], count)
        yield success
        yield self.inter_token.family()

    def _family(self, kind: type, name: str, help_text: str, value: float) -> Metric:
        family = kind(f"martlet:{name}", help_text, labels=list(self._labels))
        family.add_metric(list(self._labels.values()), value)
        return family

    def _histogram(self, name: str, help_text: str, buckets: tuple[float, ...]) -> Histogram:
        histogram = Histogram(
            f"martlet:{name}", help_text, list(self._labels), buckets=buckets, registry=self._registry
        )
        return histogram.labels(*self._labels.values())
