"""`martlet bench gpu` without a GPU: the same code on small shapes and a CPU, and the verdicts on made-up figures."""

from __future__ import annotations

import random
import sys

import pytest

from martlet import cli
from martlet.bench.gpu import report, session, shapes

TINY = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 32768, "hidden_size": 64,
    "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32,
    "max_position_embeddings": 16384, "rms_norm_eps": 1e-5, "rope_theta": 1e4, "hidden_act": "silu",
}  # fmt: skip


@pytest.fixture
def tiny(monkeypatch):
    monkeypatch.setitem(shapes.SHAPES, "tiny", TINY)


def measured(words: tuple[str, ...], workloads: tuple[str, ...], clients: tuple[int, ...] = ()) -> dict:
    plan = session.Plan(("tiny",), workloads, clients, seconds=120.0, device="cpu")
    results = session.measure_all([session.parse(word) for word in words], plan, lambda _: None)
    assert [result.error for result in results] == [None] * len(results)
    return {(result.engine, result.workload): result.figures for result in results}


def test_one_stream_prefill_and_start_in_a_process_of_the_engine(tiny):
    found = measured(("native",), ("start", "G2"))
    assert list(found) == [("native", "start"), ("native", "G2")]
    assert 0 < found["native", "start"]["load_s"] < found["native", "start"]["start_s"]
    assert found["native", "G2"]["ttft_ms"] > 0 and found["native", "G2"]["token_ms"] > 0


def test_streams_over_http_with_a_made_up_tokenizer(tiny, monkeypatch):
    monkeypatch.setattr(shapes, "SERVED_VOCABULARY", 2048)
    found = measured(("native",), ("G5",), clients=(2,))
    assert found["native", "G5 x2"]["new_tokens"] == 8 * 128 and found["native", "G5 x2"]["output_tok_s"] > 0


def test_an_engine_that_ends_is_told_of_with_what_it_said(tiny, monkeypatch):
    monkeypatch.setitem(shapes.SHAPES, "tiny", TINY | {"model_type": "no such family"})
    plan = session.Plan(("tiny",), ("G2", "G5"), (1,), seconds=60.0, device="cpu")
    results = session.measure_all([session.parse("native")], plan, lambda _: None)
    assert [result.workload for result in results] == ["G2", "G5"]
    assert all("no such family" in result.error for result in results)


def test_prompts_are_those_of_the_recorded_run():
    numbers, prompts = random.Random(0), shapes.Prompts()
    assert prompts.ids(3) == [numbers.randint(0, 31999) for _ in range(3)]
    assert prompts.length() == numbers.randint(100, 1024)
    assert len(shapes.served_prompts(4)) == 4 and {len(ids) for ids in shapes.served_prompts(4)} == {256}


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--engines", "nativ"], "Did you mean native"),
        (["--engines", "vllm:fp8"], "native:fp8_kv"),
        (["--engines", "native@G9"], "there are start, G1"),
        (["--workloads", "G7"], "there are start, G1"),
        (["--models", "gpt"], "qwen3-0.6b, llama3-8b"),
        (["--clients", "0"], "from 1 on"),
    ],
)
def test_what_cannot_be_measured_is_refused_before_anything_starts(words, said, capsys):
    assert cli.main(["bench", "gpu", *words]) != 0
    assert said in capsys.readouterr().err.replace("\n", " ")


def row(engine: str, workload: str, **figures: float) -> dict:
    common = {"time": "now", "command": "martlet bench gpu", "machine": {"gpus": ["a GPU"], "commit": "abc"}}
    return {"engine": engine, "model": "llama3-8b", "workload": workload, "runs": [figures], "error": None, **common}


def verdicts(*rows: dict) -> dict[str, list[str]]:
    lines = report.markdown(rows).split("## Goals")[1].split("##")[0].strip().splitlines()[2:]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return {line[1]: line[2:] for line in cells}


def test_goals_are_beside_the_peer_of_the_same_run_or_else_the_recorded_one():
    ours = row("native", "G3", prefill_tok_s=41000.0)
    assert verdicts(ours)["G3 prefill, tok/s"] == ["41,000", "40,910 vLLM (recorded)", "1.002", "at least 1.02", "no"]
    theirs = row("vllm", "G3", prefill_tok_s=40000.0)
    assert verdicts(ours, theirs)["G3 prefill, tok/s"] == ["41,000", "40,000 vLLM", "1.025", "at least 1.02", "yes"]
    found = verdicts(row("native", "G2", ttft_ms=11.0, token_ms=4.5), row("native", "G1", output_tok_s=10000.0))
    assert found["G2 time to first token, ms"][-1] == "yes" and found["G2 between tokens, ms"][-1] == "no"
    fast = row("native:fp8_kv", "G1", output_tok_s=11500.0)
    found = verdicts(row("native", "G1", output_tok_s=10000.0), fast, row("native", "G6", kept=0.93))
    assert found["G1 output, tok/s, fp8_kv"] == ["11,500", "10,000 native", "1.150", "at least 1.1", "yes"]
    assert found["G6 kept with 16 adapters"] == ["0.93", "-", "0.930", "at least 0.9", "yes"]


def test_engines_that_are_not_here_are_skipped_by_name(monkeypatch):
    monkeypatch.setitem(sys.modules, "vllm", None)
    told: list[str] = []
    entries = session.installed([session.parse("native"), session.parse("vllm")], told.append)
    assert [entry.name for entry in entries] == ["native"] and told == [
        "vllm is skipped: the package vllm is not installed"
    ]
