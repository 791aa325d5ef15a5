"""Whatever fits the OpenAPI document is answered without a 5xx and as the document says."""

from __future__ import annotations

import httpx
import pytest
import schemathesis
import schemathesis.specs.openapi.checks as promises
from hypothesis import HealthCheck, given, settings
from live_server import live
from test_embeddings import Embedder

from fake_backend import EchoRunner, FakeTemplate
from martlet.server import create_app

CHECKS = [
    schemathesis.checks.not_a_server_error,
    promises.status_code_conformance,
    promises.content_type_conformance,
    promises.response_schema_conformance,
    promises.unsupported_method,
]


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    backend = Embedder(EchoRunner(max_model_len=64))
    app = create_app(backend, FakeTemplate(), adapter_dir=str(tmp_path_factory.mktemp("adapters")))
    with live(app) as address:
        yield app, address, backend
    backend.close()


ENDPOINTS = [
    ("POST", "/v1/chat/completions"),
    ("POST", "/v1/completions"),
    ("POST", "/v1/responses"),
    ("GET", "/v1/responses/{response_id}"),
    ("POST", "/v1/messages"),
    ("POST", "/v1/messages/count_tokens"),
    ("POST", "/v1/embeddings"),
    ("GET", "/v1/models"),
    ("GET", "/v1/models/{name}"),
    ("POST", "/v1/load_lora_adapter"),
    ("POST", "/v1/unload_lora_adapter"),
    ("POST", "/tokenize"),
    ("POST", "/detokenize"),
    ("GET", "/health"),
    ("GET", "/ready"),
    ("GET", "/version"),
    ("GET", "/metrics"),
]


@pytest.fixture(scope="module")
def document(served):
    app, address, _ = served
    schema = schemathesis.openapi.from_dict(app.openapi())
    schema.config.update(base_url=address)
    return schema


def promises_hold(served, document, method, path, examples):
    _, address, backend = served

    @settings(max_examples=examples, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
    @given(case=document[path][method].as_strategy())
    def try_one(case):
        case.call_and_validate(checks=CHECKS, timeout=60)

    try_one()
    assert httpx.get(f"{address}/health").status_code == 200
    assert backend.stats().kv_blocks_used == 0


@pytest.mark.parametrize(("method", "path"), ENDPOINTS)
def test_each_endpoint_does_as_the_document_says(served, document, method, path):
    promises_hold(served, document, method, path, 5)


@pytest.mark.slow
@pytest.mark.parametrize(("method", "path"), ENDPOINTS)
def test_each_endpoint_does_as_the_document_says_at_length(served, document, method, path):
    promises_hold(served, document, method, path, 200)


def test_the_document_names_every_endpoint(served):
    paths = httpx.get(f"{served[1]}/openapi.json").json()["paths"]
    found = {(method.upper(), path) for path, methods in paths.items() for method in methods}
    assert found == set(ENDPOINTS)
    for methods in paths.values():
        for operation in methods.values():
            assert "422" not in operation["responses"] and {"200", "4XX", "5XX"} <= set(operation["responses"])
