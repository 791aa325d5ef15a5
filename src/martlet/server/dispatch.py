"""From the backend's thread to the coroutines that wait: one wake-up of the event loop a step, whatever the batch."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterable

from martlet.engine.request import Output


class Inbox:
    """Outputs for one HTTP request, in order. `fail` makes the reader raise, whatever has come."""

    __slots__ = ("_error", "_items", "_waiter")

    def __init__(self) -> None:
        self._items: list[Output] = []
        self._waiter: asyncio.Future[None] | None = None
        self._error: Exception | None = None

    def put(self, output: Output) -> None:
        self._items.append(output)
        if self._waiter is not None:
            self._wake()

    def fail(self, error: Exception) -> None:
        self._error = error
        self._wake()

    async def get(self) -> list[Output]:
        """All that has come since the last call, at least one."""
        if not self._items and self._error is None:
            self._waiter = asyncio.get_running_loop().create_future()
            await self._waiter
        if self._error is not None:
            raise self._error
        items, self._items = self._items, []
        return items

    def _wake(self) -> None:
        waiter, self._waiter = self._waiter, None
        if waiter is not None and not waiter.done():  # done: its task was cancelled
            waiter.set_result(None)


class Dispatcher:
    """The one sink of an event loop. Inboxes are touched on the loop's thread only."""

    def __init__(self, loop: asyncio.AbstractEventLoop):
        self._loop = loop
        self._inboxes: dict[str, Inbox] = {}

    def open(self, request_ids: Iterable[str]) -> Inbox:
        inbox = Inbox()
        for request_id in request_ids:
            self._inboxes[request_id] = inbox
        return inbox

    def forget(self, request_ids: Iterable[str]) -> None:
        for request_id in request_ids:
            self._inboxes.pop(request_id, None)

    @property
    def open_ids(self) -> list[str]:
        return list(self._inboxes)

    def put(self, outputs: list[Output]) -> None:
        """Called on the backend's thread."""
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody is left to tell
            self._loop.call_soon_threadsafe(self._deliver, outputs)

    def _deliver(self, outputs: list[Output]) -> None:
        for output in outputs:
            if (inbox := self._inboxes.get(output.request_id)) is not None:
                inbox.put(output)
