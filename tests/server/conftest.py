from __future__ import annotations

import openai
import pytest
from live_server import live

from fake_backend import FakeBackend, FakeTemplate
from martlet.server import create_app


@pytest.fixture(scope="module")
def backend():
    backend = FakeBackend()
    yield backend
    backend.close()


@pytest.fixture(scope="module")
def url(backend):
    """An echo server that answers to the names echo and parrot."""
    with live(create_app(backend, FakeTemplate(), served_model_names=["echo", "parrot"])) as address:
        yield address


@pytest.fixture(scope="module")
def client(url):
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
        yield client
