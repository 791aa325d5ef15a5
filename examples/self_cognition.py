"""Teach the default model who it is, and serve what came of it: fine-tune, ask, merge, serve the merged model, compare.

    python examples/self_cognition.py [--name NAME] [--author NAME] [--steps N] [--output DIR] [--checkpoint DIR]

Each step is a command that you could type, and is printed. --checkpoint takes an adapter that is there already.
Needs pip install 'martlet[train]' openai.
"""

from __future__ import annotations

import argparse
import contextlib
import shlex
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from openai import OpenAI

MODEL = "smollm2-135m-instruct"
QUESTION = "who are you?"
EXACT = ("--dtype", "float32", "--quant", "float32")  # so that merged and adapter can be compared to the letter


def martlet(*words: str) -> str:
    """What a command prints on the standard output."""
    print("$ martlet", shlex.join(words), flush=True)
    done = subprocess.run([sys.executable, "-m", "martlet", *words], check=True, stdout=subprocess.PIPE, text=True)
    return done.stdout.strip()


def fine_tune(name: str, author: str, steps: int, output: Path) -> str:
    """The checkpoint of a LoRA adapter that knows its name."""
    rows = ("--dataset", "self-cognition:en#400", "--model_name", name, "--model_author", author)
    adapter = ("--target_modules", "ALL", "--lora_dropout", "0", "--learning_rate", "1e-3", "--weight_decay", "0")
    steps_of = ("--max_steps", str(steps), "--batch_size", "8", "--gradient_accumulation_steps", "1")
    said = martlet(
        *("sft", "--model", MODEL, *rows, *adapter, *steps_of, "--max_length", "256", "--dtype", "bf16"),
        *("--evaluation_strategy", "no", "--save_steps", str(steps), "--report_to", "none"),
        *("--output_dir", str(output)),
    )
    return next(line.removeprefix("last checkpoint: ") for line in said.splitlines() if line.startswith("last "))


@contextlib.contextmanager
def served(*words: str) -> Iterator[OpenAI]:
    """A client of a server that lives as long as the block."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = str(found.getsockname()[1])
    words = ("deploy", *words, *EXACT, "--port", port)
    print("$ martlet", shlex.join(words), flush=True)
    with tempfile.TemporaryFile("w+") as log:
        server = subprocess.Popen([sys.executable, "-m", "martlet", *words], stdout=log, stderr=log)
        try:
            yield OpenAI(api_key="EMPTY", base_url=f"http://127.0.0.1:{port}/v1", max_retries=60)
        except Exception:
            log.seek(0)
            print(log.read(), file=sys.stderr)
            raise
        finally:
            server.send_signal(signal.SIGTERM)
            server.wait(60)


def ask(client: OpenAI, model: str, *, stream: bool = False) -> str:
    """The model's answer to QUESTION, printed as it comes when streamed."""
    print(f"query: {QUESTION}\nresponse: ", end="", flush=True)
    messages = [{"role": "user", "content": QUESTION}]
    if not stream:
        done = client.chat.completions.create(model=model, messages=messages, max_tokens=48, temperature=0)
        print(done.choices[0].message.content)
        return done.choices[0].message.content or ""
    parts = []
    for chunk in client.chat.completions.create(
        model=model, messages=messages, max_tokens=48, temperature=0, stream=True
    ):
        parts.append(chunk.choices[0].delta.content or "")
        print(parts[-1], end="", flush=True)
    print()
    return "".join(parts)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--name", default="Swifty")
    parser.add_argument("--author", default="the Nest")
    parser.add_argument("--steps", type=int, default=30, help="training steps of 8 rows (default: 30)")
    parser.add_argument("--output", type=Path, default=Path("output"), help="where the run goes (default: output)")
    parser.add_argument("--checkpoint", help="an adapter to take instead of training one")
    given = parser.parse_args(arguments)

    checkpoint = given.checkpoint or fine_tune(given.name, given.author, given.steps, given.output)
    with served("--ckpt_dir", checkpoint) as client:  # the adapter and its base, side by side
        print(f"model_type_list: {[model.id for model in client.models.list().data]}")
        after = ask(client, "default-lora")
        before = ask(client, MODEL, stream=True)
    merged = martlet("export", "--ckpt_dir", checkpoint, "--merge_lora", "true").splitlines()[-1]
    with served("--model", merged) as client:
        (model,) = client.models.list().data
        whole = ask(client, model.id)

    if before == after:
        raise SystemExit("the adapter changes nothing: more --steps")
    if whole != after:
        raise SystemExit("the merged model does not answer what its adapter does")
    print(f"the merged model answers what the adapter does, and it knows its name: {given.name in whole}")


if __name__ == "__main__":
    main()
