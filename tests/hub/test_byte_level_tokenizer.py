"""The tokenizer that merges by tables answers as one that has read the whole vocabulary, and its tables are kept."""

from __future__ import annotations

import os

import pytest
from hub_files import ALPHABET, CONTROL, SPACE, bpe_tokens, write_gguf
from hypothesis import given, settings
from hypothesis import strategies as st

from martlet import hub
from martlet.errors import CheckpointError
from martlet.hub import byte_level_tokenizer, gguf_tokenizer, kept_merges
from martlet.hub.byte_level import CHARACTERS
from martlet.hub.byte_level_tokenizer import ByteLevelTokenizer
from martlet.hub.gguf_header import read_header
from martlet.hub.tokenizer import Tokenizer

USER, TYPES = "<tool>", "tokenizer.ggml.token_type"
UNUSED = [CHARACTERS[byte] for byte in (0xC0, 0xC1, 0xF5, 0xFF)]  # by UTF-8


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """The folder of kept merges; those of small vocabularies are kept too."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(gguf_tokenizer, "SMALLEST", 0)
    return tmp_path / "martlet" / "merges"


def write(path, pre: str = "smollm", *, merges: list[str] | None = None, without: int = 0) -> None:
    """A vocabulary with words that overlap, a token that users define and a word that no merges lead to. without: how
    many of the last tokens to leave out."""
    words = ["he", "ll", "hell", "hello", f"{SPACE}he", "lo", "el", "ello", "aa", "aaaa", "ab", "unmerged"]
    tokens = [*CONTROL, USER, *(c for c in ALPHABET if c not in UNUSED), *words]
    if merges is None:
        merges = ["h e", "l l", "he ll", "hell o", f"{SPACE} he", "l o", "e l", "el lo", "a a", "aa aa", "a b"]
    if without:
        tokens, merges = tokens[:-without], merges[:-without]
    types = [3] * len(CONTROL) + [4] + [1] * (len(tokens) - len(CONTROL) - 1)
    write_gguf(path, tokenizer="none", **{
        "tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": pre, "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.merges": merges, TYPES: types, "tokenizer.ggml.eos_token_id": 2,
    })  # fmt: skip


def load(path) -> ByteLevelTokenizer:
    tokenizer = hub.load_tokenizer(hub.resolve(str(path)))
    assert isinstance(tokenizer, ByteLevelTokenizer)
    return tokenizer


def whole(path) -> Tokenizer:
    return Tokenizer(gguf_tokenizer.tokenizer_from(read_header(path)), eos_ids=[2])


@pytest.fixture(scope="module", params=["smollm", "llama-bpe", "qwen2", "deepseek-v3"])
def both(request, tmp_path_factory):
    """The two tokenizers of a file: by tables, without a limit, and by the library."""
    folder = tmp_path_factory.mktemp("both")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder))
        patch.setattr(gguf_tokenizer, "SMALLEST", 0)
        write(folder / "m.gguf", request.param)
        ours = load(folder / "m.gguf")
    ours._left = 10**9
    return ours, whole(folder / "m.gguf")


pieces = st.sampled_from([*CONTROL, USER, "hello", " he", "aaaaaaa", "aab", "unmerged", "ello", " ", "\n", "1969", "é"])
texts = st.lists(pieces | st.text(max_size=4), max_size=12).map("".join)


@settings(max_examples=200, deadline=None)
@given(text=texts, special=st.booleans())
def test_a_text_has_the_same_tokens(both, text, special):
    ours, theirs = both
    ids = ours.encode(text, special=special)
    assert ids == theirs.encode(text, special=special)
    assert ours.decode(ids, skip_special=special) == theirs.decode(ids, skip_special=special)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(0, 271), max_size=9), st.booleans())
def test_tokens_have_the_same_text(both, ids, skip_special):
    ours, theirs = both
    assert ours.decode(ids, skip_special=skip_special) == theirs.decode(ids, skip_special=skip_special)


def test_what_is_known_of_a_vocabulary_is_the_same(both):
    ours, theirs = both
    for name in ("vocab_size", "special_ids", "eos_ids", "_added"):
        assert getattr(ours, name) == getattr(theirs, name)
    for token in range(-1, ours.vocab_size + 2):
        if token >= 0:
            assert ours.token_bytes(token) == theirs.token_bytes(token)
        name = theirs._piece(token) if token >= 0 else "no token"
        assert ours.token_id(name or "none either") == theirs.token_id(name or "none either")
    assert ours.state() == theirs.state() and ours.pre_tokenize("hello 12") == theirs.pre_tokenize("hello 12")


def test_real_texts_have_the_same_tokens():
    path = hub.resolve(hub.DEFAULT_MODEL).path
    ours, theirs = load(path), whole(path)
    for text in (
        hub.__doc__,
        Tokenizer.__doc__,
        ours.chat_template,
        "日本語のテキスト。 ¿Qué? Привет, мир 🙂👍🏽 \x00\r\n\t  ",
    ):
        for special in (True, False):
            text = f"{text}<|im_end|>{text}"[:3000]
            assert ours.encode(text, special=special) == theirs.encode(text, special=special)
    assert "_core" not in vars(ours)


@pytest.mark.parametrize("text", ["hello " * 2000, "a" * 300, "x" * (byte_level_tokenizer.LONGEST + 1)])
def test_long_texts_and_long_words_are_the_library_s(cache, tmp_path, text):
    write(tmp_path / "m.gguf")
    ours = load(tmp_path / "m.gguf")
    ours.encode("hello")
    assert "_core" not in vars(ours)
    assert ours.encode(text) == whole(tmp_path / "m.gguf").encode(text)
    assert "_core" in vars(ours)


def test_many_short_texts_are_a_long_one(cache, tmp_path, monkeypatch):
    monkeypatch.setattr(byte_level_tokenizer, "SHORT", 12)
    write(tmp_path / "m.gguf")
    ours = load(tmp_path / "m.gguf")
    asked = [(ours.encode("hello"), "_core" in vars(ours)) for _ in range(3)]
    assert asked == [(asked[0][0], False), (asked[0][0], False), (asked[0][0], True)]


@pytest.mark.parametrize("merges", [["h e", "q z"], ["h e", "he no"], ["h"], ["no he"]])
def test_merges_that_do_not_fit_are_told(cache, tmp_path, merges):
    write(tmp_path / "m.gguf", merges=merges)
    with pytest.raises(CheckpointError, match="merges do not fit"):
        hub.load_tokenizer(hub.resolve(str(tmp_path / "m.gguf")))


def test_small_vocabularies_and_those_without_merges_are_the_library_s(tmp_path, cache, monkeypatch):
    write(tmp_path / "none.gguf", merges=[])
    assert type(hub.load_tokenizer(hub.resolve(str(tmp_path / "none.gguf")))) is Tokenizer
    monkeypatch.undo()
    write(tmp_path / "small.gguf")
    assert type(hub.load_tokenizer(hub.resolve(str(tmp_path / "small.gguf")))) is Tokenizer


# what is kept


def encodes_without_strings(path, monkeypatch) -> list[int]:
    with monkeypatch.context() as patch:
        patch.setattr("martlet.hub.gguf_tokenizer._vocabulary", None)  # nobody reads the strings
        return load(path).encode("hello he<|end|>aab", special=True)


def test_kept_merges_are_those_that_were_made(cache, tmp_path, monkeypatch):
    write(tmp_path / "m.gguf")
    made = load(tmp_path / "m.gguf").encode("hello he<|end|>aab", special=True)
    assert encodes_without_strings(tmp_path / "m.gguf", monkeypatch) == made
    assert len(list(cache.iterdir())) == 1


@pytest.mark.parametrize("damage", [
    lambda data: data[:-4], lambda data: b"", lambda data: data[:40] + b"\1" + data[41:], lambda data: b"\7" + data[1:],
])  # fmt: skip
def test_damaged_ones_are_made_again(cache, tmp_path, monkeypatch, damage):
    write(tmp_path / "m.gguf")
    made = load(tmp_path / "m.gguf").encode("hello he<|end|>aab", special=True)
    (file,) = cache.iterdir()
    good = file.read_bytes()
    file.write_bytes(damage(good))
    load(tmp_path / "m.gguf")
    assert file.read_bytes() == good
    assert encodes_without_strings(tmp_path / "m.gguf", monkeypatch) == made


def test_a_file_that_was_replaced_has_others(cache, tmp_path):
    write(tmp_path / "m.gguf")
    before = load(tmp_path / "m.gguf").encode("ab")
    write(tmp_path / "new.gguf", without=2)
    os.replace(tmp_path / "new.gguf", tmp_path / "m.gguf")
    assert (len(before), len(load(tmp_path / "m.gguf").encode("ab"))) == (1, 2)
    assert len(list(cache.iterdir())) == 2


def test_the_least_recently_used_go(cache, tmp_path, monkeypatch):
    monkeypatch.setattr(kept_merges, "MOST", 2)
    for number in range(3):
        write(tmp_path / f"{number}.gguf")
        load(tmp_path / f"{number}.gguf")
        for age, file in enumerate(sorted(cache.iterdir(), key=lambda path: path.stat().st_mtime)):
            os.utime(file, (age, age))
    assert len(list(cache.iterdir())) == 2


def test_a_cache_that_cannot_be_written_costs_nothing_but_time(cache, tmp_path):
    cache.parent.mkdir()
    cache.write_text("a file in its place")
    write(tmp_path / "m.gguf")
    assert load(tmp_path / "m.gguf").encode("hello") == whole(tmp_path / "m.gguf").encode("hello")


def test_of_merges_listed_twice_the_last_counts(cache, tmp_path):
    merges = ["l l", "h e", "he ll", "e l", "l l"]
    write(tmp_path / "m.gguf", merges=merges)
    assert load(tmp_path / "m.gguf").encode("hellell") == whole(tmp_path / "m.gguf").encode("hellell")


def test_the_vocabulary_of_the_other_tests_too(cache, tmp_path):
    write_gguf(tmp_path / "m.gguf")
    tokens, _ = bpe_tokens()
    assert [load(tmp_path / "m.gguf").encode(word) for word in ("hello", " he")] == [[tokens.index("hello")], [263]]
