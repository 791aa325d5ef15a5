"""Keys, and what is open without one."""

from __future__ import annotations

import hmac
import socket
from types import SimpleNamespace

import httpx
import openai
import pytest
from live_server import live

from fake_backend import FakeBackend, FakeTemplate
from martlet.server import create_app

KEYS = ("first-key", "second-key")


@pytest.fixture(scope="module")
def app():
    backend = FakeBackend()
    yield create_app(backend, FakeTemplate(), api_keys=KEYS)
    backend.close()


@pytest.fixture(scope="module")
def url(app):
    with live(app) as address:
        yield address


def routes(app):
    """(method, path) of all that the application answers, from its own document and its documentation pages."""
    found = [(method.upper(), path) for path, methods in app.openapi()["paths"].items() for method in methods]
    return [*found, ("GET", "/openapi.json"), ("GET", "/docs"), ("GET", "/redoc"), ("GET", "/no/such/route")]


def test_every_route_but_health_needs_a_key(app, url):
    assert ("POST", "/v1/chat/completions") in routes(app) and ("GET", "/metrics") in routes(app)
    for method, path in routes(app):
        response = httpx.request(method, url + path)
        assert response.status_code == (200 if path in ("/health", "/ready") else 401), path
        if response.status_code == 401:
            error = response.json()["error"]
            assert error["type"] == "authentication_error"
            assert error.get("code") == (None if path.startswith("/v1/messages") else "invalid_api_key")


@pytest.mark.parametrize("key", KEYS)
def test_any_of_the_keys_lets_in(url, key):
    client = openai.OpenAI(base_url=f"{url}/v1", api_key=key)
    assert client.completions.create(model="echo", prompt="hi", temperature=0).choices[0].text == "hi"


@pytest.mark.parametrize(
    "header",
    ["", "Bearer", "Bearer first-ke", "Bearer first-key2", "Basic first-key", "first-key", "Bearer \xe9"],
)
def test_nothing_else_does(url, header):
    response = httpx.get(f"{url}/v1/models", headers=[(b"authorization", header.encode("latin-1"))])
    assert response.status_code == 401
    assert response.headers["www-authenticate"] == "Bearer"


@pytest.mark.parametrize("key", [*KEYS, "first-kez", "x", "x" * 1000])
def test_every_key_costs_the_same_comparisons(url, monkeypatch, key):
    """All known keys are compared in constant time, digests of one length, whichever was right and however much."""
    seen = []

    def compare(a, b):
        seen.append((len(a), len(b)))
        return hmac.compare_digest(a, b)

    monkeypatch.setattr("martlet.server.gate.hmac", SimpleNamespace(compare_digest=compare))
    status = httpx.get(f"{url}/v1/models", headers={"authorization": f"Bearer {key}"}).status_code
    assert status == (200 if key in KEYS else 401)
    assert seen == [(32, 32)] * 2 * len(KEYS)  # two headers may bring a key


def test_the_client_sees_an_authentication_error(url):
    with pytest.raises(openai.AuthenticationError):
        openai.OpenAI(base_url=f"{url}/v1", api_key="wrong").models.list()


@pytest.mark.parametrize(
    "target",
    [
        "//health",
        "/health/",
        "/health/../v1/models",
        "/./health",
        "/%68ealth",
        "/health%2f..%2fv1%2fmodels",
        "/v1/models?path=/health",
        "/v1/models#/health",
        "/v1/models;/health",
        "/HEALTH",
        "/v1//models",
        "http://health/v1/models",
        "//v1/models",
        "/v1/../v1/models",
        "/ready/../v1/models",
        "/v1/%6dodels",
        "/%76%31/models",
        "/v1/models%00",
        "/health%00/../v1/models",
        "/health\\..\\v1\\models",
        "/health;/../v1/models",
        "/.%2e/v1/models",
        "*",
    ],
)
def test_no_spelling_of_a_path_gets_around(url, target):
    """Sent byte for byte, as no client library would."""
    host, port = url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=5) as connection:
        connection.sendall(f"GET {target} HTTP/1.1\r\nHost: /health\r\nConnection: close\r\n\r\n".encode())
        status = connection.makefile("rb").readline().split()[1]
    assert status in (b"401", b"400")  # 400: not HTTP at all


def test_a_prefix_of_health_opens_nothing_with_a_query(url):
    assert httpx.get(f"{url}/health?x=1").status_code == 200
    assert httpx.get(f"{url}/healthy").status_code == 401
