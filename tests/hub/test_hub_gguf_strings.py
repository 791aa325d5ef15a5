"""Arrays of strings, found all at once: the same as walking from one length to the next, or no answer."""

from __future__ import annotations

import mmap
import struct
from pathlib import Path

import numpy as np
import pytest
from hub_files import write_gguf
from hypothesis import given
from hypothesis import strategies as st

from martlet import hub
from martlet.errors import CheckpointError
from martlet.hub import gguf_strings
from martlet.hub.gguf_header import LazyArray, _Cursor, read_header

STRINGS = 8  # metadata value type


def mapped(data: bytes) -> mmap.mmap:
    found = mmap.mmap(-1, max(1, len(data)))
    found[: len(data)] = data
    return found


def stored(strings: list[bytes]) -> bytes:
    return b"".join(struct.pack("<Q", len(text)) + text for text in strings)


def walked(strings: list[bytes]) -> list[int]:
    return [0, *np.cumsum([8 + len(text) for text in strings]).tolist()]


words = st.text(st.characters(codec="utf-8", exclude_characters="\0 "), min_size=1, max_size=60)


@given(st.lists(words, min_size=1, max_size=40), st.binary(max_size=20), st.integers(8, 300))
def test_usual_strings_are_found_and_cut(strings, before, window):
    raw = [text.encode() for text in strings]
    data, start = mapped(before + stored(raw) + bytes(16)), len(before)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gguf_strings, "WINDOW", window + 256)  # a window holds the longest string there can be
        places = gguf_strings.find(data, start, len(raw))
    assert places.tolist() == [start + place for place in walked(raw)]
    assert gguf_strings.cut(data, places) == strings


@given(st.lists(st.binary(max_size=300) | st.text("\0 ab").map(str.encode), max_size=12))
def test_any_bytes_are_found_where_a_walk_finds_them_or_not_at_all(strings):
    places = gguf_strings.find(mapped(stored(strings)), 0, len(strings))
    assert places is None or places.tolist() == walked(strings)


@given(st.lists(st.text("ab ", max_size=6), min_size=1, max_size=30))
def test_pairs_are_what_stands_on_both_sides_of_the_space(strings):
    data = mapped(stored([text.encode() for text in strings]) + bytes(8))
    start = _Cursor(Path("m"), data)
    places = gguf_strings.find(data, 0, len(strings))
    found = LazyArray(start, "merges", STRINGS, len(strings), 0, places).pairs()
    assert found == [tuple(text.split(" ", 1)) for text in strings]
    if places is not None and all(text.count(" ") == 1 for text in strings):
        assert gguf_strings.cut_in_two(data, places) == found
    elif places is not None:
        assert gguf_strings.cut_in_two(data, places) is None


def test_the_default_model_is_read_as_by_walking():
    header = read_header(hub.resolve(hub.DEFAULT_MODEL).path)
    for key in ("tokenizer.ggml.tokens", "tokenizer.ggml.merges"):
        array = header.metadata[key]
        assert array.places is not None and len(array.places) == array.count + 1
        by_walking = LazyArray(array.cursor, key, array.kind, array.count, array.start)
        assert array.read() == by_walking.read() and array.pairs() == by_walking.pairs()


def test_strings_that_are_no_text_or_no_strings_at_all_are_named(tmp_path):
    write_gguf(tmp_path / "m.gguf")
    data = (tmp_path / "m.gguf").read_bytes()
    (tmp_path / "bad.gguf").write_bytes(data.replace(b"hello", b"h\xffllo"))
    with pytest.raises(CheckpointError, match=r"tokens \(not UTF-8"):
        read_header(tmp_path / "bad.gguf").get("tokenizer.ggml.tokens")
    write_gguf(tmp_path / "numbers.gguf", tokenizer="none", **{"tokenizer.ggml.merges": [1, 2]})
    with pytest.raises(CheckpointError, match="merges is no list of strings"):
        read_header(tmp_path / "numbers.gguf").pairs("tokenizer.ggml.merges")
