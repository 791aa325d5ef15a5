"""Every family that transformers has: our logits against its, in float32, over a prompt in chunks and some decoding.

The sequence is longer than the windows, so caches are written, read and left behind.
"""

import pytest
from tiny_models import MODELS, compare, make, reference_logprobs

from martlet.model import families


def test_every_family_is_compared_with_something():
    ours = {"qwen", "chatglm", "internlm2", "baichuan"}  # test_numpy_families.py
    ours |= {"rwkv5", "rwkv6", "rwkv7"}  # test_rwkv.py
    same = {"llama3", "gemma3"}  # gemma3 is gemma3_text under other names: tests/model/test_weights.py
    assert {name.split("-")[0] for name in MODELS} | ours | same == set(families.names()) | same


@pytest.mark.parametrize("name", MODELS)
def test_logits_equal_those_of_transformers(name, tmp_path):
    card, model = make(name, tmp_path)
    compare(card, lambda tokens: reference_logprobs(model, tokens))
