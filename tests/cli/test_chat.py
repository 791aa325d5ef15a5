"""The interactive chat as a person meets it: on a terminal, with Ctrl-C and Ctrl-D."""

from __future__ import annotations

import json
import os
import pty
import select
import subprocess
import sys
import time
from pathlib import Path

import pytest

ECHO = Path(__file__).parent / "martlet_echo.py"


# Takes its standard input as controlling terminal and becomes the program. Done in a process of its own, because to
# fork this one, which may have threads by now, and run Python in the child could hang it.
ON_TERMINAL = "import fcntl, os, sys, termios as t; fcntl.ioctl(0, t.TIOCSCTTY, 0); os.execv(sys.argv[1], sys.argv[1:])"


class Terminal:
    """A program on a pseudo-terminal."""

    def __init__(self, *words: str, delay: str = "0"):
        self.fd, inner = pty.openpty()
        self.process = subprocess.Popen(
            [sys.executable, "-c", ON_TERMINAL, sys.executable, str(ECHO), delay, "infer", *words],
            stdin=inner,
            stdout=inner,
            stderr=inner,
            env={**os.environ, "TERM": "dumb"},
            start_new_session=True,
        )
        os.close(inner)
        self.seen = ""

    def type(self, text: str) -> None:
        os.write(self.fd, text.encode())

    def until(self, text: str, seconds: float = 30) -> str:
        """What was shown up to and with `text`, since the last call."""
        deadline = time.monotonic() + seconds
        while text not in self.seen:
            assert time.monotonic() < deadline, f"no {text!r} in {self.seen!r}"
            if select.select([self.fd], [], [], 0.1)[0]:
                self.seen += os.read(self.fd, 65536).decode(errors="replace").replace("\r\n", "\n")
        at = self.seen.index(text) + len(text)
        shown, self.seen = self.seen[:at], self.seen[at:]
        return shown

    def exit_code(self) -> int:
        while select.select([self.fd], [], [], 10)[0]:
            try:
                self.seen += os.read(self.fd, 65536).decode(errors="replace")
            except OSError:  # the other side is closed
                break
        return self.process.wait(10)


@pytest.fixture
def terminal():
    opened = []

    def start(*words, **more):
        opened.append(Terminal(*words, **more))
        opened[-1].until("> ")
        return opened[-1]

    yield start
    for one in opened:
        os.close(one.fd)  # hangs up


def test_a_conversation(terminal, tmp_path):
    t = terminal("--system", "Be kind.")
    t.type("Grüße 👋\n")
    assert "\nGrüße 👋\n> " in t.until("\n> ")
    t.type("/help\n")
    assert "/save FILE" in t.until("> ")
    t.type("/system\n")
    assert "Be kind." in t.until("> ")
    t.type("/system Be brief.\n")
    t.until("(system message set)\n> ")
    t.type(f"/save {tmp_path}/talk.jsonl\n")
    t.until("(saved 3 messages")
    t.until("> ")
    t.type("/clear\n")
    t.until("(forgotten)\n> ")
    t.type(f"/save {tmp_path}/talk.jsonl\n")
    t.until("(saved 1 messages")
    t.until("> ")
    t.type("/nonsense\n")
    t.until("unknown command /nonsense")
    t.until("> ")
    t.type("/save\n")
    t.until("wants a file name\n> ")
    t.type(f"/save {tmp_path}/no/such/folder\n")
    t.until("cannot write")
    t.until("> ")
    t.type("/exit\n")
    assert t.exit_code() == 0
    first, second = (json.loads(line)["messages"] for line in (tmp_path / "talk.jsonl").read_text().splitlines())
    assert first == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Grüße 👋"},
        {"role": "assistant", "content": "Grüße 👋"},
    ]
    assert second == first[:1]


def test_ctrl_c_stops_the_answer_and_not_the_program(terminal, tmp_path):
    t = terminal(delay="0.05")
    t.type("a" * 100 + "\n")
    t.until("\naaa")
    t.type("\x03")
    t.until("> ", 5)
    t.type(f"/save {tmp_path}/talk.jsonl\n")
    t.until("(saved 2 messages")
    t.until("> ")
    t.type("short\n")
    t.until("\nshort\n> ")
    t.type("half a line")
    t.until("half a line")
    time.sleep(0.2)  # input() sleeps on until the next key where the signal comes just before it waits for one
    t.type("\x03")
    t.until("(Ctrl-D or /exit leaves)\n> ")
    t.type("\x04")
    assert t.exit_code() == 0
    said = json.loads((tmp_path / "talk.jsonl").read_text())["messages"][1]["content"]
    assert 3 <= len(said) < 100 and set(said) == {"a"}


def test_a_pasted_block_is_one_message(terminal):
    t = terminal()
    t.type("one\ntwo\n\nthree\n")
    t.until("three\n")
    assert "one\ntwo\n\nthree\n> " in t.until("\n> ")


def test_a_message_too_long_is_refused_and_the_chat_goes_on(terminal):
    t = terminal()
    t.type("first\n")
    t.until("\nfirst\n> ")
    shown = ""
    while "the prompt has" not in shown:
        t.type("x" * 60 + "\n")
        shown = t.until("\n> ")
    assert shown.endswith(
        "tokens; this model takes at most 512 for prompt and output together (/clear forgets the conversation)\n> "
    )
    t.type("/clear\n")
    t.until("> ")
    t.type("again\n")
    t.until("\nagain\n> ")


def test_control_characters_of_a_model_do_not_reach_the_terminal(monkeypatch, capsys):
    from martlet.cli import repl

    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    repl.show("red\x1b[31m\x07\x9b31m\ttab\nline é")
    assert capsys.readouterr().out == "red[31m31m\ttab\nline é"


def test_a_piped_chat_prints_answers_only():
    command = [sys.executable, str(ECHO), "0", "infer"]
    done = subprocess.run(command, input="one\n/system x\n\ntwo\n", capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (0, "one\ntwo\n")


def test_bytes_that_are_no_text_do_not_end_the_chat():
    command = [sys.executable, str(ECHO), "0", "infer"]
    done = subprocess.run(command, input=b"caf\xe9\nnext\n", capture_output=True, timeout=60)
    assert (done.returncode, done.stdout.decode()) == (0, "caf\ufffd\nnext\n")


def test_ctrl_c_ends_a_single_answer():
    command = [sys.executable, str(ECHO), "0.05", "infer", "--prompt", "b" * 200]
    child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert child.stdout.read(3) == "bbb"
    child.send_signal(2)
    out, err = child.communicate(timeout=20)
    assert child.returncode == 130
    assert len(out) < 150
    assert err == "\n"
