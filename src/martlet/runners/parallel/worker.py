"""Rank 1, 2, ...: the same steps as rank 0, from the messages it writes. `python -m` this, started by `processes`."""

from __future__ import annotations

import os
import select
import signal
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import orjson

from martlet.errors import MartletError
from martlet.model import adapters
from martlet.runners.base import Runner
from martlet.runners.parallel import wire
from martlet.runners.parallel.ring import BEAT, DONE, FAILED, Closed, Reader
from martlet.runners.parallel.share import load_share

BEAT_SECONDS = 0.5
LEAVE = 3.0  # seconds to free what it holds, once it is to leave


@dataclass(slots=True)
class TheirMasks:
    """martlet.runners.base.Masks that rank 0 waited for and sent after the step."""

    entries: np.ndarray
    receive: Callable[[], wire.Message]
    bits: np.ndarray | None = None

    def wait(self) -> np.ndarray:
        if self.bits is None:
            self.bits = self.receive().arrays[0]
        return self.bits


def main(argv: list[str]) -> None:
    rank, size, memory, doorbell, lifeline, report, store = map(int, argv)
    for number in (signal.SIGINT, signal.SIGTERM):  # to a group of processes; rank 0 decides when to end
        signal.signal(number, signal.SIG_IGN)
    reader = Reader(memory, doorbell, rank, size)
    threading.Thread(target=live, args=(lifeline, reader.told), daemon=True).start()

    def complain(error: Exception) -> None:
        message = str(error) or repr(error)
        os.write(report, orjson.dumps([type(error).__name__, message, getattr(error, "param", None)]) + b"\n")

    try:
        card, options = wire.loaded_from(wire.unpack(reader.receive()))
        runner = load_share(card, options, rank, f"/proc/self/fd/{store}")
    except Closed:
        os._exit(0)
    except Exception as error:
        complain(error)
        if not isinstance(error, MartletError):
            raise
        os._exit(error.exit_code)
    reader.told[DONE] = 1
    try:
        follow(runner, reader, complain)
    except Closed:
        runner.close()
        os._exit(0)  # nothing to wait for: no thread of a library may hold the process


def follow(runner: Runner, reader: Reader, complain: Callable[[Exception], None]) -> None:
    """Do as rank 0 does until it closes."""
    number = 0

    def receive() -> wire.Message:
        nonlocal number
        message = wire.unpack(reader.receive())
        number += 1
        return message

    while True:
        message = receive()
        at = number
        try:
            do(runner, message, receive)
        except Closed:
            raise
        except Exception as error:
            complain(error)
            reader.told[FAILED] = at + 1
        reader.told[DONE] = number + 1


def do(runner: Runner, message: wire.Message, receive: Callable[[], wire.Message]) -> None:
    if message.kind == "step":
        batch, entries = wire.step_from(message)
        masks = None if entries is None else TheirMasks(entries, receive)
        try:
            runner.launch(batch._replace(masks=masks))
        finally:
            if masks is not None:  # they come, used or not
                masks.wait()
    elif message.kind == "ready":
        runner.get_ready()
    else:
        slot, adapter = wire.adapter_from(message)
        runner.load_adapter(slot, adapters.cut(adapter, runner.spec.part))


def live(lifeline: int, told: np.ndarray) -> None:
    """Beat, and leave when rank 0 is gone, whatever this rank is waiting for."""
    while not select.select([lifeline], [], [], BEAT_SECONDS)[0]:
        told[BEAT] += np.uint64(1)
    threading.Event().wait(LEAVE)
    os._exit(1)


if __name__ == "__main__":
    main(sys.argv[1:])
