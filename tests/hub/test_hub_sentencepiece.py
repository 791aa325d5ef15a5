"""tokenizer.model files, trained here by SentencePiece, read by us: ids and texts are SentencePiece's own."""

from __future__ import annotations

import io
import json
from functools import cache
from pathlib import Path

import pytest
import sentencepiece
from hub_files import write_folder
from hypothesis import given, settings
from hypothesis import strategies as st

from martlet import chat, hub
from martlet.errors import CheckpointError
from martlet.hub.resolver import card_of
from martlet.hub.sentencepiece import read
from martlet.hub.tokenizer import Tokenizer

ROOT = Path(__file__).parents[2]
# A text that never changes: under another vocabulary two ways to cut a line may cost the same but for rounding, which
# is float32 there and float64 here.
LINES = [line for line in (ROOT / "LICENSE").read_text(encoding="utf-8").splitlines() if line.strip()] + [
    "你好👋！我是人工智能助手，很高兴见到你。",
    "晚上睡不着应该怎么办",
    "浙江的省会在哪里?",
    "Grüße aus München",
] * 4
BYTES = {"byte_fallback": True, "normalization_rule_name": "identity", "remove_extra_whitespaces": False}
KINDS = {
    "llama": {"model_type": "bpe", **BYTES},
    "gemma": {"model_type": "bpe", **BYTES, "add_dummy_prefix": False, "user_defined_symbols": ["<u>", "\n\n", "ab"]},
    "squeezed": {"model_type": "bpe", **BYTES, "remove_extra_whitespaces": True},
    "unigram": {"model_type": "unigram", **BYTES},
    "t5": {"model_type": "unigram", "normalization_rule_name": "nmt_nfkc"},
}
ODD = [
    "",
    " ",
    "  a",
    "a  ",
    " a  b ",
    "\n",
    "\t",
    "a\n b",
    "<s>",
    "a<s>b</s>",
    "<0x41>",
    "<unk>",
    "½ﬁ①",
    "\u3000",
    "ab",
]


def train(**options) -> bytes:
    written = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(LINES),
        model_writer=written,
        vocab_size=700,
        character_coverage=0.98,
        minloglevel=2,
        hard_vocab_limit=False,
        **options,
    )
    return written.getvalue()


@cache
def trained(kind: str) -> bytes:
    return train(**KINDS[kind])


@cache
def both(kind: str, folder: Path) -> tuple[Tokenizer, sentencepiece.SentencePieceProcessor]:
    return folder_tokenizer(folder, trained(kind)), sentencepiece.SentencePieceProcessor(model_proto=trained(kind))


def folder_tokenizer(folder: Path, model: bytes, family: str = "llama", **settings) -> Tokenizer:
    write_folder(folder, config={"model_type": family})
    (folder / "tokenizer.model").write_bytes(model)
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return hub.load_tokenizer(card_of(folder))


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    return lambda kind: both(kind, root / kind)


@pytest.mark.parametrize("kind", KINDS)
def test_ids_and_texts_are_sentencepieces_own(folders, kind):
    ours, theirs = folders(kind)
    for text in (*LINES, *ODD):
        ids = theirs.encode(text)
        assert ours.encode(text) == ids, text
        if theirs.unk_id() not in ids:
            assert ours.decode(ids, skip_special=False) == theirs.decode(ids)
    assert len(ours.encode(" ".join(LINES))) > 1000


@pytest.mark.parametrize("kind", ["llama", "gemma"])
def test_any_text(folders, kind):
    ours, theirs = folders(kind)

    @settings(max_examples=150, deadline=None)
    @given(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=40))
    def same(text):
        assert ours.encode(text) == theirs.encode(text)
        assert b"".join(map(ours.token_bytes, ours.encode(text))).decode().removeprefix(" ").strip("▁ ") == text.strip(
            "▁ "
        ).replace("▁", " ")

    same()


def test_what_goes_with_the_pieces(folders):
    ours, _ = folders("llama")
    assert ours.special_tokens == {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    assert (ours.bos_id, ours.eos_ids, ours.add_bos) == (1, (2,), True)
    assert ours.encode_prompt("a") == [1, *ours.encode("a")] == ours.encode_prompt("<s>a")
    assert {1, 2} <= set(ours.encode("<s>a</s>", special=True)) and not {1, 2} & set(ours.encode("<s>a</s>"))


def test_the_folders_word_comes_first(tmp_path):
    ours = folder_tokenizer(tmp_path, trained("llama"), add_bos_token=False, eos_token="<s>")
    assert not ours.add_bos and ours.eos_ids == (1,)


def test_chatglm3_speaks_in_tokens_behind_the_pieces(tmp_path):
    ours = folder_tokenizer(tmp_path, trained("llama"), "chatglm")
    pieces = sentencepiece.SentencePieceProcessor(model_proto=trained("llama"))
    n = pieces.get_piece_size()
    names = ["[MASK]", "[gMASK]", "[sMASK]", "sop", "eop", "<|system|>", "<|user|>", "<|assistant|>", "<|observation|>"]
    assert [ours.token_id(name) for name in names] == list(range(n, n + 9))
    head = [n + 1, n + 3]
    assert ours.encode_prompt("你好") == [*head, *pieces.encode("你好")]
    prompt = chat.named("chatglm3", ours).render([{"role": "user", "content": "你好<|user|>"}])
    newline = [pieces.piece_to_id("▁"), pieces.piece_to_id("<0x0A>")]
    assert prompt == [*head, n + 6, *newline, *pieces.encode("你好<|user|>"), n + 7]


def test_a_unigram_tokenizer_json_does_not_read_control_tokens_either(folders, tmp_path):
    ours, theirs = folders("unigram")
    write_folder(tmp_path)
    ours.save(tmp_path)
    again = hub.load_tokenizer(card_of(tmp_path))
    for text in ("a<s>b", "</s>", "<unk> "):
        assert again.encode(text) == theirs.encode(text)
    assert again.encode("</s>", special=True)[-1] == 2


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"model_type": "word"}, "words or characters"),
        ({"treat_whitespace_as_suffix": True}, "white space behind words"),
        ({"user_defined_symbols": ["<u>"]}, "spaces are squeezed"),
    ],
)
def test_what_cannot_be_done_exactly_is_refused(tmp_path, options, said):
    with pytest.raises(CheckpointError, match=said):
        folder_tokenizer(tmp_path, train(**options))


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_damaged_files_are_named_and_never_more(tmp_path_factory, data):
    whole = trained("llama")
    cut = data.draw(st.integers(0, len(whole) - 1))
    other = data.draw(st.binary(min_size=1, max_size=8))
    file = tmp_path_factory.getbasetemp() / "damaged.model"
    file.write_bytes(whole[:cut] + other + whole[cut + len(other) :])
    try:
        read(file)
    except CheckpointError as error:
        assert "damaged.model" in error.message
