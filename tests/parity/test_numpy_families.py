"""Families that transformers lacks: our logits against an independent NumPy model of each."""

import numpy as np
import pytest
from numpy_models import CONFIGS, SHAPES, VOCAB, random_weights
from safetensors.numpy import save_file
from tiny_models import compare

from martlet.hub.card import ModelCard
from martlet.model.families import baichuan


@pytest.mark.parametrize("model", SHAPES, ids=lambda model: model.__name__)
def test_logits_equal_those_of_numpy(model, tmp_path, monkeypatch):
    monkeypatch.setattr(baichuan, "VOCAB_OF_TWO", VOCAB)  # the second generation's is too large for a test
    weights = random_weights(model)
    save_file(weights, tmp_path / "model.safetensors")
    config = CONFIGS[model]
    card = ModelCard(model.__name__, tmp_path, "safetensors", config["model_type"], config=config)
    plain = {name: tensor.astype(np.float64) for name, tensor in weights.items()}

    def reference(text):
        logits = model(plain, text)
        logits -= logits.max(-1, keepdims=True)
        return (logits - np.log(np.exp(logits).sum(-1, keepdims=True))).astype(np.float32)

    compare(card, reference)
