"""Masks of the worker process against brute force: every sentence of a small language is known."""

from __future__ import annotations

import itertools
import random
import re

import numpy as np
import pytest
from toy_vocabulary import END, GO, HOLE, PIECES, ToyTokenizer

from martlet.errors import InvalidRequest
from martlet.grammar import Grammar, choice, json_schema
from martlet.grammar.process import Worker, vocabulary

V = 40  # the model's vocabulary is larger than the tokenizer's


@pytest.fixture(scope="module")
def worker():
    worker = Worker(vocabulary(ToyTokenizer(), V), slots=3, words=2)
    yield worker
    worker.close()


def told(worker, *message):
    number = worker.send(*message)
    while not (answers := worker.receive(30)):
        assert worker.alive
    assert [n for n, _ in answers] == [number]
    return answers[0][1]


def mask(worker, slot=1) -> set[int]:
    return set(np.flatnonzero(np.unpackbits(worker.masks[slot].view(np.uint8), bitorder="little")))


def matching(pattern: str, alphabet: str, longest: int) -> set[bytes]:
    texts = ("".join(t) for n in range(longest + 1) for t in itertools.product(alphabet, repeat=n))
    return {text.encode() for text in texts if re.fullmatch(pattern, text)}


LANGUAGES = {
    "choice": (choice(["ab", "abc", "é", "c\n b"]), {b"ab", b"abc", "é".encode(), b"c\n b"}),
    "regex": (Grammar("regex", "(ab|c){1,3}b?"), matching("(ab|c){1,3}b?", "abc", 7)),
    "lark": (Grammar("lark", 'start: "a" x "c"\nx: "b" | "b" x "b"\n'), {b"a%bc" % (b"b" * n) for n in range(1, 9, 2)}),
    "gbnf": (Grammar("lark", 'root ::= "a" ("b" | "c")'), {b"ab", b"ac"}),
}  # fmt: skip


@pytest.mark.parametrize("name", ["choice", "regex", "lark", "gbnf"])
def test_masks_are_those_of_brute_force(worker, name):
    grammar, language = LANGUAGES[name]
    for seed in range(12):
        rng, text = random.Random(seed), b""
        assert told(worker, "step", [(seed, [grammar.kind, grammar.text, None])], [], [(seed, [], 1)]) == {}
        for _ in range(6):
            want = {
                token
                for token, piece in enumerate(PIECES)
                if piece and token not in (GO, END) and any(s.startswith(text + piece) for s in language)
            }
            want |= {END} if text in language else set()
            assert mask(worker) == want, text
            token = rng.choice(sorted(want))
            if token == END:
                break
            text += PIECES[token]
            assert told(worker, "step", [], [], [(seed, [token], 1)]) == {}
        told(worker, "step", [], [seed], [])


def test_a_trigger_ends_the_free_text(worker):
    for trigger, tokens in (("bc", [3, 4]), ("<go>", [3, GO])):
        grammar = ["choice", '["cab"]', trigger]
        assert told(worker, "step", [(1, grammar)], [], [(1, [], 1)]) == {}
        free = mask(worker)
        assert free >= {0, 1, 2, 3, 12, 13, END} and HOLE not in free
        assert told(worker, "step", [], [], [(1, tokens, 1)]) == {}
        assert mask(worker) == {2}
        assert told(worker, "step", [], [], [(1, [2], 1)]) == {} and mask(worker) == {0, 3}
        assert told(worker, "step", [], [], [(1, [3], 1)]) == {} and mask(worker) == {END}
        told(worker, "step", [], [1], [])


def test_many_are_filled_at_once_and_a_wrong_token_is_an_error_of_its_own(worker):
    opens = [(key, ["choice", f'["{text}"]', None]) for key, text in enumerate(["ab", "bc", "c"])]
    assert told(worker, "step", opens, [], [(key, [], key) for key in range(3)]) == {}
    assert [mask(worker, slot) for slot in range(3)] == [{0, 3}, {1, 4}, {2}]
    errors = told(worker, "step", [], [], [(0, [0], 0), (1, [2], 1), (2, [2], 2)])
    assert list(errors) == ["1"] and mask(worker, 0) == {1} and mask(worker, 2) == {END}
    told(worker, "step", [], [0, 1, 2], [])


@pytest.mark.parametrize(
    ("grammar", "said"),
    [
        (json_schema({"type": "array", "uniqueItems": True, "contains": {}}), "contains, uniqueItems"),
        (json_schema({"$ref": "https://example.org/x.json"}), "not present"),
        (json_schema({"type": "tuple"}), "tuple"),
        (json_schema({"$ref": "#"}), ""),
        (json_schema("[1]"), "is an object"),
        (json_schema('{"type": '), ""),
        (json_schema({"type": "object", "x-guidance": {"lenient": True}, "not": {}}), "not"),
        (Grammar("regex", "(?<=a)b"), "look-behind"),
        (Grammar("regex", "(" * 5000 + "a" + ")" * 5000), ""),
        (Grammar("lark", "begin: x"), ""),
        (choice(["xyz"]), "no answer"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_what_cannot_be_followed_is_said(worker, grammar, said):
    error = told(worker, "check", [grammar.kind, grammar.text, grammar.trigger])
    assert error and said in error and len(error) < 600


def test_a_grammar_is_checked_as_data():
    for make in (
        lambda: Grammar("poem", "x"),
        lambda: Grammar("regex", ""),
        lambda: Grammar("regex", "x" * 300_000),
        lambda: Grammar("lark", "start: /a/", trigger="x"),
        lambda: choice([]),
        lambda: json_schema({"const": {1, 2}}),
    ):
        with pytest.raises(InvalidRequest):
            make()
    assert hash(json_schema({"type": "string"})) == hash(json_schema({"type": "string"}))
