"""Many streaming clients, in several processes: raw sockets and little more, so that the server is what is measured.

A client asks one completion after the other on one connection and notes when events come; what stands in them it does
not read, but for the usage at the end. Run as a module it is one of the processes: an order as JSON on the standard
input, {port, model, requests: for each client its prompts}, and the timelines as JSON on the standard output.
"""

from __future__ import annotations

import asyncio
import json
import re
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass

from martlet.bench.timeline import Timeline
from martlet.errors import MartletError

EVENT, DONE = b"data: {", b"data: [DONE]"
USAGE = re.compile(rb'"completion_tokens":\s*(\d+)')
PROCESSES = 4


@dataclass(frozen=True, slots=True)
class Target:
    """A server on this machine, and what is asked of it: greedy completions of `new_tokens`, the end token ignored."""

    port: int
    model: str
    new_tokens: int


def measure(target: Target, prompts: Sequence[Sequence[int]], clients: int) -> list[Timeline]:
    """All prompts, by `clients` at once, each with its share of them.

    Raises MartletError when an answer is no stream of the right length.
    """
    shares = [prompts[client::clients] for client in range(clients)]
    number = min(PROCESSES, clients)
    orders = [
        {
            "port": target.port,
            "model": target.model,
            "new_tokens": target.new_tokens,
            "clients": [list(map(list, share)) for share in shares[process::number]],
        }
        for process in range(number)
    ]
    command = [sys.executable, "-m", "martlet.bench.load"]
    running = [subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) for _ in orders]
    try:
        for process, order in zip(running, orders, strict=True):
            process.stdin.write(json.dumps(order).encode() + b"\n")
            process.stdin.flush()
        for process in running:  # all have read their orders and wait
            process.stdout.readline()
        for process in running:
            process.stdin.close()
        answers = [json.loads(process.stdout.read() or b'{"error": "a client process died"}') for process in running]
    finally:
        for process in running:
            process.kill()
            process.wait()
    if errors := [answer["error"] for answer in answers if "error" in answer]:
        raise MartletError(f"port {target.port}: {errors[0]}")
    return [Timeline(**fields) for answer in answers for fields in answer["timelines"]]


class _Client(asyncio.Protocol):
    """One connection. `timeline` is that of the answer under way, `ended` its end."""

    def __init__(self) -> None:
        self.ended: asyncio.Future[None]
        self.timeline: Timeline

    def connection_made(self, transport) -> None:
        self._transport = transport

    def ask(self, body: bytes, prompt_tokens: int) -> asyncio.Future[None]:
        self.ended = asyncio.get_running_loop().create_future()
        self.timeline = Timeline(time.monotonic(), prompt_tokens)
        self._tail = b""
        self._transport.write(
            b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
            b"Content-Length: %d\r\n\r\n" % len(body) + body
        )
        return self.ended

    def data_received(self, data: bytes) -> None:
        now = time.monotonic()
        if self.ended.done():
            return
        if not self._tail and not data.startswith(b"HTTP/1.1 200"):
            self.ended.set_exception(MartletError(f"it answered {data[:400]!r}"))
            return
        text = self._tail + data
        if count := text.count(EVENT) - self._tail.count(EVENT):
            self.timeline.add(now, count)
        self._tail = text[-1000:] if len(data) < 1000 else data
        if DONE in self._tail and self._tail.endswith(b"0\r\n\r\n"):
            told = USAGE.findall(self._tail)
            if not told:
                self.ended.set_exception(MartletError(f"no usage came at the end of a stream: {self._tail!r}"))
                return
            self.timeline.counts[-1] += int(told[-1]) - self.timeline.new_tokens
            self.ended.set_result(None)

    def connection_lost(self, error: Exception | None) -> None:
        if not self.ended.done():
            self.ended.set_exception(MartletError(f"it closed the connection: {error}"))


async def _clients(order: dict) -> list[Timeline]:
    loop = asyncio.get_running_loop()
    timelines: list[Timeline] = []

    def body(prompt: Sequence[int]) -> bytes:
        fields = {"model": order["model"], "prompt": prompt, "max_tokens": order["new_tokens"], "temperature": 0}
        fields |= {"ignore_eos": True, "stream": True, "stream_options": {"include_usage": True}}
        return json.dumps(fields).encode()

    async def client(prompts: Sequence[Sequence[int]]) -> None:
        transport, protocol = await loop.create_connection(_Client, "127.0.0.1", order["port"])
        try:
            for text, prompt in [(body(prompt), prompt) for prompt in prompts]:
                await protocol.ask(text, len(prompt))
                if (got := protocol.timeline.new_tokens) != order["new_tokens"]:
                    raise MartletError(f"an answer had {got} tokens, not {order['new_tokens']}")
                timelines.append(protocol.timeline)
        finally:
            transport.close()

    await asyncio.gather(*(client(prompts) for prompts in order["clients"]))
    return timelines


def main() -> None:
    order = json.loads(sys.stdin.readline())
    sys.stdout.write("ready\n")
    sys.stdout.flush()
    sys.stdin.read()  # until all processes are ready
    try:
        timelines = asyncio.run(_clients(order))
        fields = ("submitted", "prompt_tokens", "times", "counts")
        told = {"timelines": [{name: getattr(t, name) for name in fields} for t in timelines]}
    except (MartletError, OSError) as error:
        told = {"error": str(error)}
    sys.stdout.write(json.dumps(told))


if __name__ == "__main__":
    main()
