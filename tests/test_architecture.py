"""Imports run one way, torch is a guest, and nothing unpickles or evaluates: held by reading every source file."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import martlet

ROOT = Path(martlet.__file__).parent
COMMON = {"collection", "errors", "lora_request", "flag", "grammar", "sampling_params", "_version"}
BELOW_BACKENDS = {"engine", "runners", "model", "kernels", "hub", "chat"}
ARROWS = {  # room -> the rooms it may import; the modules beside the rooms are rooms of one file
    "hub": set(),
    "chat": set(),
    "model": {"hub"},
    "kernels": {"model"},
    "runners": {"model", "kernels", "hub"},
    "engine": {"runners", "model", "kernels", "hub"},
    "backends": BELOW_BACKENDS,
    "server": {"backends", *BELOW_BACKENDS},
    "bench": {"backends", *BELOW_BACKENDS},
    "train": {"backends", *BELOW_BACKENDS},
    "export": {"train", "backends", *BELOW_BACKENDS},
    "recipes": {"train", *BELOW_BACKENDS},
    "cli": {"bench", "server", "train", "export", "recipes", "backends", *BELOW_BACKENDS},
    "llm": {"backends", *BELOW_BACKENDS},
    "client": set(),
    "swift": {"cli", "llm", "client", "train", "export", "backends", *BELOW_BACKENDS},
    "__main__": {"cli"},
    "__init__": {"llm"},
    **{name: set() for name in COMMON},
    "grammar": {"hub"},
}
CONTRACTS = {"chat": ("martlet.hub.card.", "martlet.hub.tokenizer.")}  # types a room may name of one beside it
TORCH_ROOMS = (
    "kernels/reference",
    "kernels/cuda",
    "runners/torch_runner",
    "runners/cuda_runner",
    "train/",
    "export/",
    "vision/",
    "image/",
)
TORCH_ROOMS += ("backends/transformers", "backends/vllm")
FILES = sorted(ROOT.rglob("*.py"))


def imports(tree: ast.AST, package: str) -> Iterator[str]:
    """Dotted names of everything a file imports, at any depth; relative ones resolved against `package`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package.rsplit(".", node.level - 1)[0] if node.level else ""
            module = ".".join(filter(None, (base, node.module)))
            yield from (f"{module}.{alias.name}" for alias in node.names)


def violations(path: Path, source: str) -> list[str]:
    """What a file at `path` (relative to the package) does that the house does not allow."""
    tree = ast.parse(source)
    room = path.parts[0].removesuffix(".py")
    found = []
    for name in imports(tree, ".".join(("martlet", *path.parent.parts))):
        top, _, rest = name.partition(".")
        target = rest.split(".")[0]
        is_room = top == "martlet" and ((ROOT / target).is_dir() or (ROOT / f"{target}.py").is_file())
        allowed = target in ARROWS[room] | COMMON | {room} or name.startswith(CONTRACTS.get(room, ()))
        if is_room and not allowed:
            found.append(f"{path}: {room} imports {name}")
        if top in ("torch", "triton") and not path.as_posix().startswith(TORCH_ROOMS):
            found.append(f"{path}: imports {name}, and torch is no guest there")
        if top in ("pickle", "cloudpickle", "dill", "joblib", "shelve", "marshal"):
            found.append(f"{path}: imports {name}")
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            if called in ("eval", "exec", "torch.load"):
                found.append(f"{path}:{node.lineno}: calls {called}")
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_the_arrows_hold(path):
    relative = path.relative_to(ROOT)
    assert relative.parts[0].removesuffix(".py") in ARROWS, f"a new room: add {relative.parts[0]} to ARROWS"
    assert violations(relative, path.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("hub/a.py", "from martlet.chat import template"),
        ("chat/a.py", "from martlet.hub.resolve import resolve"),
        ("hub/a.py", "def f():\n    from ..engine.request import Request"),
        ("engine/a.py", "import martlet.backends.base"),
        ("engine/a.py", "from martlet import server"),
        ("engine/a.py", "def f():\n    import torch.nn"),
        ("runners/cpu_runner.py", "from torch import Tensor"),
        ("model/a.py", "import pickle"),
        ("server/a.py", "x = eval('1')"),
        ("kernels/reference/a.py", "import torch\ntorch.load('f')"),
    ],
)
def test_the_rules_can_be_broken(path, source):
    assert violations(Path(path), source)


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("kernels/reference/a.py", "import torch"),
        ("hub/a.py", "from martlet import __version__\nfrom martlet.errors import MartletError\nfrom . import card"),
        ("server/a.py", "from martlet.backends.base import Backend"),
    ],
)
def test_the_rules_allow_what_they_should(path, source):
    assert violations(Path(path), source) == []
