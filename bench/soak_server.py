"""Many streaming clients, some of which leave: what finishes must be what a client alone would have got.

    python bench/soak_server.py --minutes 3                      # starts `martlet deploy` on the default model
    python bench/soak_server.py --url http://127.0.0.1:8000      # a server that runs already

First every prompt is answered alone (greedy). Then --clients clients ask at random for --minutes, one request after the
other, and --leave of the requests close their connection after a random number of chunks. Fails (exit code 1) when an
answer differs from its solo run, a status is not 200, a client is left without an end, or the server still holds
sequences or KV memory afterwards. Prints one JSON object.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import random
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

import httpx

SUBJECTS = ("swifts", "tea", "tides", "bread", "iron", "violins", "maps", "snow", "bridges", "salt")
ASKS = (
    "What are {}?",
    "Write one sentence about {}.",
    "List three facts about {}.",
    "Why do people care about {}? Explain it to a child, slowly, and with an example from everyday life.",
)


@dataclass
class Tally:
    finished: int = 0
    left: int = 0
    wrong: int = 0
    statuses: Counter[int] = field(default_factory=Counter)
    errors: list[str] = field(default_factory=list)
    first: list[float] = field(default_factory=list)  # seconds to the first text
    total: list[float] = field(default_factory=list)


def request(number: int) -> dict:
    ask = ASKS[number % len(ASKS)].format(SUBJECTS[number // len(ASKS) % len(SUBJECTS)])
    return {
        "messages": [{"role": "user", "content": ask}],
        "temperature": 0,
        "max_tokens": 8 + number * 7 % 25,
        "stream": True,
    }


async def ask(client: httpx.AsyncClient, body: dict, leave_after: int | None, tally: Tally) -> str | None:
    """The whole answer; None when this client left or was failed."""
    text, chunks, began, ended = "", 0, time.perf_counter(), False
    async with client.stream("POST", "/v1/chat/completions", json=body) as response:
        tally.statuses[response.status_code] += 1
        if response.status_code != 200:
            tally.errors.append((await response.aread()).decode()[:300])
            return None
        async for line in response.aiter_lines():
            if line == "data: [DONE]":
                ended = True
            elif line.startswith("data: "):
                event = json.loads(line[6:])
                if "error" in event:
                    tally.errors.append(line[:300])
                    return None
                piece = event["choices"][0]["delta"].get("content") or ""
                if piece and not text:
                    tally.first.append(time.perf_counter() - began)
                text, chunks = text + piece, chunks + 1
                if leave_after is not None and chunks >= leave_after:
                    tally.left += 1
                    return None
    if not ended:
        tally.errors.append("a stream without an end")
        return None
    tally.total.append(time.perf_counter() - began)
    return text


async def soak(url: str, key: str | None, minutes: float, clients: int, leave: float, prompts: int, seed: int) -> dict:
    headers = {"authorization": f"Bearer {key}"} if key else {}
    limits = httpx.Limits(max_connections=clients + 10, max_keepalive_connections=clients)
    async with httpx.AsyncClient(base_url=url, headers=headers, timeout=600, limits=limits) as client:
        alone = Tally()
        solo = [await ask(client, request(number), None, alone) for number in range(prompts)]
        assert None not in solo, alone.errors
        tally, deadline = Tally(), time.perf_counter() + minutes * 60

        async def one(number: int) -> None:
            draw = random.Random(seed * 100_003 + number)
            while time.perf_counter() < deadline:
                which = draw.randrange(prompts)
                leave_after = draw.randint(1, 12) if draw.random() < leave else None
                try:
                    text = await ask(client, request(which), leave_after, tally)
                except httpx.HTTPError as error:
                    tally.errors.append(repr(error))
                    continue
                if text is not None:
                    tally.finished += 1
                    if text != solo[which]:
                        tally.wrong += 1
                        tally.errors.append(f"{which}: {text!r} is not {solo[which]!r}")

        began = time.perf_counter()
        await asyncio.gather(*(one(number) for number in range(clients)))
        seconds = time.perf_counter() - began
        held = await settled(client)
    return {
        "clients": clients,
        "seconds": round(seconds, 1),
        "finished": tally.finished,
        "left": tally.left,
        "wrong": tally.wrong,
        "statuses": dict(tally.statuses),
        "failed": len(tally.errors),
        "errors": tally.errors[:5],
        "first_text_s": percentiles(tally.first),
        "answer_s": percentiles(tally.total),
        "alone_answer_s": percentiles(alone.total),
        "held_afterwards": held,
        "ok": tally.finished > 0 and not tally.errors and set(tally.statuses) == {200} and not any(held.values()),
    }


async def settled(client: httpx.AsyncClient) -> dict[str, float]:
    """What the server still holds once clients that left have been noticed."""
    names = ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc")
    for _ in range(50):
        lines = (await client.get("/metrics")).text.splitlines()
        held = {n: float(line.split()[-1]) for line in lines for n in names if line.startswith(f"martlet:{n}")}
        if not any(held.values()):
            break
        await asyncio.sleep(0.2)
    return held


def percentiles(values: list[float]) -> dict[str, float]:
    ordered = sorted(values) or [float("nan")]
    return {f"p{p}": round(ordered[min(len(ordered) - 1, len(ordered) * p // 100)], 3) for p in (50, 99)}


@contextlib.contextmanager
def served(model: str | None) -> Iterator[str]:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "martlet", "deploy", "--port", str(port), "--log_level", "warning"]
    process = subprocess.Popen([*command, *(("--model", model) if model else ())])
    url = f"http://127.0.0.1:{port}"
    try:
        while True:
            with contextlib.suppress(httpx.TransportError):
                if httpx.get(f"{url}/ready").status_code == 200:
                    break
            if process.poll() is not None:
                sys.exit("the server did not start")
            time.sleep(0.2)
        yield url
    finally:
        process.terminate()
        code = process.wait(60)
        print(f"the server ended with exit code {code}", file=sys.stderr)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", help="a server that runs already")
    parser.add_argument("--api_key")
    parser.add_argument("--model", help="for the server that is started (default: the default model)")
    parser.add_argument("--minutes", type=float, default=3.0)
    parser.add_argument("--clients", type=int, default=200)
    parser.add_argument("--leave", type=float, default=0.2, help="share of requests whose client leaves")
    parser.add_argument("--prompts", type=int, default=40)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    with contextlib.nullcontext(args.url) if args.url else served(args.model) as url:
        found = asyncio.run(soak(url, args.api_key, args.minutes, args.clients, args.leave, args.prompts, args.seed))
    print(json.dumps(found, indent=1, ensure_ascii=False))
    return 0 if found["ok"] else 1


if __name__ == "__main__":
    sys.exit(main())
