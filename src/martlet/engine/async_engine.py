"""The engine on a thread of its own, for servers and iterators. Other threads queue commands; the engine takes them
between steps, so no lock is ever held while a step computes."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterable
from typing import Protocol

from martlet.engine.adapters import AdapterNames
from martlet.engine.engine import Engine
from martlet.engine.request import Output, Request, Stats
from martlet.errors import InvalidRequest, MartletError

log = logging.getLogger("martlet")

QUIET = 0.05  # seconds without a command, after which the engine gets ready for what may come


class Sink(Protocol):
    """Where outputs go: called on the engine's thread at most once a step; must not block."""

    def put(self, outputs: list[Output]) -> None: ...


class AsyncEngine:
    """Thread-safe face of an Engine, which belongs to it from now on. An idle engine sleeps on a condition."""

    def __init__(self, engine: Engine):
        self.engine = engine
        self._wake = threading.Condition()
        self._incoming: list[Request] = []
        self._aborts: list[str] = []
        self._sinks: dict[str, Sink] = {}
        self._closing = False
        self._failure: str | None = None
        if (watch := getattr(engine.runner, "watch", None)) is not None:  # it may break for good between two steps
            watch(self._lost)
        self._thread = threading.Thread(target=self._run, name="martlet-engine", daemon=True)
        self._thread.start()

    @property
    def adapters(self) -> AdapterNames:
        return self.engine.adapters

    def submit(self, requests: Iterable[Request], sink: Sink) -> None:
        """Queue requests; `sink` gets their outputs until the one marked `last`.

        Raises InvalidRequest or Overloaded, and then queues none of them.
        """
        requests = list(requests)
        for request in requests:
            self.engine.check(request)
        with self._wake:
            if self._closing or self._failure:
                raise MartletError(self._failure or "the engine is shut down")
            ids = [request.id for request in requests]
            if len(set(ids)) < len(ids) or not self._sinks.keys().isdisjoint(ids):
                raise InvalidRequest(
                    "request ids must differ from each other and from running ones", param="request_id"
                )
            self.engine.check_room(len(self._incoming) + len(ids))
            self._sinks.update(dict.fromkeys(ids, sink))
            self._incoming += requests
            self._wake.notify()

    def abort(self, request_ids: Iterable[str]) -> None:
        with self._wake:
            self._aborts += request_ids
            self._wake.notify()

    def stats(self) -> Stats:
        stats = self.engine.stats()
        return stats._replace(waiting=stats.waiting + len(self._incoming), error=self._failure or stats.error)

    @property
    def failure(self) -> str | None:
        """Why nothing will ever be answered again; None while all is well."""
        return self._failure

    def close(self, timeout: float = 30.0) -> None:
        """Abort what runs, tell its sinks, and stop the thread. May be called twice."""
        with self._wake:
            self._closing = True
            self._wake.notify()
        if threading.current_thread() is not self._thread:
            self._thread.join(1.0 if self._failure else timeout)  # a step that lost its runner may never end

    def _run(self) -> None:
        engine, held = self.engine, []
        try:
            while self._take_commands():
                engine.launch()
                self._deliver(held)
                held = engine.collect()
                # While a device computes, this thread leaves Python to those who take the outputs. So with steps under
                # way they wait for the next launch: delivered before it, they would have both take turns for the lock.
                if not engine.outputs_wait:
                    self._deliver(held)
                    held = []
                engine.help()  # and then see what has come
        except Exception as error:  # a bug in the engine itself: nobody may wait for ever because of it
            log.exception("the engine thread died")
            self._deliver(held)
            self._fail_all("the engine died; see the log", error)
        else:
            self._deliver(held)
            engine.close()
            self._deliver(self.engine.step())

    def _lost(self, error: MartletError) -> None:
        """The runner can run nothing any more. On a thread of the runner's: ours may be waiting for a step for ever."""
        self._fail_all(str(error), error)

    def _fail_all(self, reason: str, error: Exception) -> None:
        with self._wake:
            self._failure = self._failure or reason
            ids = list(self._sinks)
        self._deliver([Output(request_id=i, finish_reason="error", error=error, last=True) for i in ids])

    def _has_commands(self) -> bool:
        return bool(self._incoming or self._aborts or self._closing or self.engine.has_work)

    def _wait(self) -> None:
        """Until there is something to do. Quiet time goes to what the runner has yet to get ready."""
        patience: float | None = QUIET
        while True:
            with self._wake:
                if self._wake.wait_for(self._has_commands, patience):
                    return
            patience = 0.0 if self._get_ready() else None

    def _get_ready(self) -> bool:
        """A piece of what later steps would have to wait for. False: nothing is left."""
        get_ready = getattr(self.engine.runner, "get_ready", None)
        if get_ready is None:
            return False
        try:
            return get_ready()
        except Exception:  # whatever it is, a step that needs it meets it again and tells those who asked
            log.warning("getting ready for later steps failed; they will do it themselves", exc_info=True)
            return False

    def _take_commands(self) -> bool:
        """Wait until there is something to do, and apply what was asked meanwhile. False: time to stop."""
        self._wait()
        with self._wake:
            if self._closing:
                self._aborts += self._sinks
            incoming, self._incoming = self._incoming, []
            aborts, self._aborts = self._aborts, []
        for request in incoming:
            self.engine.enqueue(request)
        for request_id in aborts:
            self.engine.abort(request_id)
        return not self._closing

    def _deliver(self, outputs: list[Output]) -> None:
        news: dict[int, tuple[Sink, list[Output]]] = {}
        with self._wake:
            for output in outputs:
                sink = self._sinks.get(output.request_id)
                if sink is None:  # it was failed when the runner was lost
                    continue
                news.setdefault(id(sink), (sink, []))[1].append(output)
                if output.last:
                    del self._sinks[output.request_id]
        for sink, batch in news.values():
            sink.put(batch)
