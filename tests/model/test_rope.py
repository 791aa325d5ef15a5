"""Rotary frequencies against transformers."""

import numpy as np
import pytest
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from martlet.model.rope import inverse_frequencies, rotation_table
from martlet.model.spec import Rope, RopeScaling


@pytest.mark.parametrize(("factor", "low", "high", "original"), [(8.0, 1.0, 4.0, 8192), (32.0, 1.5, 3.0, 512)])
def test_llama3_scaling(factor, low, high, original):
    config = LlamaConfig(
        head_dim=128,
        rope_parameters={
            "rope_type": "llama3",
            "rope_theta": 500000.0,
            "factor": factor,
            "low_freq_factor": low,
            "high_freq_factor": high,
            "original_max_position_embeddings": original,
        },
    )
    want, _ = ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")
    found = inverse_frequencies(Rope(500000.0, 128, scaling=RopeScaling("llama3", factor, low, high, original)))
    np.testing.assert_allclose(found, want.numpy(), rtol=1e-5)


def test_table():
    cos, sin = rotation_table(Rope(100.0, 4, scaling=RopeScaling("linear", 2.0)), 3)
    angles = np.array([[0, 0], [0.5, 0.05], [1.0, 0.1]])
    np.testing.assert_allclose(cos, np.cos(angles), rtol=1e-6)
    np.testing.assert_allclose(sin, np.sin(angles), rtol=1e-6)
    assert cos.dtype == np.float32
