"""Two real replicas under Ray: one is killed under load, and only what it ran is lost (make test-ray)."""

from __future__ import annotations

import contextlib
import json
import signal
import subprocess
import sys
import threading
from collections import Counter

import httpx
import psutil
import pytest
from live_server import until
from prometheus_client.parser import text_string_to_metric_families

from martlet.server.sockets import bind

pytestmark = [pytest.mark.ray, pytest.mark.slow]

SMALL = ["--max_model_len", "512", "--kv_cache_tokens", "8192", "--max_num_seqs", "8", "--device", "cpu"]
CLIENTS, TOKENS = 12, 200


@pytest.fixture
def replicas():
    """The process of `martlet deploy --replicas 2` and its address."""
    with bind("127.0.0.1", 0) as free:
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "martlet", "deploy", "--replicas", "2", "--port", str(port), *SMALL]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    try:
        url = f"http://127.0.0.1:{port}"
        until(lambda: process.poll() is not None or running(url) == 2, 120)
        yield process, url
    finally:
        with contextlib.suppress(psutil.NoSuchProcess):
            for child in (*psutil.Process(process.pid).children(recursive=True), process):
                child.kill()
        process.wait()


def running(url: str) -> int:
    """Replicas that /health counts; 0 while nobody listens."""
    with contextlib.suppress(httpx.TransportError):
        return int(httpx.get(url + "/health", timeout=30).json()["detail"].split()[0])
    return 0


def processes(parent: int) -> set[int]:
    return {
        child.pid for child in psutil.Process(parent).children(recursive=True) if "ServeReplica" in child.cmdline()[0]
    }


def body(number: int, **more) -> dict:
    asked = {"role": "user", "content": f"Tell me about the number {number}."}
    return {"messages": [asked], "temperature": 0, "max_tokens": TOKENS, "ignore_eos": True, **more}


def solo(url: str, number: int) -> str:
    answer = httpx.post(url + "/v1/chat/completions", json=body(number), timeout=120)
    assert answer.status_code == 200, answer.text
    return answer.json()["choices"][0]["message"]["content"]


def ask_shortly(url: str) -> int:
    return httpx.post(url + "/v1/chat/completions", json=body(99, max_tokens=2), timeout=60).status_code


def replaced(parent: int, victim: int) -> bool:
    found = processes(parent)
    return len(found) == 2 and victim not in found


class Client(threading.Thread):
    """Streams one answer. end: "done", or the code of the error that ended it."""

    def __init__(self, url: str, number: int):
        super().__init__(daemon=True)
        self.url, self.number, self.text, self.end = url, number, "", ""

    def run(self) -> None:
        asked = body(self.number, stream=True)
        with httpx.stream("POST", self.url + "/v1/chat/completions", json=asked, timeout=120) as answer:
            if answer.status_code != 200:
                answer.read()
                self.end = answer.json()["error"]["code"]
                return
            for line in answer.iter_lines():
                if line == "data: [DONE]":
                    self.end = "done"
                elif line:
                    event = json.loads(line.removeprefix("data: "))
                    if "error" in event:
                        self.end = event["error"]["code"]
                    else:
                        self.text += event["choices"][0]["delta"].get("content") or ""


def test_a_killed_replica_loses_only_its_requests_and_is_replaced(replicas):
    process, url = replicas
    wanted = {number: solo(url, number) for number in range(CLIENTS)}
    before = processes(process.pid)
    assert len(before) == 2
    assert len({tuple(psutil.Process(pid).cpu_affinity()) for pid in before}) == min(2, psutil.cpu_count())

    clients = [Client(url, number) for number in range(CLIENTS)]
    for client in clients:
        client.start()
    until(lambda: all(client.text for client in clients), 60)
    victim = min(before)
    psutil.Process(victim).kill()
    seen = []
    until(lambda: seen.append(ask_shortly(url)) or (replaced(process.pid, victim) and running(url) == 2), 60)
    for client in clients:
        client.join(120)
    ends = Counter(client.end for client in clients)
    assert set(ends) == {"done", "replica_died"}, ends
    assert all(client.text == wanted[client.number] for client in clients if client.end == "done")
    assert all(wanted[client.number].startswith(client.text) for client in clients), "what came before was right"
    assert set(seen) == {200}, "the endpoint stayed up"

    after = processes(process.pid)
    assert len(after) == 2 and len(after & before) == 1, "the dead one was replaced, the other one runs on"
    assert {number: solo(url, number) for number in range(4)} == {number: wanted[number] for number in range(4)}
    families = {each.name: each for each in text_string_to_metric_families(httpx.get(url + "/metrics").text)}
    engines = {sample.labels["engine"]: sample.value for sample in families["martlet:kv_cache_usage_perc"].samples}
    assert engines == {"0": 0.0, "1": 0.0}

    family = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 0
    _, alive = psutil.wait_procs(family, timeout=20)
    assert alive == []
