"""The front of several replicas, over replicas of our own making, without Ray."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys

import httpx
import pytest
from live_server import live
from prometheus_client.parser import text_string_to_metric_families

from martlet.cli.deploy import DeployOptions
from martlet.cli.deploy import run as deploy
from martlet.cli.flags import parse
from martlet.engine.request import Stats
from martlet.errors import BackendUnavailable, UsageError
from martlet.server import ServerOptions
from martlet.server.cores import cpus_each, share
from martlet.server.front import create_front
from martlet.server.metrics import Metrics

BODY = {"messages": [{"role": "user", "content": "hi"}]}


def start(kind, **more):
    headers = [(b"content-type", kind), (b"x-request-id", b"theirs")]
    return {"type": "http.response.start", "status": 200, "headers": headers} | more


def body(text, more=False):
    return {"type": "http.response.body", "body": text, "more_body": more}


class Answers:
    """handle.remote, with one script for each call: lists of messages, or an error in place of one."""

    def __init__(self, *scripts):
        self.scripts = list(scripts)
        self.calls = []

    def remote(self, call):
        self.calls.append(call)
        return Answer(self.scripts.pop(0))

    def broadcast(self, method):
        assert method == "metrics"
        return self

    async def results_async(self, **options):
        assert options == {"timeout_s": 5.0, "return_exceptions": True}
        counted = []
        for number, requests in ((1, 3), (0, 2)):
            metrics = Metrics(FakeStats(), 'a "model"')
            for _ in range(requests):
                metrics.inter_token.observe(0.01)
            metrics.rejections.inc()
            counted.append((number, metrics.text().decode()))
        return [*counted, RuntimeError("it died")]


class Answer:
    def __init__(self, script):
        self.script = script

    async def __aiter__(self):
        for item in self.script:
            if isinstance(item, Exception):
                raise item
            yield item

    def cancel(self): ...


@contextlib.contextmanager
def front(*scripts, running=2, **options):
    handle = Answers(*scripts)
    with live(create_front(handle, ServerOptions("m", replicas=2, **options), lambda: running)) as url:
        yield url, handle


class FakeStats:
    def stats(self):
        return Stats(running=2, finished={"stop": 1})


DEATH = RuntimeError("the process died")
WHOLE = [[], [start(b"application/json"), body(b"{}")]]


def test_an_answer_passes_and_the_request_has_one_id():
    with front(WHOLE) as (url, handle):
        answer = httpx.post(url + "/v1/chat/completions?a=b", json=BODY, headers={"authorization": "Bearer k"})
    (call,) = handle.calls
    assert answer.status_code == 200 and answer.text == "{}"
    assert answer.headers.get_list("x-request-id") == [call.id]
    assert json.loads(call.body) == BODY and call.scope["query_string"] == b"a=b"
    assert not any(name == b"authorization" for name, _ in call.scope["headers"])


def test_what_no_replica_took_is_asked_again():
    with front([DEATH], [DEATH], WHOLE) as (url, handle):
        assert httpx.post(url + "/v1/completions", json={}).status_code == 200
    assert len(handle.calls) == 3


def test_a_taken_request_whose_replica_dies_is_not_asked_twice():
    with front([[], DEATH]) as (url, handle):
        answer = httpx.post(url + "/v1/chat/completions", json=BODY)
    assert answer.status_code == 503 and int(answer.headers["retry-after"]) > 0
    assert answer.json()["error"]["code"] == "replica_died" and len(handle.calls) == 1


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/messages", "/v1/responses"])
def test_a_stream_whose_replica_dies_ends_with_an_error_event(path):
    script = [[], [start(b"text/event-stream; charset=utf-8"), body(b"data: {}\n\n", True)], DEATH]
    with front(script) as (url, _):
        answer = httpx.post(url + path, json=BODY)
    events = [line for line in answer.text.splitlines() if line.startswith("data:")]
    assert events[0] == "data: {}" and "replica" in events[-1] and len(events) == 2


def test_an_answer_in_pieces_that_is_no_stream_is_cut():
    with front([[], [start(b"application/json"), body(b"{", True)], DEATH]) as (url, _):  # noqa: SIM117
        with pytest.raises(httpx.RemoteProtocolError):
            httpx.post(url + "/v1/chat/completions", json=BODY)


def test_keys_and_sizes_are_checked_by_the_front():
    with front(api_keys=("secret",)) as (url, handle):
        assert httpx.post(url + "/v1/chat/completions", json=BODY).status_code == 401
        large = httpx.post(
            url + "/v1/completions", content=b" " * (17 << 20), headers={"authorization": "Bearer secret"}
        )
        assert large.status_code == 413 and not handle.calls


@pytest.mark.parametrize(("running", "status"), [(2, 200), (1, 200), (0, 503)])
def test_health_tells_how_many_replicas_run(running, status):
    with front(running=running) as (url, _):
        answer = httpx.get(url + "/health")
    assert answer.status_code == status and answer.json()["detail"] == f"{running} of 2 replicas run"


def test_metrics_are_those_of_every_replica_told_apart():
    refused = [[], [start(b"application/json", status=429), body(b"{}")]]
    with front(refused) as (url, _):
        assert httpx.post(url + "/v1/completions", json={}).status_code == 429
        answer = httpx.get(url + "/metrics")
    assert answer.status_code == 200 and answer.headers["content-type"].startswith("text/plain; version=0.0.4")
    found = {family.name: family for family in text_string_to_metric_families(answer.text)}
    assert len(found) == len({line.split()[2] for line in answer.text.splitlines() if line.startswith("# TYPE")})

    def by_engine(family, ending=""):
        samples = [sample for sample in found[f"martlet:{family}"].samples if sample.name.endswith(ending)]
        assert {sample.labels["model_name"] for sample in samples} <= {'a "model"', "m"}
        return {sample.labels["engine"]: sample.value for sample in samples}

    assert by_engine("num_requests_running") == {"0": 2.0, "1": 2.0}
    assert by_engine("inter_token_latency_seconds", "_count") == {"0": 2.0, "1": 3.0}
    assert by_engine("request_success", "_total") == {"0": 1.0, "1": 1.0}
    assert by_engine("admission_rejections", "_total") == {"0": 1.0}, "the front has seen them all"


@pytest.mark.parametrize(
    ("nodes", "replicas", "each"),
    [
        ([8], 2, 4),
        ([8], 3, 2),
        ([2], 2, 1),
        ([4, 4, 4], 4, 2),
        ([4, 4], 2, 4),
        ([2], 4, 0.5),
        ([2], 3, 0.666),
        ([], 1, 0),
    ],
)
def test_cores_are_divided_among_replicas(nodes, replicas, each):
    assert cpus_each(nodes, replicas) == each


def test_replicas_of_a_machine_keep_to_cores_of_their_own(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {2, 3, 5, 7})
    assert [share(place, 2) for place in range(3)] == [{2, 3}, {5, 7}, {2, 3}]
    assert share(1, 0.5) == {3} and share(0, 0) == {2, 3, 5, 7} == share(5, 64)


def test_every_thread_keeps_to_its_cores():
    code = """
import os, threading
from martlet.server.cores import keep_to
core, gate, seen = min(os.sched_getaffinity(0)), threading.Event(), []
thread = threading.Thread(target=lambda: (gate.wait(), seen.append(os.sched_getaffinity(0))))
thread.start()
keep_to({core})
gate.set()
thread.join()
print(seen == [os.sched_getaffinity(0)] == [{core}])
"""
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "True\n"


def test_without_ray_it_is_told_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(BackendUnavailable, match=r"martlet\[ray\]"):
        from martlet.server import run

        run(ServerOptions("m", port=0, replicas=2))


@pytest.mark.parametrize(
    "words",
    [
        ["--replicas", "0"],
        ["--ray_address", "auto"],
        ["--replica_cpus", "1"],
        ["--replicas", "2", "--replica_cpus", "-1"],
    ],
)
def test_flags_that_make_no_sense_are_refused(words):
    with pytest.raises(UsageError):
        deploy(parse(DeployOptions, words))
