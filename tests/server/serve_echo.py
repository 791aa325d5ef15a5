"""A server process for the signal tests: python serve_echo.py PORT STEP_SECONDS DRAIN_SECONDS."""

from __future__ import annotations

import logging
import sys
from pathlib import Path

TESTS = Path(__file__).parents[1]
sys.path[:0] = [str(TESTS), str(TESTS / "sim")]

from fake_backend import FakeBackend, FakeTemplate  # noqa: E402
from martlet.server import create_app, serve  # noqa: E402
from martlet.server.sockets import bind  # noqa: E402

if __name__ == "__main__":
    logging.basicConfig(level="INFO")
    port, delay, drain = int(sys.argv[1]), float(sys.argv[2]), float(sys.argv[3])
    backend = FakeBackend()
    backend.runner.delay = delay
    with bind("127.0.0.1", port) as listener:
        code = serve(create_app(backend, FakeTemplate()), listener, drain_seconds=drain)
    backend.close()
    sys.exit(code)
