"""Folders that hold an RWKV as its authors publish it: what is read off the shapes, and what is refused."""

import numpy as np
import pytest
from safetensors.numpy import save_file

from martlet.errors import CheckpointError
from martlet.hub.resolver import card_of

WIDTH, HEADS, HIDDEN = 8, 2, 28


def folder(path, **att):
    names = {f"blocks.{n}.att.{name}": shape for n in range(2) for name, shape in att.items()}
    shapes = {"emb.weight": (11, WIDTH), "blocks.0.ffn.key.weight": (HIDDEN, WIDTH), **names}
    shapes["blocks.0.att.key.weight"] = (WIDTH, WIDTH)
    save_file({name: np.zeros(shape, np.float32) for name, shape in shapes.items()}, path / "model.safetensors")
    return path


FIVE = {"ln_x.weight": (WIDTH,), "time_faaaa": (HEADS, 4), "time_decay": (HEADS, 4), "gate.weight": (WIDTH, WIDTH)}
SIX = FIVE | {"time_maa_x": (1, 1, WIDTH), "time_maa_w1": (WIDTH, 15), "time_decay_w1": (WIDTH, 6)}
SEVEN = {
    "ln_x.weight": (WIDTH,), "r_k": (HEADS, 4), "w1": (WIDTH, 5), "a1": (WIDTH, 6), "v1": (WIDTH, 7), "g1": (WIDTH, 9),
}  # fmt: skip


@pytest.mark.parametrize(
    ("att", "says"),
    [
        (FIVE, {"model_type": "rwkv5", "model_version": "5_2", "head_size": 4, "log_bonus": False}),
        (FIVE | {"time_decay": (HEADS, 1, 1)}, {"model_type": "rwkv5", "model_version": "5_1"}),
        (
            {"ln_x.weight": (WIDTH,), "time_first": (HEADS,), "time_decay": (HEADS,)},
            {"model_type": "rwkv5", "model_version": "5_0", "head_size": 4, "log_bonus": True},
        ),
        (SIX, {"model_type": "rwkv6", "head_size": 4, "mix_low_rank_dim": 3, "decay_low_rank_dim": 6}),
        (SEVEN, {"model_type": "rwkv7", "head_dim": 4, "v_low_rank_dim": 7, "gate_low_rank_dim": 9}),
    ],
)
def test_shapes_tell_the_version_and_the_sizes(att, says, tmp_path):
    card = card_of(folder(tmp_path, **att))
    assert card.family == says["model_type"] and card.format == "safetensors"
    assert says.items() <= card.config.items()
    sizes = {"hidden_size": WIDTH, "vocab_size": 11, "num_hidden_layers": 2, "intermediate_size": HIDDEN}
    assert sizes.items() <= card.config.items()


def test_version_4_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match=r"version 4.*5, 6 and 7"):
        card_of(folder(tmp_path, time_first=(WIDTH,), time_decay=(WIDTH,)))


def test_a_pickle_is_never_read_but_how_to_convert_it_is_told(tmp_path):
    file = tmp_path / "RWKV-5-World-0.1B.pth"
    file.write_bytes(b"\x80\x02}.")
    for path in (file, tmp_path):
        with pytest.raises(CheckpointError, match=r"pickle.*weights_only=True.*safetensors"):
            card_of(path)
