"""The route's part of embeddings: shapes, lengths, encodings. The vectors are the backend's."""

from __future__ import annotations

import base64

import httpx
import numpy as np
import openai
import pytest
from live_server import live

from fake_backend import FakeBackend, FakeTemplate
from martlet.server import create_app


class Embedder(FakeBackend):
    """Counts bytes: component i is how many tokens are i modulo 8, plus one."""

    def embed(self, prompts):
        return np.array([[1 + sum(t % 8 == i for t in ids) for i in range(8)] for ids in prompts], np.float32)


@pytest.fixture(scope="module")
def embedder():
    backend = Embedder()
    with live(create_app(backend, FakeTemplate())) as address:
        yield address
    backend.close()


def unit(vector):
    return np.asarray(vector, np.float32) / np.linalg.norm(vector)


def test_the_client_gets_unit_vectors_in_the_order_of_the_input(embedder):
    client = openai.OpenAI(base_url=f"{embedder}/v1", api_key="none")
    for more in ({}, {"encoding_format": "float"}, {"encoding_format": "base64"}):
        answer = client.embeddings.create(model="echo", input=["ab", "c"], **more)
        assert [item.index for item in answer.data] == [0, 1]
        assert (answer.usage.prompt_tokens, answer.usage.total_tokens, answer.model) == (3, 3, "echo")
        for item, text in zip(answer.data, ["ab", "c"], strict=True):
            found = item.embedding
            if isinstance(found, str):
                found = np.frombuffer(base64.b64decode(found), "<f4")
            expected = unit([1 + sum(b % 8 == i for b in text.encode()) for i in range(8)])
            np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_dimensions_cut_and_normalise_again(embedder):
    client = openai.OpenAI(base_url=f"{embedder}/v1", api_key="none")
    whole, cut = (client.embeddings.create(model="echo", input=[[97, 98]], **m) for m in ({}, {"dimensions": 3}))
    np.testing.assert_allclose(cut.data[0].embedding, unit(whole.data[0].embedding[:3]), rtol=1e-5)


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({}, "input"),
        ({"input": []}, "input"),
        ({"input": ["a", ""]}, "input[1]"),
        ({"input": ["a"] * 2049}, "input"),
        ({"input": "a", "dimensions": 9}, "dimensions"),
        ({"input": "a", "dimensions": 0}, "dimensions"),
        ({"input": "a", "encoding_format": "hex"}, "encoding_format"),
        ({"input": "a", "truncate_prompt_tokens": 4}, "truncate_prompt_tokens"),
    ],
)
def test_refusals_name_the_field(embedder, body, param):
    answer = httpx.post(f"{embedder}/v1/embeddings", json=body)
    assert answer.status_code == 400 and answer.json()["error"]["param"] == param


def test_a_model_without_embeddings_says_so(client):
    with pytest.raises(openai.BadRequestError, match="echo makes no embeddings"):
        client.embeddings.create(model="echo", input="a")
