"""The official client gets an encoder's vectors over HTTP, and is told that it writes no text."""

import sys
from pathlib import Path

import numpy as np
import openai
import pytest
from live_server import live

from martlet import backends
from martlet.server import create_app

sys.path.insert(0, str(Path(__file__).parents[1] / "backends"))


@pytest.fixture(scope="module")
def client(tmp_path_factory):
    from tiny_encoder import write

    folder = tmp_path_factory.mktemp("encoder")
    write(folder)
    backend = backends.load(str(folder))
    app = create_app(backend, None, served_model_names=["tiny"])
    with live(app) as address, openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0) as client:
        yield client
    backend.close()


def test_vectors_of_texts_and_ids(client):
    answer = client.embeddings.create(model="tiny", input=["a b c", "d"])  # the client asks for base64
    plain = client.embeddings.create(model="tiny", input=[[2, 5, 6, 7, 3]], encoding_format="float")
    first = np.array(answer.data[0].embedding)
    assert [item.index for item in answer.data] == [0, 1] and len(first) == 24
    assert np.linalg.norm(first) == pytest.approx(1, abs=1e-5)
    np.testing.assert_allclose(first, plain.data[0].embedding, atol=1e-5)
    assert answer.usage.prompt_tokens == 5 + 3
    short = np.array(client.embeddings.create(model="tiny", input="a b c", dimensions=8).data[0].embedding)
    np.testing.assert_allclose(short, first[:8] / np.linalg.norm(first[:8]), atol=1e-5)


def test_what_an_encoder_refuses(client):
    with pytest.raises(openai.BadRequestError, match="takes 1 to 32"):
        client.embeddings.create(model="tiny", input="a " * 40)
    with pytest.raises(openai.BadRequestError, match="writes no text"):
        client.completions.create(model="tiny", prompt="a")
