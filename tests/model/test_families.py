"""Reading configs: every spelling Hugging Face has used, and refusals that name what is wrong."""

import pytest

from martlet.chat.catalogue import names as chat_templates
from martlet.errors import CheckpointError, ModelNotFound
from martlet.hub import registry
from martlet.model import families, weights
from martlet.model.spec import Rope, RopeScaling

SMALL = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "vocab_size": 100,
}

LONG = {"max_position_embeddings": 8192, "original_max_position_embeddings": 4096}


def read(family: str, **config):
    return families.get(family).read({"model_type": family} | SMALL | config)


def test_unknown_family_names_the_known_ones():
    with pytest.raises(ModelNotFound, match=r"baichuan.*llama, mistral.*qwen3.*Did you mean llama"):
        families.get("lama")


@pytest.mark.parametrize("name", families.names())
def test_a_page_is_complete(name):
    page = families.get(name)
    assert page.name == name and page.about
    spec = page.read(families.example(name))
    assert 1_000 < weights.num_parameters(spec) < 200_000
    assert spec.family in (name, "gemma3_text") and 2 <= len(spec.layers) <= 4


OTHERS = families.ENCODERS
DECODERS = [entry for entry in registry.registered() if not entry.family.startswith(OTHERS)]


@pytest.mark.parametrize("entry", DECODERS, ids=lambda entry: entry.name)
def test_registered_models_have_a_page_and_targets_that_are_its_linears(entry):
    page = families.get(entry.family)
    spec = page.read(families.example(entry.family))
    linears = [p.name for p in weights.parameters(spec) if p.kind == "linear"]
    modules = {page.source(spec, name, "safetensors").name.split(".")[-2] for name in linears}
    assert set(entry.lora_target_modules) <= modules and entry.lora_target_modules
    assert entry.template is None or entry.template in chat_templates()


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
        ({"rope_scaling": {"rope_type": "proportional", "factor": 4.0}}, "proportional.*llama3.*yarn"),
    ],
)
def test_what_cannot_run_is_named(config, message):
    with pytest.raises(CheckpointError, match=message):
        read("llama", **config)


@pytest.mark.parametrize(
    ("family", "config", "message"),
    [
        ("baichuan", {"num_hidden_layers": 40, "max_position_embeddings": 4096}, "ALiBi"),
        ("baichuan", {"model_max_length": 4096}, "ALiBi"),
        ("chatglm", {"add_bias_linear": True}, "add_bias_linear"),
        ("qwen", {"no_bias": False}, "no_bias"),
        ("phi3", {"rope_scaling": {"type": "longrope", "short_factor": [1.0]}, **LONG}, "long_factor"),
    ],
)
def test_what_a_family_cannot_run_is_named(family, config, message):
    with pytest.raises(CheckpointError, match=message):
        read(family, **config)


def test_gemma3_layers():
    spec = read("gemma3_text", num_hidden_layers=7, sliding_window=5)
    assert [layer.mixer.window for layer in spec.layers] == [5] * 5 + [None, 5]
    assert [layer.mixer.rope.base for layer in spec.layers] == [1e4] * 5 + [1e6, 1e4]
    assert spec.embedding_scale == 8.0 and spec.tied and spec.layers[0].mixer.scale == 1 / 16
    assert all(layer.post_norms and layer.mixer.qk_norm for layer in spec.layers)


def test_gemma3_scales_global_layers_only():
    spec = read("gemma3_text", num_hidden_layers=6, rope_scaling={"rope_type": "linear", "factor": 8.0})
    assert spec.layers[0].mixer.rope == Rope(1e4, 256)
    assert spec.layers[5].mixer.rope == Rope(1e6, 256, scaling=RopeScaling("linear", 8.0))


def test_the_first_qwen_ends_where_its_special_cases_begin():
    spec = read("qwen", seq_length=2048, max_position_embeddings=8192, kv_channels=8, intermediate_size=200)
    assert spec.max_positions == 2048 and spec.layers[0].mlp.hidden == 100 and spec.layers[0].mixer.qkv_bias


def test_yarn_stretches_the_longest_sequence():
    scaling = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}
    spec = read("qwen2", rope_scaling=scaling, max_position_embeddings=32768)
    assert spec.max_positions == 131072 and spec.layers[0].mixer.rope.scaling.magnitude == pytest.approx(1.1386, 1e-3)


def test_experts_where_the_config_has_them():
    spec = read("qwen2_moe", num_experts=8, moe_intermediate_size=16, decoder_sparse_step=2, mlp_only_layers=[3])
    assert [layer.mlp.experts is not None for layer in spec.layers] == [False, True, False, False]
    assert spec.layers[1].mlp.hidden == 16 and spec.layers[0].mlp.hidden == 96
    assert spec.layers[1].mlp.experts.shared == 5632 and not spec.layers[1].mlp.experts.renormalise
