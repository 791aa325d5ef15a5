"""The World tokenizer against the authors' own, on the vocabulary that travels in their package."""

import importlib.util
import random
import sys
from pathlib import Path

import pytest

from martlet.engine.detokenizer import Detokenizer
from martlet.errors import CheckpointError
from martlet.hub.card import ModelCard
from martlet.hub.tokenizer import WORLD_SIZE, load_tokenizer
from martlet.hub.world_tokenizer import WorldTokenizer, find_vocabulary, read_vocabulary
from martlet.sampling_params import SamplingParams


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """As a World model without a vocabulary of its own gets it: from the package, through our cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        folder = tmp_path_factory.mktemp("model")
        return load_tokenizer(ModelCard("w", folder, "safetensors", "rwkv5", config={"vocab_size": WORLD_SIZE}))


@pytest.fixture(scope="module")
def theirs():
    path = importlib.util.find_spec("rwkv").submodule_search_locations[0]
    spec = importlib.util.spec_from_file_location("rwkv_tokenizer", path + "/rwkv_tokenizer.py")
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.TRIE_TOKENIZER(path + "/rwkv_vocab_v20230424.txt")


@pytest.mark.parametrize(
    ("text", "ids"),
    [
        ("Hello world", [33155, 40213]),
        ("你好!", [10464, 11685, 34]),
        ("User: hi\n\nAssistant:", [24281, 59, 4571, 261, 5585, 41693, 59]),
        ("\n\n", [261]),
        ("  def f(x):\n", [267, 7334, 337, 41, 121, 501, 11]),
    ],
)
def test_known_texts(world, text, ids):
    assert world.encode(text) == ids and world.decode(ids) == text


def test_random_texts_are_cut_as_the_authors_cut_them(world, theirs):
    rng = random.Random(4)
    pieces = ["hello", " the", "\n\n", "  ", "12", "日本語", "é", "🙂", "def ", "Привет", "\u0000", "{}", "://"]
    for _ in range(1500):
        text = "".join(
            rng.choice([rng.choice(pieces), chr(rng.choice([rng.randrange(32, 127), rng.randrange(160, 0xD000)]))])
            for _ in range(rng.randrange(40))
        )
        ids = world.encode(text)
        assert ids == theirs.encode(text) and world.decode(ids) == text
        assert b"".join(map(world.token_bytes, ids)) == text.encode()


def test_the_end_of_a_text_is_a_token_only_where_it_is_meant(world):
    assert world.eos_ids == (0,) and world.token_id("<|endoftext|>") == 0 and world.vocab_size == 65530
    assert world.encode_prompt("a<|endoftext|>b") == [*world.encode("a"), 0, *world.encode("b")]
    assert 0 not in world.encode("a<|endoftext|>b") and world.decode(world.encode("<|endoftext|>")) == "<|endoftext|>"
    assert world.decode([0, 33155]) == "Hello" and world.decode([0, 33155], skip_special=False) == "<|endoftext|>Hello"


def test_halves_of_characters_wait_in_a_stream(world):
    stream, said = Detokenizer(world, SamplingParams()), ""
    text = "naïve 日本語 🙂!"
    for byte in text.encode():
        stream.feed([1 + byte])  # ids 1 ... 256 are the bytes
        said += stream.delta(final=False)
    stream.finish()
    assert said + stream.delta(final=True) == text


def test_a_saved_vocabulary_is_read_again(world, tmp_path):
    small = WorldTokenizer(
        {1 + byte: bytes([byte]) for byte in range(256)} | {257: b"th", 258: b"the", 259: "日".encode()}
    )
    small.save(tmp_path)
    again = WorldTokenizer(read_vocabulary(find_vocabulary(tmp_path)))
    text = "this, the 日 there"
    assert again.encode(text) == small.encode(text) and again.decode(again.encode(text)) == text
    assert again.encode("the th") == [258, 33, 257]


@pytest.mark.parametrize("line", ["1 'a'", "x 'a' 1", "1 'ab' 1", "1 __import__('os') 2", "0 'a' 1", "1 " + "[" * 9999])
def test_a_bad_line_is_named(line, tmp_path):
    file = Path(tmp_path / "rwkv_vocab.txt")
    file.write_text("1 'a' 1\n" + line + "\n")
    with pytest.raises(CheckpointError, match=r"rwkv_vocab\.txt, line 2"):
        read_vocabulary(file)


def test_a_vocabulary_without_all_bytes_is_refused():
    with pytest.raises(CheckpointError, match="single bytes"):
        WorldTokenizer({1: b"a"})


def test_a_model_of_another_size_needs_its_own_vocabulary(tmp_path):
    with pytest.raises(CheckpointError, match="65536 of the World vocabulary"):
        load_tokenizer(ModelCard("w", tmp_path, "safetensors", "rwkv5", config={"vocab_size": 99}))
