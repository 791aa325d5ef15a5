from __future__ import annotations

import importlib.util
import logging
import sys

import pytest

from fake_backend import FakeBackend, fake_card
from martlet import backends, hub
from martlet.backends import generation_defaults, native
from martlet.engine.request import Request
from martlet.errors import BackendUnavailable, CheckpointError, UsageError
from martlet.sampling_params import SamplingParams


@pytest.fixture
def echo(monkeypatch):
    """backends.load gives an echo backend where it would load the native one."""
    monkeypatch.setattr(hub, "load_tokenizer", lambda card: None)
    monkeypatch.setattr(native, "load_native", lambda card, *_: FakeBackend(card=card))


@pytest.mark.parametrize("name", ["native", "auto", "AUTO"])
def test_names_of_the_native_backend(echo, name):
    backend = backends.load(fake_card(), backend=name)
    assert backend.name == "native"
    backend.close()


def test_an_unknown_backend_names_the_nearest():
    with pytest.raises(UsageError, match="Did you mean native") as caught:
        backends.load(fake_card(), backend="nativ")
    assert caught.value.param == "infer_backend"


def test_without_vllm_the_native_engine_runs_and_says_so(echo, caplog, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with caplog.at_level(logging.WARNING):
        backend = backends.load(fake_card(), backend="vllm")
    backend.close()
    assert backend.name == "native"
    assert [r.getMessage() for r in caplog.records] == [
        "vllm is not installed here (pip install vllm); the native engine runs the model instead"
    ]


def test_without_transformers_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(BackendUnavailable, match=r"martlet\[transformers\]"):
        backends.load(fake_card(), backend="pt")


def test_generation_defaults_are_what_differs_from_ours():
    config = {"temperature": 0.6, "top_p": 1.0, "top_k": 20, "repetition_penalty": None, "eos_token_id": 2, "x": 1}
    assert generation_defaults(fake_card(generation_config=config)) == {"temperature": 0.6, "top_k": 20}
    assert generation_defaults(fake_card()) == {}
    with pytest.raises(CheckpointError, match=r"generation_config.json of echo: top_p"):
        generation_defaults(fake_card(generation_config={"top_p": 7}))


def test_leaving_generate_early_aborts_the_rest():
    backend = FakeBackend()
    params = SamplingParams(temperature=0, max_tokens=None, ignore_eos=True)
    for output in backend.generate([Request("a", [65], params, stream=True), Request("b", [66], params)]):
        assert output.request_id == "a"
        break
    backend.close()
    assert backend.stats().finished == {"abort": 2}


def test_the_room_needs_no_torch():
    code = "import sys, martlet.backends.native, martlet.server.app; print('torch' in sys.modules)"
    import subprocess

    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "False\n"
