"""Adapters over HTTP: who may change them, and which folders a client can reach."""

from __future__ import annotations

import httpx
import pytest
from live_server import live

from fake_backend import FakeBackend, FakeTemplate
from martlet.errors import InvalidRequest
from martlet.server import create_app

LOAD, UNLOAD = "/v1/load_lora_adapter", "/v1/unload_lora_adapter"


class Adaptable(FakeBackend):
    def __init__(self):
        self.loaded = {}
        self.asked = []
        super().__init__()

    def adapters(self):
        return tuple(self.loaded)

    def load_adapter(self, name, path):
        if path.name == "broken":
            raise InvalidRequest("no adapter_model.safetensors there", param="lora_path")
        self.loaded[name] = path

    def unload_adapter(self, name):
        del self.loaded[name]

    def submit(self, requests, sink):
        self.asked += [request.adapter for request in requests]
        for request in requests:
            request.adapter = None  # the echo knows none
        super().submit(requests, sink)


@pytest.fixture
def backend():
    backend = Adaptable()
    yield backend
    backend.close()


@pytest.fixture
def folder(tmp_path):
    root = tmp_path / "adapters"
    for name in ("good", "other", "broken"):
        (root / name).mkdir(parents=True)
    (tmp_path / "secret").mkdir()
    (root / "link").symlink_to(tmp_path / "secret")
    (root / "file").write_text("no folder")
    return root


@pytest.fixture
def url(backend, folder):
    with live(create_app(backend, FakeTemplate(), adapter_dir=str(folder))) as address:
        yield address


def post(url, path, **body):
    return httpx.post(url + path, json=body)


def test_an_adapter_comes_answers_to_its_name_and_goes(url, backend, folder):
    assert post(url, LOAD, lora_name="kakarot", lora_path="good").json() == {"status": "loaded", "model": "kakarot"}
    assert backend.loaded == {"kakarot": folder / "good"}
    cards = {card["id"]: card for card in httpx.get(f"{url}/v1/models").json()["data"]}
    assert cards["kakarot"]["parent"] == "echo" and cards["kakarot"]["root"] == "kakarot"
    assert cards["echo"]["parent"] is None
    for path, more in (
        ("chat/completions", {"messages": [{"role": "user", "content": "a"}]}),
        ("completions", {"prompt": "a"}),
    ):
        for model, adapter in (("kakarot", "kakarot"), ("echo", None)):
            answer = post(url, f"/v1/{path}", model=model, max_tokens=1, **more)
            assert answer.json()["model"] == model and backend.asked[-1] == adapter
    assert post(url, LOAD, lora_name="kakarot", lora_path="other").json()["error"]["param"] == "lora_name"
    assert post(url, LOAD, lora_name="kakarot", lora_path="other", load_inplace=True).status_code == 200
    assert backend.loaded == {"kakarot": folder / "other"}
    assert post(url, UNLOAD, lora_name="kakarot").status_code == 200
    assert post(url, "/v1/completions", model="kakarot", prompt="a").status_code == 404
    assert post(url, UNLOAD, lora_name="kakarot").status_code == 404


@pytest.mark.parametrize(
    "path",
    [
        "../secret",
        "good/../../secret",
        "/",
        "/etc",
        "link",
        "link/..",
        "",
        ".",
        "..",
        "file",
        "none",
        "a\0b",
        "x" * 5000,
        "~",
        "good/../..",
        "C:\\",
        "file:///etc",
        "http://169.254.169.254/latest",
        "//etc",
    ],
)
def test_no_path_leads_out_of_the_folder(url, backend, path):
    answer = post(url, LOAD, lora_name="x", lora_path=path)
    assert answer.status_code == 400 and answer.json()["error"]["param"] == "lora_path"
    assert "secret" not in answer.text and backend.loaded == {}


@pytest.mark.parametrize("name", ["", "../x", "a/b", ".hidden", "a b", "x" * 129, "a\n", "é", "echo", "{{7*7}}"])
def test_names_are_plain_and_free(url, backend, name):
    answer = post(url, LOAD, lora_name=name, lora_path="good")
    assert answer.status_code == 400 and answer.json()["error"]["param"] == "lora_name"


def test_what_the_backend_says_is_passed_on(url):
    answer = post(url, LOAD, lora_name="x", lora_path="broken")
    assert answer.status_code == 400 and "adapter_model" in answer.json()["error"]["message"]


def test_without_the_flag_nobody_may(backend, folder):
    with live(create_app(backend, FakeTemplate())) as url:
        for path, body in ((LOAD, {"lora_name": "x", "lora_path": str(folder / "good")}), (UNLOAD, {"lora_name": "x"})):
            answer = post(url, path, **body)
            assert answer.status_code == 403 and answer.json()["error"]["type"] == "permission_error"
    assert backend.loaded == {}


def test_a_backend_that_cannot_says_so(folder):
    backend = FakeBackend()
    with live(create_app(backend, FakeTemplate(), adapter_dir=str(folder))) as url:
        answer = post(url, LOAD, lora_name="x", lora_path="good")
        assert answer.status_code == 400 and "without slots for adapters" in answer.json()["error"]["message"]
    backend.close()
