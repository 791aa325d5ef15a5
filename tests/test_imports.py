"""What importing costs: rooms that work without torch do not bring it in, and help answers at once."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

HEAVY = ("torch", "transformers", "vllm", "numpy", "rich", "jinja2", "tokenizers", "fastapi", "pydantic", "httpx")


def python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_no_room_but_the_torch_ones_imports_torch():
    rooms = [
        "hub",
        "chat",
        "model",
        "model.families",
        "engine",
        "runners",
        "backends",
        "backends.base",
        "server",
        "cli",
        "bench",
    ]
    rooms += ["cli.infer", "cli.deploy", "cli.models", "cli.bench", "cli.doctor"]
    code = f"""
import sys
for room in {rooms!r}:
    __import__("martlet." + room)
print([m for m in {HEAVY[:3]!r} if m in sys.modules])
"""
    assert python(code).strip() == "[]"


@pytest.mark.parametrize(
    ("words", "exit_code"),
    [
        (["--help"], 0),
        (["--version"], 0),
        (["infer", "--help"], 0),
        (["deploy", "--help"], 0),
        (["bench", "cpu", "--help"], 0),
        (["infer", "--tempratur", "1"], 2),
        (["infr"], 2),
    ],
)
def test_help_and_typos_answer_at_once(words, exit_code):
    """What takes time is importing; seconds themselves would depend on who else uses the machine."""
    code = f"""
import json, sys
from martlet.cli import main
code = main({words!r})
print(json.dumps([code, [m for m in {HEAVY!r} if m in sys.modules]]))
"""
    assert json.loads(python(code).splitlines()[-1]) == [exit_code, []]


def test_a_start_imports_only_what_its_first_token_needs():
    """What a start does not need costs it milliseconds each: these came in once, for what few requests ask for."""
    code = """
import sys
from martlet import hub
from martlet.backends.native import load_native
from martlet.engine.options import EngineOptions
from martlet.engine.request import Request
from martlet.runners.base import LoadOptions
from martlet.sampling_params import SamplingParams
card = hub.resolve(hub.DEFAULT_MODEL)
backend = load_native(card, LoadOptions(max_model_len=64), EngineOptions())
ids = backend.tokenizer.encode_prompt("Hello")
(answer,) = backend.generate([Request("1", ids, SamplingParams(max_tokens=1), stream=True)])
assert answer.token_ids and "_core" not in vars(backend.tokenizer)  # the library's vocabulary, which few texts need
heavy = {"torch", "jinja2", "ml_dtypes", "orjson", "gguf", "safetensors", "subprocess", "zipfile", "shutil", "uuid"}
heavy |= {"concurrent.futures.thread"}
ours = {"hub.peft", "hub.pypi", "hub.sentencepiece", "hub.tiktoken", "hub.safetensors_file", "model.adapters"}
ours |= {"runners.cpu_runner.recurrence", "kernels.ops", "grammar.process", "chat"}
print(sorted((heavy | {f"martlet.{name}" for name in ours}) & set(sys.modules)))
"""
    python(code)  # packed weights are kept by the first start that finds none, which takes more
    assert python(code).strip() == "[]"


def test_an_answer_in_the_terminal_imports_no_more_than_its_template():
    code = """
import sys
from martlet.cli import main
assert main(["infer", "--prompt", "Hi", "--max_new_tokens", "1", "--max_model_len", "128"]) == 0
ours = {"hub.peft", "chat.parser", "chat.reply", "server", "train"}
print(sorted(({f"martlet.{name}" for name in ours} | {"uuid", "secrets", "rich"}) & set(sys.modules)))
"""
    assert python(code).splitlines()[-1] == "[]"


def test_a_name_is_found_in_the_one_file_that_spells_it():
    code = """
from martlet.hub import registry
assert registry.find("SmolLM2_135M.instruct").family == "llama"
print(registry._read.cache_info().currsize)
"""
    assert python(code).strip() == "1"


def test_import_martlet_is_cheap():
    """Next to nothing is loaded: no library but the standard one, and few of our own modules."""
    code = """
import sys
before = set(sys.modules)
import martlet
new = {name for name in set(sys.modules) - before if not name.startswith("martlet.")}
print([name for name in new if name.split(".")[0] not in sys.stdlib_module_names | {"martlet"}])
print(sum(name.startswith("martlet") for name in sys.modules) < 6)
"""
    assert python(code).split("\n")[:2] == ["[]", "True"]
