"""Reading configs: every spelling Hugging Face has used, and refusals that name what is wrong."""

import pytest

from martlet.errors import CheckpointError, ModelNotFound
from martlet.model import families
from martlet.model.spec import Rope, RopeScaling

SMALL = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "vocab_size": 100,
}


def read(family: str, **config):
    return families.get(family).read({"model_type": family} | SMALL | config)


def test_unknown_family_names_the_known_ones():
    with pytest.raises(ModelNotFound, match=r"llama, mistral, qwen2, qwen3.*Did you mean llama"):
        families.get("lama")
    assert families.names() == ("llama", "mistral", "qwen2", "qwen3")
    for name in families.names():
        assert families.get(name).name == name


def test_llama_defaults():
    spec = read("llama")
    attention = spec.layers[3].mixer
    assert (spec.width, len(spec.layers), spec.vocab_size, spec.tied, spec.eps) == (64, 4, 100, False, 1e-6)
    assert (attention.heads, attention.kv_heads, attention.head_dim, attention.window) == (8, 8, 8, None)
    assert attention.rope == Rope(10000.0, 8) and attention.scale == 8**-0.5
    assert not attention.qkv_bias and not attention.out_bias and not spec.layers[0].mlp.bias


def test_llama_biases():
    spec = read("llama", attention_bias=True, mlp_bias=True, num_key_value_heads=2, head_dim=16)
    attention = spec.layers[0].mixer
    assert attention.qkv_bias and attention.out_bias and spec.layers[0].mlp.bias
    assert (attention.q_size, attention.kv_size) == (128, 32)
    assert spec.kv_elements_per_token == 4 * 2 * 32


@pytest.mark.parametrize(
    ("config", "rope"),
    [
        ({"rope_theta": 5e5}, Rope(5e5, 8)),
        ({"rope_parameters": {"rope_theta": 1e6, "rope_type": "default"}}, Rope(1e6, 8)),
        ({"rope_theta": 1e5, "rope_scaling": None}, Rope(1e5, 8)),
        ({"rope_scaling": {"type": "linear", "factor": 2}}, Rope(1e4, 8, scaling=RopeScaling("linear", 2.0))),
        (
            {
                "rope_theta": 5e5,
                "rope_scaling": {
                    "rope_type": "llama3",
                    "factor": 32.0,
                    "low_freq_factor": 1.0,
                    "high_freq_factor": 4.0,
                    "original_max_position_embeddings": 8192,
                },
            },
            Rope(5e5, 8, scaling=RopeScaling("llama3", 32.0, 1.0, 4.0, 8192)),
        ),
        ({"partial_rotary_factor": 0.5}, Rope(1e4, 4)),
    ],
)
def test_rope_spellings(config, rope):
    assert read("llama", **config).layers[0].mixer.rope == rope


def test_mistral_window():
    assert [layer.mixer.window for layer in read("mistral", sliding_window=7).layers] == [7] * 4
    assert read("mistral", sliding_window=None).layers[0].mixer.window is None
    assert read("mistral").layers[0].mixer.window == 4096  # the default of Hugging Face's own config


def test_qwen_windows():
    def windows(family, **config):
        return [layer.mixer.window for layer in read(family, **config).layers]

    for family in ("qwen2", "qwen3"):
        assert windows(family, sliding_window=9) == [None] * 4
        assert windows(family, sliding_window=9, use_sliding_window=True, max_window_layers=3) == [None] * 3 + [9]
        assert windows(family, sliding_window=9, use_sliding_window=True) == [None] * 4  # from layer 28 on
        kinds = ["sliding_attention", "full_attention"] * 2
        assert windows(family, sliding_window=9, use_sliding_window=True, layer_types=kinds) == [9, None] * 2


def test_qwen_attention():
    two, three = read("qwen2").layers[0].mixer, read("qwen3").layers[0].mixer
    assert two.qkv_bias and not two.out_bias and not two.qk_norm and two.head_dim == 8
    assert not three.qkv_bias and three.qk_norm and three.head_dim == 128


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"hidden_size": None}, "hidden_size"),
        ({"hidden_act": "relu6"}, "relu6.*silu"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "yarn.*llama3"),
    ],
)
def test_what_cannot_run_is_named(config, message):
    with pytest.raises(CheckpointError, match=message):
        read("llama", **config)
