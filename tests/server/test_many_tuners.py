"""Twelve adapters and their base over HTTP, 64 requests at once: each is answered as its merged model alone would.

What does not fit the base is refused with a 400 that names the tensor and both shapes, and is never served.
"""

from __future__ import annotations

import json
import random
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest
from byte_tokenizer import ByteTokenizer
from live_server import live

from lora_models import KINDS, greedy, make_base, tune
from martlet.backends.native import NativeBackend
from martlet.runners.base import LoadOptions
from martlet.runners.cpu_runner import CpuRunner
from martlet.server import create_app

NAMES = [f"a{n}" for n in range(12)]
TOKENS = 12


class Ascii(ByteTokenizer):
    """All its tokens are characters, so that texts tell tokens apart."""

    vocab_size = 128
    eos_ids = ()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("adapters")


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return make_base(tmp_path_factory.mktemp("base"), vocab_size=Ascii.vocab_size)


@pytest.fixture(scope="module")
def tuned(base, folder):
    return {name: tune(base[1], folder / name, seed=n, **KINDS[n % len(KINDS)]) for n, name in enumerate(NAMES)}


@pytest.fixture(scope="module")
def url(base, tuned, folder):
    """A server with fewer slots than adapters; all but one are there from the start."""
    load = LoadOptions(
        dtype="float32", device="cpu", kv_cache_tokens=4096, max_num_seqs=16, max_model_len=64, max_adapters=4,
        max_lora_rank=16,
    )  # fmt: skip
    backend = NativeBackend(base[0], Ascii(), CpuRunner(base[0], load), max_lora_rank=load.max_lora_rank)
    for name in NAMES[:-1]:
        backend.load_adapter(name, tuned[name].path)
    with live(create_app(backend, adapter_dir=str(folder))) as address:
        yield address
    assert backend.stats().kv_blocks_used == 0
    backend.close()


def load(url: str, name: str, path) -> httpx.Response:
    return httpx.post(f"{url}/v1/load_lora_adapter", json={"lora_name": name, "lora_path": str(path)}, timeout=60)


def models(url: str) -> list[str]:
    return [card["id"] for card in httpx.get(f"{url}/v1/models").json()["data"]]


def complete(client: httpx.Client, model: str, prompt: list[int], stream: bool) -> str:
    body = {"model": model, "prompt": prompt, "max_tokens": TOKENS, "temperature": 0, "ignore_eos": True}
    if not stream:
        return client.post("/v1/completions", json=body).json()["choices"][0]["text"]
    with client.stream("POST", "/v1/completions", json={**body, "stream": True}) as answer:
        events = [line.removeprefix("data: ") for line in answer.iter_lines() if line]
    assert events.pop() == "[DONE]"
    return "".join(choice["text"] for event in events for choice in json.loads(event)["choices"])


def test_64_mixed_requests_are_answered_as_by_their_merged_models(url, base, tuned):
    assert load(url, NAMES[-1], tuned[NAMES[-1]].path).status_code == 200  # one more, by a client
    assert models(url) == ["tiny", *NAMES]
    draw = random.Random(1)
    shared = [draw.randrange(Ascii.vocab_size) for _ in range(24)]
    asked, wanted = [], {}
    for number in range(64):
        own = [draw.randrange(Ascii.vocab_size) for _ in range(draw.randint(1, 8))]
        asked.append((["tiny", *NAMES][number % 13], shared[: draw.randint(0, 24)] + own))
    for name in ("tiny", *NAMES):
        model = tuned[name].merged() if name in tuned else base[1]
        prompts = [prompt for each, prompt in asked if each == name]
        for prompt, tokens in zip(prompts, greedy(model, prompts, TOKENS), strict=True):
            wanted[name, tuple(prompt)] = bytes(tokens).decode()
    limits = httpx.Limits(max_connections=64)
    with httpx.Client(base_url=url, timeout=120, limits=limits) as client, ThreadPoolExecutor(64) as pool:
        got = list(pool.map(lambda i: complete(client, *asked[i], stream=i % 2 == 0), range(64)))
    assert got == [wanted[name, tuple(prompt)] for name, prompt in asked]
    assert len(set(got)) > 50, "the adapters hardly change an answer"


@pytest.fixture(scope="module")
def unfit(base, folder, tmp_path_factory):
    """Adapters that the base cannot take, by what is wrong with them, below the folder that clients may load from."""
    _, other = make_base(tmp_path_factory.mktemp("other"), hidden_size=64, vocab_size=Ascii.vocab_size)
    return {
        "of another base": tune(other, folder / "foreign").path,
        "a rank too large": tune(base[1], folder / "large", r=32).path,
        "nothing there": folder / "nowhere",
    }


@pytest.mark.parametrize(
    ("what", "said"),
    [
        ("of another base", ["layers.0.mlp.down_proj.lora_B.weight [64, 4]", "is [48, 80]", "another model"]),
        ("a rank too large", ["lora_A.weight [32, ", "rank 32", "--max_lora_rank 32"]),
        ("nothing there", ["lora_path is no folder", "--adapter_dir"]),
    ],
)
def test_what_does_not_fit_is_a_400_and_never_served(url, unfit, what, said):
    before = models(url)
    answer = load(url, "unfit", unfit[what])
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert error["param"] == "lora_path" and all(word in error["message"] for word in said), error["message"]
    assert models(url) == before
    assert httpx.post(f"{url}/v1/completions", json={"model": "unfit", "prompt": "a"}).status_code == 404
    assert load(url, NAMES[0], unfit[what]).status_code == 400  # nor does it take the place of one that is served
    with httpx.Client(base_url=url) as client:
        assert len(complete(client, NAMES[0], [1, 2, 3], stream=False)) == TOKENS
