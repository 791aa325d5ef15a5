"""What a native runner refuses by name, torch runs on the same device, and a warning says so."""

import logging

import pytest

from martlet import runners
from martlet.errors import BackendUnavailable
from martlet.hub.card import ModelCard
from martlet.model import families
from martlet.runners import cuda_runner, torch_runner

CARD = ModelCard("m", None, "dummy", "mixtral", config=families.example("mixtral"))


class Torch:
    def __init__(self, card, options, progress):
        self.device = options.device


def refuse(message: str, **more):
    def runner(*_):
        raise BackendUnavailable(message, **more)

    return runner


def test_torch_takes_over_on_the_gpu(monkeypatch, caplog):
    monkeypatch.setattr(cuda_runner, "CudaRunner", refuse("the CUDA runner has no mixtures of experts"))
    monkeypatch.setattr(torch_runner, "TorchRunner", Torch)
    caplog.set_level(logging.WARNING, "martlet")
    assert runners.load(CARD, runners.LoadOptions(device="cuda")).device == "cuda"
    assert "no mixtures of experts; torch runs the model instead, more slowly" in caplog.text


def test_a_missing_gpu_is_no_reason_to_try_torch(monkeypatch):
    monkeypatch.setattr(cuda_runner, "CudaRunner", refuse("no CUDA device is here", param="device"))
    monkeypatch.setattr(torch_runner, "TorchRunner", Torch)
    with pytest.raises(BackendUnavailable, match="no CUDA device"):
        runners.load(CARD, runners.LoadOptions(device="cuda"))
