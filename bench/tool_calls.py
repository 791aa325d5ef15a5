"""How many forced tool calls are valid: python bench/tool_calls.py [--n 500] [--model ...] [--tool_format ...].

Each request offers one to three tools with random JSON schemas to a server of its own and must call one of them
(tool_choice: required). A call counts if its arguments parse and are valid by the schema of the tool it names. Beside
it stands the same without constraint: the same prompt as plain text, the answer read by the same parser. Strings and
lists in the schemas are bounded, since what max_tokens cuts off cannot be valid.
"""

from __future__ import annotations

import argparse
import json
import random
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import jsonschema
import openai

from martlet.chat import Parser, Reply, tool_format
from martlet.chat.tool_prompt import system_text

NOUNS = [
    "city",
    "date",
    "name",
    "count",
    "price",
    "colour",
    "size",
    "user",
    "order",
    "title",
    "weight",
    "level",
    "unit",
    "path",
    "code",
    "tags",
]
VERBS = ["get", "find", "set", "make", "send", "book", "count", "play", "open", "check"]
ASKS = (
    "Please help me with the {} of the {}.",
    "I need the {} for my {} as soon as possible.",
    "What is the {} of this {}?",
    "Use a tool to {} the {}.",
)
MAX_TOKENS = 600


def random_schema(draw: random.Random, depth: int = 0) -> dict[str, Any]:
    """Of any value."""
    kind = draw.choice(["string", "enum", "integer", "number", "boolean", "array", "object"][: 7 if depth < 2 else 5])
    if kind == "enum":
        return {"enum": draw.sample([*NOUNS, 1, 2.5, None, True], draw.randint(1, 5))}
    if kind == "string":
        return {"type": "string", "maxLength": draw.randint(5, 40)}
    if kind in ("integer", "number"):
        low = draw.randint(-100, 100)
        return {"type": kind, "minimum": low, "maximum": low + draw.randint(1, 1000)}
    if kind == "array":
        return {"type": "array", "items": random_schema(draw, depth + 1), "maxItems": draw.randint(1, 4)}
    return random_object(draw, depth + 1) if kind == "object" else {"type": kind}


def random_object(draw: random.Random, depth: int = 0) -> dict[str, Any]:
    names = draw.sample(NOUNS, draw.randint(0 if depth == 0 else 1, 4))
    required = [name for name in names if draw.random() < 0.6]
    properties = {name: random_schema(draw, depth) for name in names}
    return {"type": "object", "properties": properties, "required": required, "additionalProperties": False}


def random_request(seed: int) -> tuple[str, list[dict[str, Any]]]:
    """What a user says, and tools."""
    draw = random.Random(seed)
    names = draw.sample([f"{verb}_{noun}" for verb in VERBS for noun in NOUNS], draw.randint(1, 3))
    tools = [{"type": "function", "function": {"name": n, "parameters": random_object(draw)}} for n in names]
    return draw.choice(ASKS).format(draw.choice(NOUNS), draw.choice(NOUNS)), tools


def is_valid(calls: Sequence[tuple[str, str]], tools: Sequence[dict[str, Any]]) -> bool:
    """calls: (name, arguments as text). There is one at least, and all are valid."""
    schemas = {tool["function"]["name"]: tool["function"]["parameters"] for tool in tools}
    try:
        for name, arguments in calls:
            jsonschema.validate(json.loads(arguments), schemas[name])
    except (KeyError, ValueError, jsonschema.ValidationError):
        return False
    return bool(calls)


def constrained(client: openai.OpenAI, model: str, seed: int) -> bool:
    text, tools = random_request(seed)
    choice = client.chat.completions.create(
        model=model,
        messages=[{"role": "user", "content": text}],
        tools=tools,
        tool_choice="required",
        parallel_tool_calls=False,
        max_tokens=MAX_TOKENS,
        seed=seed,
    ).choices[0]
    calls = [(call.function.name, call.function.arguments) for call in choice.message.tool_calls or ()]
    return choice.finish_reason == "tool_calls" and is_valid(calls, tools)


def unconstrained(client: openai.OpenAI, model: str, seed: int, format_name: str) -> bool:
    text, tools = random_request(seed)
    known = tool_format(format_name)
    messages = [{"role": "system", "content": system_text(tools, known)}, {"role": "user", "content": text}]
    answer = client.chat.completions.create(model=model, messages=messages, max_tokens=MAX_TOKENS, seed=seed)
    reply, parser = Reply(), Parser(known, [tool["function"]["name"] for tool in tools])
    reply.add(parser.feed(answer.choices[0].message.content) + parser.finish())
    return is_valid([(call.name, call.arguments) for call in reply.calls], tools)


def measure(url: str, model: str, n: int, format_name: str, *, beside: bool = True) -> tuple[int, int]:
    """Of n requests each: how many were valid with constraint, and without (0 unless `beside`)."""
    client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=600)
    with client, ThreadPoolExecutor(8) as pool:
        held = sum(pool.map(lambda seed: constrained(client, model, seed), range(n)))
        seeds = range(n if beside else 0)
        free = sum(pool.map(lambda seed: unconstrained(client, model, seed, format_name), seeds))
    return held, free


def main() -> int:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--n", type=int, default=500)
    options.add_argument("--model", default="smollm2-135m-instruct")
    options.add_argument("--tool_format", default="hermes")
    given = options.parse_args()
    with socket.socket() as free_port:
        free_port.bind(("127.0.0.1", 0))
        port = free_port.getsockname()[1]
    command = ["deploy", "--model", given.model, "--port", str(port), "--tool_format", given.tool_format]
    server = subprocess.Popen([sys.executable, "-m", "martlet", *command, "--max_model_len", "4096"])
    try:
        url = f"http://127.0.0.1:{port}"
        while not _is_up(url):
            if server.poll() is not None:
                return 1
            time.sleep(0.2)
        begun = time.monotonic()
        held, free = measure(url, given.model, given.n, given.tool_format)
        took = time.monotonic() - begun
        print(f"{given.model}, {given.tool_format}, {given.n} requests each, {took:.0f} s")
        print(f"valid with tool_choice required: {held} ({100 * held / given.n:.1f} %)")
        print(f"valid without constraint:        {free} ({100 * free / given.n:.1f} %)")
        return 0 if held == given.n else 1
    finally:
        server.terminate()
        server.wait(30)


def _is_up(url: str) -> bool:
    try:
        return httpx.get(f"{url}/health").status_code == 200
    except httpx.HTTPError:
        return False


if __name__ == "__main__":
    sys.exit(main())
