"""A real HTTP server on a free port, in a thread of the test process."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator

from martlet.server.deploy import Server, server_config
from martlet.server.sockets import bind


@contextlib.contextmanager
def live(app) -> Iterator[str]:
    """Serve `app`; gives its address, e.g. http://127.0.0.1:41234."""
    listener = bind("127.0.0.1", 0)
    server = Server(server_config(app))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    try:
        until(lambda: server.started)
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(10)
        listener.close()
        assert not thread.is_alive()


def until(condition, seconds: float = 10.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.002)
