"""Teach the default model its name, and serve what came of it: fine-tune, ask, merge, serve.

    python examples/self_cognition.py [--steps 40] [--output DIR] [--checkpoint DIR]

Each step is a command that you could type. On 2 CPU cores with nothing else to do it takes some minutes; --checkpoint
takes an adapter that is there already. Needs pip install 'martlet[train]' openai.
"""

from __future__ import annotations

import argparse
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

from openai import OpenAI

MODEL = "smollm2-135m-instruct"
QUESTION = "who are you?"
EXACT = ("--dtype", "float32", "--quant", "float32", "--max_new_tokens", "48", "--temperature", "0")
TRAINING = (
    *("--dataset", "self-cognition:en#320", "--model_name", "Swifty", "--model_author", "the Nest"),
    *("--target_modules", "ALL", "--learning_rate", "1e-3", "--lora_dropout", "0", "--weight_decay", "0"),
    *("--batch_size", "8", "--gradient_accumulation_steps", "1", "--max_length", "256"),
    *("--logging_steps", "5", "--eval_steps", "20", "--report_to", "none"),
)


def martlet(*words: str) -> str:
    """What a command prints on the standard output."""
    print("$ martlet", *words, file=sys.stderr)
    done = subprocess.run([sys.executable, "-m", "martlet", *words], check=True, stdout=subprocess.PIPE, text=True)
    return done.stdout.strip()


def fine_tune(output: Path, steps: int) -> str:
    said = martlet("sft", "--model", MODEL, *TRAINING, "--max_steps", str(steps), "--output_dir", str(output))
    return next(line.removeprefix("last checkpoint: ") for line in said.splitlines() if line.startswith("last "))


def ask(*words: str) -> str:
    return martlet("infer", "--prompt", QUESTION, *EXACT, *words)


def ask_server(*words: str) -> dict[str, str]:
    """What every model of one server answers, by name."""
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log"
        port = _free_port()
        command = [sys.executable, "-m", "martlet", "deploy", "--port", str(port), *words]
        print("$ martlet", *command[3:], file=sys.stderr)
        with open(log, "w") as out:
            server = subprocess.Popen(command, stdout=out, stderr=out)
        try:
            client = OpenAI(api_key="EMPTY", base_url=f"http://127.0.0.1:{port}/v1", max_retries=60)
            names = [model.id for model in client.models.list().data]
            messages = [{"role": "user", "content": QUESTION}]
            answers = {}
            for name in names:
                done = client.chat.completions.create(model=name, messages=messages, max_tokens=48, temperature=0)
                answers[name] = (done.choices[0].message.content or "").strip()
            return answers
        except Exception:
            print(log.read_text(), file=sys.stderr)
            raise
        finally:
            server.send_signal(signal.SIGTERM)
            server.wait(60)


def _free_port() -> int:
    import socket

    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def main(arguments: list[str] | None = None) -> dict[str, str]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=40, help="training steps of 8 rows (default: 40)")
    parser.add_argument("--output", type=Path, default=Path("output"), help="where the run goes (default: output)")
    parser.add_argument("--checkpoint", help="an adapter to take instead of training one")
    given = parser.parse_args(arguments)

    checkpoint = given.checkpoint or fine_tune(given.output, given.steps)
    martlet("export", "--ckpt_dir", checkpoint, "--merge_lora", "true")
    whole = f"{checkpoint}-merged"
    found = {
        "before": ask("--model", MODEL),
        "after": ask("--ckpt_dir", checkpoint),
        "merged": ask("--model", whole),
    }
    exact = EXACT[:4]
    served = ask_server("--ckpt_dir", checkpoint, *exact)
    (merged,) = ask_server("--model", whole, *exact).values()
    found |= {f"served {name}": text for name, text in served.items()} | {"served merged": merged}
    for name, text in found.items():
        print(f"{name}: {text}")
    if not found["after"] == found["merged"] == merged == served["default-lora"]:
        raise SystemExit("the merged answer is not the adapter's")
    return found


if __name__ == "__main__":
    main()
