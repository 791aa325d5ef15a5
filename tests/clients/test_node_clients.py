"""The official npm clients (needs node and a registry of npm packages): make test-slow."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent / "server"))

from live_server import live  # noqa: E402
from test_embeddings import Embedder  # noqa: E402

from fake_backend import FakeTemplate  # noqa: E402
from martlet.server import create_app  # noqa: E402


@pytest.mark.slow
def test_every_check_of_the_node_clients_holds(tmp_path):
    for name in ("package.json", "check.mjs"):
        shutil.copy(HERE / "node" / name, tmp_path)
    install = ["npm", "install", "--no-audit", "--no-fund", "--ignore-scripts"]
    subprocess.run(install, cwd=tmp_path, check=True, timeout=300)
    backend = Embedder()
    with live(create_app(backend, FakeTemplate())) as url:
        done = subprocess.run(["node", "check.mjs", url], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    backend.close()
    assert done.returncode == 0, done.stdout + done.stderr
