"""Vocabularies kept on disk: what comes back is what was put in, or is made again."""

from __future__ import annotations

import os

import pytest
from hub_files import CONTROL, bpe_tokens, write_gguf

from martlet.hub import kept_bpe
from martlet.hub.gguf_header import read_header
from martlet.hub.gguf_tokenizer import tokenizer_from


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """The folder of kept vocabularies; small ones are kept too."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(kept_bpe, "SMALLEST", 0)
    return tmp_path / "martlet" / "vocabularies"


def made_and_kept(path, monkeypatch) -> tuple[str, str]:
    """The tokenizer of a file, made of its strings and then read from what was kept of them."""
    made = tokenizer_from(read_header(path)).to_str()
    with monkeypatch.context() as patch:
        patch.setattr("martlet.hub.gguf_tokenizer._vocabulary", None)  # nobody reads the strings
        return made, tokenizer_from(read_header(path)).to_str()


def test_a_kept_vocabulary_is_the_one_that_was_made(cache, tmp_path, monkeypatch):
    write_gguf(tmp_path / "m.gguf")
    made, kept = made_and_kept(tmp_path / "m.gguf", monkeypatch)
    assert kept == made and all(name in kept for name in CONTROL)
    assert len(list(cache.iterdir())) == 1


@pytest.mark.parametrize("name", [*kept_bpe.FILES, kept_bpe.DIGEST])
@pytest.mark.parametrize("damage", [lambda data: data[:-3], lambda data: b""])
def test_a_damaged_one_is_made_again(cache, tmp_path, monkeypatch, name, damage):
    write_gguf(tmp_path / "m.gguf")
    tokenizer_from(read_header(tmp_path / "m.gguf"))
    (folder,) = cache.iterdir()
    (folder / name).write_bytes(damage((folder / name).read_bytes()))
    made, kept = made_and_kept(tmp_path / "m.gguf", monkeypatch)
    assert kept == made


def test_a_file_that_was_replaced_has_another(cache, tmp_path):
    write_gguf(tmp_path / "m.gguf")
    before = tokenizer_from(read_header(tmp_path / "m.gguf"))
    tokens, merges = bpe_tokens()
    write_gguf(tmp_path / "new.gguf", tokenizer="none", **{
        "tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.tokens": tokens[:-2], "tokenizer.ggml.merges": merges[:-2],
    })  # fmt: skip
    os.replace(tmp_path / "new.gguf", tmp_path / "m.gguf")
    after = tokenizer_from(read_header(tmp_path / "m.gguf"))
    assert before.get_vocab_size() - after.get_vocab_size() == 2
    assert len(list(cache.iterdir())) == 2


def test_what_would_not_read_back_the_same_is_not_kept(cache, tmp_path):
    """The library takes a line that begins so for a comment."""
    vocabulary = {"#version": 0, "s": 1, "#versions": 2}
    (tmp_path / "m.gguf").write_bytes(b"any")
    for _ in range(2):
        model = kept_bpe.model_of(tmp_path / "m.gguf", 3, lambda: (vocabulary, [("#version", "s")]))
        assert b"#version s" in model.__getstate__() or b'["#version","s"]' in model.__getstate__()
    assert list(cache.iterdir()) == []


def test_the_least_recently_used_goes(cache, tmp_path, monkeypatch):
    monkeypatch.setattr(kept_bpe, "MOST", 2)
    for number in range(3):
        file = tmp_path / f"{number}.gguf"
        file.write_bytes(b"any")
        kept_bpe.model_of(file, 1, lambda: ({"a": 0}, []))
        for age, folder in enumerate(sorted(cache.iterdir(), key=lambda path: path.stat().st_mtime)):
            os.utime(folder, (age, age))
    assert len(list(cache.iterdir())) == 2


def test_a_cache_that_cannot_be_written_costs_nothing_but_time(cache, tmp_path):
    cache.parent.mkdir()
    cache.write_text("a file in its place")
    write_gguf(tmp_path / "m.gguf")
    assert tokenizer_from(read_header(tmp_path / "m.gguf")).token_to_id("hello") is not None
