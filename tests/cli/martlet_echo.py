"""The martlet command with an echo model instead of a real one: python martlet_echo.py STEP_SECONDS infer ..."""

from __future__ import annotations

import sys
from pathlib import Path

TESTS = Path(__file__).parents[1]
sys.path[:0] = [str(TESTS), str(TESTS / "sim")]

from fake_backend import FakeBackend, FakeTemplate  # noqa: E402
from martlet import cli  # noqa: E402
from martlet.cli import infer  # noqa: E402
from martlet.cli.options import Loaded  # noqa: E402


def load(*_) -> Loaded:
    backend = FakeBackend()
    backend.runner.delay = float(sys.argv[1])
    return Loaded(backend, FakeTemplate(), {"temperature": 0.0})


if __name__ == "__main__":
    infer.load = load
    sys.exit(cli.main(sys.argv[2:]))
