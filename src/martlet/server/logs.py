"""The server's log: lines for people, or JSON for machines; one line a request, and how it goes from time to time."""

from __future__ import annotations

import asyncio
import logging
import time
from typing import Any

import orjson

from martlet.backends.base import Backend
from martlet.engine.request import Stats
from martlet.server.record import Record

log = logging.getLogger("martlet.server")


def set_up(level: str, form: str) -> None:
    """form: "text" or "json"."""
    logging.basicConfig(format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    if form == "json":
        for handler in logging.getLogger().handlers:
            handler.setFormatter(JsonFormatter())
    logging.getLogger("martlet").setLevel(level.upper())


class JsonFormatter(logging.Formatter):
    """One JSON object a line, times in UTC. What a record carries in `fields` stands beside its message."""

    converter = time.gmtime

    def format(self, record: logging.LogRecord) -> str:
        line = {
            "time": self.formatTime(record, "%Y-%m-%dT%H:%M:%S") + f".{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **getattr(record, "fields", {}),
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return orjson.dumps(line, default=str).decode()


def log_request(level: int, record: Record, method: str, path: str, status: int) -> None:
    if not log.isEnabledFor(level):
        return
    seconds = time.perf_counter() - record.started
    known = record.fields()
    words = " ".join(f"{name}={value}" for name, value in known.items())
    fields = {"id": record.id, "method": method, "path": path, "status": status, "seconds": round(seconds, 3), **known}
    log.log(level, "%s %s %s %d %.3fs %s", record.id, method, path, status, seconds, words, extra={"fields": fields})


async def log_throughput(backend: Backend, interval: float) -> None:
    """A line every `interval` seconds in which something was computed."""
    before, began = backend.stats(), time.perf_counter()
    while True:
        await asyncio.sleep(interval)
        now, at = backend.stats(), time.perf_counter()
        if now.steps != before.steps or now.generated_tokens != before.generated_tokens:
            fields = throughput(before, now, at - began)
            text = "{running} running, {waiting} waiting, {prompt_per_s} prompt and {output_per_s} output tokens/s, "
            text += "KV {kv_percent} %, {cached_percent} % of the prompt tokens from the prefix cache"
            log.info(text.format(**fields), extra={"fields": fields})
        before, began = now, at


def throughput(before: Stats, now: Stats, seconds: float) -> dict[str, Any]:
    prompt = now.prompt_tokens - before.prompt_tokens
    return {
        "running": now.running,
        "waiting": now.waiting,
        "prompt_per_s": round(prompt / seconds),
        "output_per_s": round((now.generated_tokens - before.generated_tokens) / seconds),
        "kv_percent": round(100 * now.kv_blocks_used / now.kv_blocks_total) if now.kv_blocks_total else 0,
        "cached_percent": round(100 * (now.cached_tokens - before.cached_tokens) / prompt) if prompt else 0,
    }
