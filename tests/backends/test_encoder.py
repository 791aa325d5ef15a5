"""Embeddings equal transformers', alone and batched with others; texts of many callers share passes."""

import threading
import time

import numpy as np
import pytest
import torch
from tiny_encoder import WORDS, write

from martlet import LLM, backends
from martlet.engine.embedding import EmbeddingQueue
from martlet.engine.options import EngineOptions
from martlet.engine.request import Request
from martlet.errors import CheckpointError, InvalidRequest, Overloaded, UsageError
from martlet.runners.base import LoadOptions


def expected(model, texts, pooling):
    found = []
    for ids in texts:
        with torch.inference_mode():
            hidden = model(torch.tensor([list(ids)])).last_hidden_state[0].numpy()
        found.append({"mean_tokens": hidden.mean(0), "cls_token": hidden[0], "max_tokens": hidden.max(0)}[pooling])
    return np.stack(found)


@pytest.fixture
def tiny(tmp_path):
    model = write(tmp_path)
    backend = backends.load(str(tmp_path))
    yield model, backend
    backend.close()


@pytest.mark.parametrize("pooling", ["mean_tokens", "cls_token", "max_tokens"])
def test_vectors_equal_transformers(pooling, tmp_path):
    model = write(tmp_path, pooling)
    chance = np.random.default_rng(0)
    texts = [chance.integers(5, len(WORDS), n).tolist() for n in (1, 7, 32, 7, 2, 19, 7)]
    backend = backends.load(str(tmp_path))
    try:
        vectors = backend.embed(texts)
        np.testing.assert_allclose(vectors, expected(model, texts, pooling), atol=2e-5)
        for text, vector in zip(texts, vectors, strict=True):  # neighbours in a batch change nothing
            np.testing.assert_allclose(backend.embed([text])[0], vector, atol=1e-5)
    finally:
        backend.close()


def test_llm_embeds_texts_between_their_marks(tmp_path):
    model = write(tmp_path)
    with LLM(str(tmp_path)) as llm:
        vectors = llm.embed(["a b", "[SEP] a"])
        ids = [2, WORDS.index("a"), WORDS.index("b"), 3]
        raw = expected(model, [ids], "mean_tokens")[0]
        np.testing.assert_allclose(vectors[0], raw / np.linalg.norm(raw), atol=2e-5)
        assert llm.get_tokenizer().encode_prompt("[SEP] a").count(3) == 1  # a typed mark is no mark
        with pytest.raises(InvalidRequest, match="writes no text"):
            llm.generate("a b")


def test_what_cannot_be_embedded(tiny):
    backend = tiny[1]
    with pytest.raises(InvalidRequest, match=r"input 1 has 33 tokens; .* takes 1 to 32"):
        backend.embed([[5], [5] * 33])
    with pytest.raises(InvalidRequest, match="input 0 has 0 tokens"):
        backend.embed([[]])
    with pytest.raises(InvalidRequest, match="token ids go from 0 to"):
        backend.embed([[len(WORDS)]])
    with pytest.raises(InvalidRequest, match="writes no text"):
        backend.submit([Request("1", [5])], None)


def test_settings_that_encoders_do_not_have(tmp_path):
    write(tmp_path)
    for load in (LoadOptions(dtype="bfloat16"), LoadOptions(quant="int8"), LoadOptions(device="cuda")):
        with pytest.raises(UsageError):
            backends.load(str(tmp_path), load=load)
    with pytest.raises(UsageError, match="only the native backend"):
        backends.load(str(tmp_path), backend="pt")


def test_an_unknown_pooling_is_named(tmp_path):
    write(tmp_path, "other")
    with pytest.raises(CheckpointError, match="pooling_mode_other"):
        backends.load(str(tmp_path))


def test_many_callers_share_passes():
    sizes, gate = [], threading.Event()

    def encode(texts):
        gate.wait(10)
        sizes.append(len(texts))
        return np.array([[float(text[0])] for text in texts])

    line = EmbeddingQueue(encode, batch_tokens=8)
    try:
        futures = line.submit([np.array([0, 0])])
        while line.waiting:
            time.sleep(0.001)
        futures += [line.submit([np.array([i, 0])])[0] for i in range(1, 9)]
        gate.set()
        assert [future.result(10)[0] for future in futures] == list(range(9))
        assert sizes == [1, 4, 4]  # the first came alone; then as many as the budget holds
    finally:
        line.close()


def test_a_batch_that_fails_hurts_only_itself():
    def encode(texts):
        if texts[0][0] < 0:
            raise ValueError("bad")
        return np.zeros((len(texts), 1))

    line = EmbeddingQueue(encode)
    try:
        with pytest.raises(ValueError, match="bad"):
            line.submit([np.array([-1])])[0].result(10)
        assert line.submit([np.array([1])])[0].result(10) == 0
    finally:
        line.close()


def test_the_line_has_an_end_and_a_close():
    gate = threading.Event()

    def encode(texts):
        gate.wait(10)
        return np.zeros((len(texts), 1))

    line = EmbeddingQueue(encode, batch_tokens=1, max_waiting=2)
    first = line.submit([np.array([1])])[0]
    while line.waiting:
        time.sleep(0.001)
    second, third = line.submit([np.array([1]), np.array([1])])
    with pytest.raises(Overloaded):
        line.submit([np.array([1])])
    second.cancel()  # its caller has gone
    gate.set()
    assert first.result(10) == 0 and third.result(10) == 0
    line.close()


@pytest.mark.slow
def test_the_real_model_knows_cats():
    with LLM("all-minilm-l6-v2") as llm:
        cat, kitten, car = llm.embed(["a cat", "a kitten", "a car"])
    assert cat @ kitten > 0.7 > 0.5 > cat @ car


def test_engine_options_reach_the_line(tmp_path):
    write(tmp_path)
    backend = backends.load(str(tmp_path), engine=EngineOptions(max_num_queued=1))
    try:
        with pytest.raises(Overloaded):
            backend.embed([[5], [6], [7]])
        assert backend.stats().steps == 0
    finally:
        backend.close()
