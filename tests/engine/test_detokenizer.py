"""Streamed text is the whole text, whatever the bytes and wherever tokens are cut."""

from byte_tokenizer import EOS, ByteTokenizer
from hypothesis import given
from hypothesis import strategies as st

from martlet.engine.detokenizer import Detokenizer
from martlet.sampling_params import SamplingParams

TOKENIZER = ByteTokenizer()


def stream(tokens, **params) -> tuple[list[str], Detokenizer]:
    """Feed one token at a time; the pieces as a client sees them."""
    detokenizer = Detokenizer(TOKENIZER, SamplingParams(**params))
    pieces = []
    for token in tokens:
        found = detokenizer.feed([token])
        pieces.append(detokenizer.delta())
        if found is not None:
            break
    detokenizer.finish()
    pieces.append(detokenizer.delta(final=True))
    return pieces, detokenizer


@given(st.lists(st.integers(0, 255)))
def test_any_bytes_stream_to_what_they_decode_to(tokens):
    pieces, _ = stream(tokens)
    assert "".join(pieces) == bytes(tokens).decode(errors="replace")


@given(st.text())
def test_no_piece_cuts_a_character(text):
    pieces, _ = stream(text.encode())
    assert "".join(pieces) == text and "�" not in "".join(pieces).replace("�" * text.count("�"), "")
    assert sum(map(len, pieces)) == len(text)


@given(st.text("ab🙂"), st.lists(st.text("ab🙂", min_size=1, max_size=4), min_size=1, max_size=3), st.booleans())
def test_stop_strings_end_the_text_at_the_first_one(text, stops, keep):
    pieces, detokenizer = stream(text.encode(), stop=stops, include_stop_str_in_output=keep)
    ends = {stop: text.find(stop) + len(stop) for stop in stops if stop in text}
    if not ends:
        assert "".join(pieces) == text and detokenizer.stop is None
        return
    first = min(ends.values())  # the one completed first
    candidates = [s for s, end in ends.items() if text[:first].endswith(s)]
    assert detokenizer.stop in candidates
    want = text[:first] if keep else text[: first - len(detokenizer.stop)]
    assert "".join(pieces) == want


def test_text_that_may_begin_a_stop_string_waits():
    detokenizer = Detokenizer(TOKENIZER, SamplingParams(stop="END"))
    detokenizer.feed(b"an EN")
    assert detokenizer.delta() == "an "
    detokenizer.feed(b"TRY")
    assert detokenizer.delta() == "ENTRY"


def test_stop_strings_are_not_looked_for_in_the_first_min_tokens():
    pieces, detokenizer = stream(b"xx..xx..", stop="xx", min_tokens=4, max_tokens=16)
    assert "".join(pieces) == "xx.." and detokenizer.stop == "xx"


def test_control_tokens_are_hidden_unless_asked_for():
    assert "".join(stream([65, EOS, 66])[0]) == "AB"
    assert "".join(stream([65, EOS, 66], skip_special_tokens=False)[0]) == "A<eos>B"
