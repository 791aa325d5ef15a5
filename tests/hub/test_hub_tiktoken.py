"""*.tiktoken files: ids are tiktoken's own."""

from __future__ import annotations

import base64
import unicodedata
from pathlib import Path

import pytest
import tiktoken
from hub_files import write_folder
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Core
from tokenizers import models, pre_tokenizers, trainers

from martlet import chat, hub
from martlet.errors import CheckpointError
from martlet.hub.byte_level import BYTES
from martlet.hub.resolver import card_of
from martlet.hub.tiktoken import KINDS

ROOT = Path(__file__).parents[2]
TEXT = "".join((ROOT / file).read_text(encoding="utf-8") for file in ("README.md", "CHANGELOG.md"))
TEXT += "你好！浙江的省会在哪里?晚上睡不着应该怎么办 e\u0301 Ångström we've 12345 don't\r\n\n  x" * 3
# The patterns as tiktoken reads them; from the models' own code.
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
PATTERNS = {"qwen": LLAMA3.replace("{1,3}", ""), "llama": LLAMA3, "chatglm": LLAMA3}
FILES = {"qwen": "qwen.tiktoken", "llama": "tokenizer.model", "chatglm": "tokenizer.model"}


@pytest.fixture(scope="module")
def ranks() -> dict[bytes, int]:
    """Learnt from a text: every byte, then 600 merged tokens."""
    core = Core(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.train_from_iterator(
        [TEXT], trainers.BpeTrainer(vocab_size=856, initial_alphabet=list(BYTES), show_progress=False)
    )
    vocabulary = core.get_vocab()
    order = sorted(vocabulary, key=lambda token: (len(token) > 1, vocabulary[token]))
    return {bytes(BYTES[character] for character in token): rank for rank, token in enumerate(order)}


def write(folder: Path, family: str, lines: bytes) -> hub.Tokenizer:
    write_folder(folder, config={"model_type": family})
    (folder / FILES[family]).write_bytes(lines)
    return hub.load_tokenizer(card_of(folder))


def lines_of(ranks) -> bytes:
    return b"".join(base64.b64encode(token) + f" {rank}\n".encode() for token, rank in ranks.items())


@pytest.fixture(scope="module", params=list(KINDS))
def both(request, ranks, tmp_path_factory):
    """(family, our tokenizer of a folder, tiktoken's)."""
    control = {name: len(ranks) + i for i, name in enumerate(KINDS[request.param].control)}
    theirs = tiktoken.Encoding("theirs", pat_str=PATTERNS[request.param], mergeable_ranks=ranks, special_tokens=control)
    return request.param, write(tmp_path_factory.mktemp("model"), request.param, lines_of(ranks)), theirs


def composed(family: str, text: str) -> str:
    return unicodedata.normalize("NFC", text) if KINDS[family].composed else text


def test_ids_are_tiktokens_own(both):
    family, ours, theirs = both
    assert ours.encode(TEXT) == theirs.encode(composed(family, TEXT), disallowed_special=())
    assert len(set(ours.encode(TEXT))) > 400 and ours.decode(ours.encode(TEXT)) == composed(family, TEXT)
    assert ours.vocab_size == theirs.n_vocab
    last = KINDS[family].control[-1]
    assert ours.encode(last, special=True) == theirs.encode(last, allowed_special="all") == [theirs.n_vocab - 1]
    assert ours.encode(last) == theirs.encode(last, disallowed_special=())


@settings(max_examples=150, deadline=None)
@given(st.text("ab e'st01 \n\té中", max_size=60))
def test_any_text(both, text):
    family, ours, theirs = both
    assert ours.encode(text) == theirs.encode(composed(family, text), disallowed_special=())
    assert b"".join(map(ours.token_bytes, ours.encode(text))).decode() == composed(family, text)


def test_prompts_begin_as_the_models_code_has_it(both):
    family, ours, _ = both
    names = {"qwen": [], "llama": ["<|begin_of_text|>"], "chatglm": ["[gMASK]", "<sop>"]}[family]
    assert ours.encode_prompt("a") == [*map(ours.token_id, names), *ours.encode("a")]
    assert ours.token_id(KINDS[family].names["eos_token"]) in ours.eos_ids


def test_a_qwen_chats_with_nothing_but_its_ranks(ranks, tmp_path):
    ours = write(tmp_path, "qwen", lines_of(ranks))
    template = chat.named("qwen", ours)
    ids = template.render([{"role": "user", "content": "a<|im_end|>"}])
    start, end = ours.token_id("<|im_start|>"), ours.token_id("<|im_end|>")
    assert ids.count(start) == 3 and ids.count(end) == 2 and template.stop_ids == (end,)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda lines: [*lines[:300], b"!!!! 300", *lines[301:]], "line 301"),
        (lambda lines: [*lines[:9], b"aaaa", *lines[10:]], "line 10"),
        (lambda lines: lines[1:], "each once"),
        (lambda lines: lines[:200], "single bytes"),
    ],
)
def test_damaged_files_are_named(ranks, tmp_path, change, said):
    lines = change(lines_of(ranks).splitlines())
    with pytest.raises(CheckpointError, match=said):
        write(tmp_path, "qwen", b"\n".join(lines))


def test_a_family_whose_text_is_cut_in_an_unknown_way(ranks, tmp_path):
    write_folder(tmp_path, config={"model_type": "phi3"})
    (tmp_path / "x.tiktoken").write_bytes(lines_of(ranks))
    with pytest.raises(CheckpointError, match="family 'phi3' cut a text"):
        hub.load_tokenizer(card_of(tmp_path))
