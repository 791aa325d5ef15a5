"""What /metrics tells is what Prometheus reads, under the names that dashboards of vLLM know."""

import time

import httpx
import numpy as np
from live_server import live
from prometheus_client import CollectorRegistry, Histogram, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from fake_backend import FakeBackend, FakeTemplate
from martlet.engine.request import Stats
from martlet.server import create_app
from martlet.server.metrics import Metrics

KINDS = {
    "gauge": "num_requests_running num_requests_waiting kv_cache_usage_perc",
    "counter": "num_preemptions prompt_tokens prompt_tokens_cached generation_tokens request_success "
    "prefix_cache_queries prefix_cache_hits admission_rejections spec_decode_num_drafts spec_decode_num_draft_tokens "
    "spec_decode_num_accepted_tokens spec_decode_num_accepted_tokens_per_pos",
    "histogram": "time_to_first_token_seconds inter_token_latency_seconds request_time_per_output_token_seconds "
    "e2e_request_latency_seconds request_queue_time_seconds request_prefill_time_seconds request_decode_time_seconds "
    "request_inference_time_seconds request_prompt_tokens request_generation_tokens request_params_n "
    "request_params_max_tokens iteration_tokens_total",
}


def parsed(text):
    return {family.name.removeprefix("martlet:"): family for family in text_string_to_metric_families(text)}


def values(family):
    """{the sample's own labels: value}."""
    common = {"model_name", "engine"}
    return {tuple(v for k, v in s.labels.items() if k not in common): s.value for s in family.samples}


def test_a_scrape_has_every_family_and_adds_up():
    backend = FakeBackend()
    with live(create_app(backend, FakeTemplate())) as url:
        body = {"messages": [{"role": "user", "content": "hi"}], "temperature": 0, "max_tokens": 2}
        for stream in (False, True):
            httpx.post(f"{url}/v1/chat/completions", json={**body, "stream": stream})
        answer = httpx.get(f"{url}/metrics")
    backend.close()
    found = parsed(answer.text)
    for kind, names in KINDS.items():
        assert {name: found[name].type for name in names.split()} == dict.fromkeys(names.split(), kind)
    assert all(
        s.labels["model_name"] == "echo" and s.labels["engine"] == "0" for f in found.values() for s in f.samples
    )
    sums = {s.name: s.value for s in found["iteration_tokens_total"].samples if "_bucket" not in s.name}
    # Each request: a step for its prompt of 8, one for the first of its two tokens. The last is never computed.
    assert sums == {"martlet:iteration_tokens_total_sum": 2 * 9, "martlet:iteration_tokens_total_count": 4}
    buckets = [s.value for s in found["iteration_tokens_total"].samples if s.name.endswith("_bucket")]
    assert buckets[:2] == [2, 4] and buckets == sorted(buckets) and buckets[-1] == 4
    assert "lora_requests_info" not in found  # this model has no slots for adapters


def test_guesses_and_adapters_are_told():
    class Told:
        def stats(self):
            guesses = {"guesses": 5, "guessed_tokens": 15, "right_guesses": (4, 2, 0)}
            return Stats(**guesses, max_adapters=4, running_adapters=("a", "b,c"))

    found = parsed(Metrics(Told(), "m").text().decode())
    assert values(found["spec_decode_num_drafts"]) == {(): 5} and values(found["spec_decode_num_draft_tokens"]) == {
        (): 15
    }
    assert values(found["spec_decode_num_accepted_tokens"]) == {(): 6}
    assert values(found["spec_decode_num_accepted_tokens_per_pos"]) == {("0",): 4, ("1",): 2, ("2",): 0}
    (info,) = found["lora_requests_info"].samples
    assert (
        info.labels.items() >= {"max_lora": "4", "running_lora_adapters": "a,b,c", "waiting_lora_adapters": ""}.items()
    )
    assert abs(info.value - time.time()) < 3600


def test_histograms_are_what_prometheus_would_tell():
    class Idle:
        def stats(self):
            return Stats()

    registry, ours = CollectorRegistry(), Metrics(Idle(), "m")
    bounds = ours.inter_token.bounds
    theirs = Histogram(
        "martlet:inter_token_latency_seconds",
        "Time from one token to the next, of streams",
        ["model_name", "engine"],
        buckets=bounds,
        registry=registry,
    )
    for seconds in (0.0, 2 * bounds[-1], *bounds, *(1.01 * np.array(bounds))):
        theirs.labels("m", "0").observe(seconds)
        ours.inter_token.observe(seconds)
    want = [line for line in generate_latest(registry).decode().splitlines() if "_created" not in line]
    told = [line for line in ours.text().decode().splitlines() if "inter_token_latency" in line]
    assert sorted(told) == sorted(want)
