"""Engines in processes of their own: ours for real, others with stand-ins for what is not installed here."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import stat
import sys

import pytest

from fake_backend import FakeBackend
from martlet import backends, cli
from martlet.bench import engines, goals, machine, offline, servers, session, timeline, workloads
from martlet.bench.backend_engine import BackendEngine
from martlet.bench.engines import EngineJob
from martlet.bench.precision import bits
from martlet.cli.options import DTYPES
from martlet.errors import MartletError, UsageError

OPENVINO = """
import time

class SchedulerConfig: pass
class GenerationConfig: pass

class Handle:
    def __init__(self, config): self.left, self.new = config.max_new_tokens, []
    def can_read(self): return bool(self.new)
    def read(self):
        class Out: generated_ids, self.new = self.new, []
        return {0: Out}

class ContinuousBatchingPipeline:
    def __init__(self, path, scheduler, device):
        assert path.endswith(("m.gguf", "ir")) and device == "CPU" and scheduler.max_num_seqs == 1
        print("noise on stdout")
        self.open = []
    def add_request(self, number, ids, config):
        assert ids.data.shape[0] == 1 and config.ignore_eos and not config.do_sample
        self.open.append(Handle(config))
        return self.open[-1]
    def has_non_finished_requests(self):
        self.open = [h for h in self.open if h.left]
        return bool(self.open)
    def step(self):
        time.sleep(0.001)
        for h in self.open:
            h.left -= SHORT
            h.new.append(11)
"""

LLAMA_SERVER = """#!{python}
import json, sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

words = dict(zip(sys.argv[1::2], sys.argv[2::2]))

class Handler(BaseHTTPRequestHandler):
    def log_message(self, *args): pass
    def do_GET(self):
        self.send_response(200); self.end_headers()
    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.send_response(200); self.end_headers()
        for i in range(body["n_predict"]):
            event = {{"content": "x", "tokens": [len(body["prompt"]) + i + body["cache_prompt"]]}}
            self.wfile.write(f"data: {{json.dumps(event)}}\\n\\n".encode()); self.wfile.flush()

assert words["--parallel"] == {parallel!r} and words["--model"].endswith(".gguf")
ThreadingHTTPServer(("127.0.0.1", int(words["--port"])), Handler).serve_forever()
"""


@pytest.fixture
def openvino(tmp_path, monkeypatch):
    """A stand-in for openvino and openvino_genai on the path of child processes."""
    (tmp_path / "openvino.py").write_text("class Tensor:\n    def __init__(self, data): self.data = data\n")
    (tmp_path / "openvino_genai.py").write_text(OPENVINO.replace("SHORT", "1"))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    return tmp_path


def test_a_peer_runs_in_its_own_process(openvino):
    job = EngineJob("openvino", "m", "m.gguf")
    result = offline.measure(job, workloads.load("W1"), 3)
    assert result.error is None
    assert [run["new_tokens"] for run in result.runs] == [128] * 3
    assert result.peak_mb > 5 and result.load_seconds > 0 and len(result.fingerprints) == 1


def test_a_start_is_a_process_each(openvino):
    result = offline.measure(EngineJob("openvino", "m", "m.gguf"), workloads.load("start"), 2)
    assert len(result.runs) == 2
    assert all(0.05 < run["start_s"] < 60 for run in result.runs)


def test_answers_of_another_length_are_an_error(openvino):
    text = (openvino / "openvino_genai.py").read_text()
    (openvino / "openvino_genai.py").write_text(text.replace("h.left -= 1", "h.left -= 2"))
    result = offline.measure(EngineJob("openvino", "m", "m.gguf"), workloads.load("W1"), 1)
    assert result.error == "W1: request 0 got 64 tokens, not 128"


def test_a_peer_that_crashes_shows_the_end_of_its_log(openvino):
    (openvino / "openvino_genai.py").write_text("raise RuntimeError('no such CPU')")
    result = offline.measure(EngineJob("openvino", "m", "m.gguf"), workloads.load("W1"), 1)
    assert "the process ended with code 1" in result.error and "no such CPU" in result.error
    assert (
        "is measured on .gguf files" in offline.measure(EngineJob("openvino", "m", "m"), workloads.load("W1"), 1).error
    )


def test_llama_server_is_started_asked_and_stopped(tmp_path, monkeypatch):
    program = tmp_path / "llama-server"
    program.write_text(LLAMA_SERVER.format(python=sys.executable, parallel="16"))
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    assert engines.missing("llama.cpp") is None
    for share in (False, True):
        job = EngineJob("llama.cpp", "m", "m.gguf", share_prefixes=share)
        engine = engines.load(job)
        try:
            got = engine.run([(1, 2, 3), (4, 5)], 3, "s")
        finally:
            engine.close()
        assert [t.tokens for t in got] == [[3 + share, 4 + share, 5 + share], [2 + share, 3 + share, 4 + share]]
        assert [t.prompt_tokens for t in got] == [3, 2]


def test_a_server_that_does_not_come_up_shows_its_log(tmp_path, monkeypatch):
    program = tmp_path / "llama-server"
    program.write_text("#!/bin/sh\necho cannot read the model\nexit 3\n")
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    result = servers.measure_http(EngineJob("llama.cpp", "m", "m.gguf"), workloads.load("W5"), 1)
    assert "did not come up:\ncannot read the model" in result.error


def test_a_backend_is_timed_by_its_outputs(monkeypatch):
    backend = FakeBackend()
    monkeypatch.setattr(backends, "load", lambda *words, **more: backend)
    engine = BackendEngine(EngineJob("native", "m", "m", concurrency=4))
    got = engine.run([list(b"abc"), list(b"xyz"), list(b"q")], 5, "s")
    assert [bytes(t.tokens) for t in got] == [b"abcab", b"xyzxy", b"qqqqq"]
    assert all(t.times == sorted(t.times) and t.counts == [1] * 5 for t in got)
    backend.runner.fail_on = b"poison"
    with pytest.raises(RuntimeError, match="injected failure"):
        engine.run([list(b"poison")], 5, "t")
    engine.close()
    assert backend.runner.closed


def test_an_engine_that_is_not_here_is_skipped_in_one_line(monkeypatch, capsys):
    monkeypatch.setattr(engines, "missing", lambda name: "not in this test")
    assert cli.main(["bench", "cpu", "--engines", "vllm,openvino"]) == 2
    said = capsys.readouterr().err.splitlines()
    assert said[0] == "vllm is skipped: not in this test"
    assert said[-1] == "martlet: error: none of these engines is installed"


def test_the_native_engine_starts_from_the_command_line(tmp_path, capsys):
    output = tmp_path / "out.jsonl"
    words = [
        "--quiet_seconds",
        "0",
        "--engines",
        "native",
        "--workloads",
        "start",
        "--runs",
        "1",
        "--output",
        str(output),
    ]
    assert cli.main(["bench", "cpu", *words]) == 0
    assert "start, s" in capsys.readouterr().out
    row = json.loads(output.read_text())
    assert row["engine"] == "native q4_1" and row["installed_mb"] > 10 and row["noise"]["before"] >= 1
    assert (
        row["kind"] == "native"
        and str(tmp_path) not in output.read_text()
        and row["figures"]["start_s"] > 0
        and row["peak_mb"] > 100
    )
    assert set(row) >= {f.name for f in dataclasses.fields(offline.Result)} | {"machine", "command", "time"}


def test_a_word_of_engines_is_read_whole():
    word = engines.parse("native:int8@W1+W3=some/folder")
    assert word == engines.Entry("native", "int8", ("W1", "W3"), "some/folder")
    assert engines.parse("llama.cpp=C:a=b.gguf").model == "C:a=b.gguf"
    for bad, why in (("natve", "Did you mean"), ("openvino:int8", "what its file holds"), ("native@=x", "wants NAME")):
        with pytest.raises(UsageError, match=why):
            engines.parse(bad)


def test_a_job_knows_what_its_weights_run_in(tmp_path):
    (tmp_path / "config.json").write_text('{"torch_dtype": "float16"}')

    def made(word, quant=None):
        job = engines.job(engines.parse(word), "m", tmp_path, DTYPES, "auto", quant, "cpu")
        return job.label, job.quant, bits(job.weights)

    assert made("native") == ("native float16", None, 16)
    assert made("native", "int4") == ("native int4", "int4", 4)
    assert made("native:bfloat16", "int4") == ("native bf16", "bf16", 16)
    assert made("reference:fp32", "int4") == ("reference float32", None, 32)
    with pytest.raises(UsageError, match="native:q9 is none of"):
        made("native:q9")
    (tmp_path / "openvino_model.xml").write_text('<data element_type="u8"/>')
    assert made("openvino") == ("openvino int8", None, 8)


def test_runs_stop_before_they_take_too_long():
    assert not timeline.enough([], 0.0)
    assert not timeline.enough([{"seconds": 2.0}] * 2, 6.0)
    assert timeline.enough([{"seconds": 2.0}] * 2, 5.9)
    assert not timeline.enough([{"seconds": 9e9}], None)


def test_another_python_sees_this_package_and_nothing_else():
    with offline.source_path("another") as path:
        folder = path["PYTHONPATH"].split(os.pathsep)[0]
        assert os.listdir(folder) == ["martlet"]
    with offline.source_path(sys.executable) as path:
        assert path == {}


def test_a_session_takes_turns_and_cuts_what_is_long(openvino, monkeypatch):
    folder = openvino / "ir"
    folder.mkdir()
    (folder / "openvino_model.xml").write_text("")
    here = [EngineJob("openvino", "x/m", str(folder), label=name) for name in ("one", "two")]
    here[1] = here[1]._replace(only=("start",))
    told = []
    plan = session.Plan(("start", "W1", "W5"), 2, seconds=0.0)
    results = session.measure_all(here, plan, told.append)
    assert [(r.engine, r.workload, len(r.runs), r.note, r.error) for r in results] == [
        ("one", "start", 2, None, None),
        ("two", "start", 2, None, None),
        ("one", "W1", 1, "1 of 2 runs", None),
    ]
    assert told == results and all(r.model == "m" and r.noise["after"] >= 1 for r in results)


def test_an_engine_that_fails_in_any_way_is_a_note_beside_the_others(monkeypatch):
    """Also when it fails in the middle, and with an error that nobody thought of."""
    calls = []

    def measure(job, workload, *rest):
        calls.append((job.label, workload.name))
        if job.label == "bad":
            raise ValueError("a line that is | no JSON\nand more")
        return dataclasses.replace(offline.result_of(job, workload.name), runs=[{"seconds": 1.0, "decode_tok_s": 2.0}])

    monkeypatch.setattr(session, "measure", measure)
    monkeypatch.setattr(session, "measure_http", measure)
    jobs = [EngineJob("native", "m", "m", label=label) for label in ("good", "bad", "also good")]
    results = session.measure_all(jobs, session.Plan(("W1", "W5"), 1), lambda result: None)
    assert len(calls) == 6
    assert [(r.engine, r.error is None) for r in results] == 2 * [("good", True), ("bad", False), ("also good", True)]
    rows = [dataclasses.asdict(r) | {"time": "", "command": "", "machine": machine.describe()} for r in results]
    text = goals.markdown(rows)
    assert "W1: failed: ValueError: a line that is / no JSON; W5: failed" in text and "| failed |" in text


def test_a_server_that_dies_after_some_runs_keeps_their_figures(monkeypatch):
    from martlet.bench import http, serving

    server = serving.Server(1, None, 2.0)
    monkeypatch.setattr(serving.Server, "peak_mb", 7.0)
    monkeypatch.setattr(serving, "serving", lambda words, env: contextlib.nullcontext(server))
    answers = iter([[], [], [], MartletError("it is gone\nand here is why")])

    def measure(*words):
        answer = next(answers)
        if isinstance(answer, MartletError):
            raise answer
        return answer

    monkeypatch.setattr(http, "measure", measure)
    monkeypatch.setattr(http, "check", lambda *words: None)
    monkeypatch.setattr(servers, "figures", lambda timelines: {"seconds": 1.0})
    result = servers.measure_http(EngineJob("native", "m", "m"), workloads.load("W5"), 5)
    assert result.error is None and len(result.runs) == 2 and result.peak_mb == 7.0
    assert result.note == "run 3 failed: it is gone"
