"""martlet infer around an echo model: one prompt, and what reaches the engine."""

from __future__ import annotations

import io
import sys

import pytest

from fake_backend import FakeBackend, FakeTemplate
from martlet import cli
from martlet.cli import infer
from martlet.cli.flags import parse
from martlet.cli.infer import InferOptions
from martlet.cli.options import Loaded, sampling_settings


@pytest.fixture
def echo(monkeypatch):
    """The command answers with what it is asked; gives the requests that reach the engine."""
    seen = []

    class Backend(FakeBackend):
        def submit(self, requests, sink):
            seen.extend(requests)
            super().submit(requests, sink)

    def load(*_):
        return Loaded(Backend(), FakeTemplate(), {"temperature": 0.0})

    monkeypatch.setattr(infer, "load", load)
    return seen


@pytest.mark.parametrize("stream", ["true", "false"])
def test_a_prompt_is_answered_on_stdout_alone(echo, capsys, stream):
    assert cli.main(["infer", "--prompt", "Grüße 👋", "--stream", stream]) == 0
    said = capsys.readouterr()
    assert (said.out, said.err) == ("Grüße 👋\n", "")
    assert echo[0].stream is (stream == "true")


def test_the_prompt_may_come_from_stdin(echo, capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("two\nlines"))
    assert cli.main(["infer", "--prompt", "-"]) == 0
    assert capsys.readouterr().out == "two\nlines\n"


def test_flags_reach_the_request(echo, capsys):
    words = ["--max_new_tokens", "3", "--stop_words", "x", "yy", "--temperature", "0.5", "--top_k", "9", "--seed", "7"]
    assert cli.main(["infer", "--prompt", "abcdef", "--system", "Be kind.", *words, "--repetition-penalty=1.1"]) == 0
    request = echo[0]
    params = request.params
    assert bytes(request.prompt_token_ids).startswith(b"system\x02Be kind.\x03user\x02abcdef")
    assert (params.max_tokens, params.temperature, params.top_k, params.seed) == (3, 0.5, 9, 7)
    assert params.repetition_penalty == 1.1
    assert params.stop == ("x", "yy", *FakeTemplate.stop)
    assert params.stop_token_ids == FakeTemplate.stop_ids


def test_a_base_model_continues_the_text(monkeypatch, capsys):
    backend = FakeBackend()
    monkeypatch.setattr(infer, "load", lambda *_: Loaded(backend, None, {"temperature": 0.0}))
    assert cli.main(["infer", "--prompt", "abc", "--verbose"]) == 0
    said = capsys.readouterr()
    assert said.out == "abc\n"
    assert said.err.startswith("[3 prompt tokens;")  # the bare text, no role around it


def test_an_answer_ends_where_the_context_does(echo, capsys):
    assert cli.main(["infer", "--prompt", "abc"]) == 0
    assert echo[0].params.max_tokens == 512 - len(echo[0].prompt_token_ids)


def test_a_prompt_too_long_names_both_lengths(echo, capsys):
    assert cli.main(["infer", "--prompt", "x" * 600]) == 2
    said = capsys.readouterr().err
    assert "606 tokens" in said and "512" in said


def test_verbose_tells_the_pace(echo, capsys):
    cli.main(["infer", "--prompt", "abc", "--verbose"])
    assert capsys.readouterr().err.startswith("[9 prompt tokens; 4 tokens, first after 0.")


@pytest.mark.parametrize(
    ("words", "own", "temperature"),
    [
        ([], {"temperature": 0.0}, 0.0),
        ([], {"temperature": 0.6, "top_p": 0.9}, 0.6),
        (["--temperature", "0"], {"temperature": 0.6}, 0.0),
        (["--top_k", "20"], {"temperature": 0.0}, 1.0),
        (["--top_p", "0.8"], {"temperature": 0.6}, 0.6),
        (["--do_sample"], {"temperature": 0.0}, 1.0),
        (["--do_sample", "--temperature", "0"], {"temperature": 0.6}, 0.0),
        (["--do_sample", "false"], {"temperature": 0.6}, 0.0),
        (["--do_sample", "false", "--temperature", "2"], {"temperature": 0.6}, 0.0),
    ],
)
def test_sampling_follows_flags_then_the_model_then_greedy(words, own, temperature):
    settings = sampling_settings(parse(InferOptions, words), own)
    assert settings["temperature"] == temperature
    assert settings.get("top_p") == (0.8 if "0.8" in words else own.get("top_p"))
