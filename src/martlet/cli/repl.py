"""The interactive chat: reads messages, streams answers, keeps the history. Ctrl-C stops an answer, Ctrl-D leaves."""

from __future__ import annotations

import contextlib
import importlib
import json
import select
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from martlet.errors import MartletError

HELP = """\
/help          this list
/clear         forget the conversation
/system TEXT   set the system message (without TEXT: show it)
/save FILE     append the conversation to FILE as one JSON line
/exit          leave (as Ctrl-D does); Ctrl-C stops an answer"""
PASTE_GAP = 0.03  # seconds: lines that follow faster than anybody types belong to one pasted message

Message = dict[str, str]
Answer = Callable[[list[Message]], Iterator[str]]


@dataclass
class Conversation:
    """What was said. system None: the model's own default stands."""

    system: str | None = None
    turns: list[Message] = field(default_factory=list)

    @property
    def messages(self) -> list[Message]:
        head = [] if self.system is None else [{"role": "system", "content": self.system}]
        return head + self.turns


def chat(answer: Answer, system: str | None = None) -> int:
    """Talk until the input ends. `answer` streams the text that follows a list of messages, and a line end."""
    conversation = Conversation(system)
    if sys.stdin.isatty():
        print("Type a message, /help for commands, Ctrl-D to leave.", file=sys.stderr)
        with contextlib.suppress(ImportError):  # without it, lines are read plainly
            importlib.import_module("readline")  # gives input() editing and history
    while True:
        try:
            text = read_message()
        except EOFError:
            if sys.stdin.isatty():
                print()
            return 0
        except KeyboardInterrupt:
            print("\n(Ctrl-D or /exit leaves)", file=sys.stderr)
            continue
        if text.strip() in ("/exit", "/quit"):
            return 0
        if text.startswith("/"):
            command(conversation, text)
        elif text.strip():
            reply(conversation, text, answer)


def read_message() -> str:
    """One message; a pasted block of lines is one message. EOFError at the end of the input."""
    tty = sys.stdin.isatty()
    lines = [input("> " if tty else "")]
    if not lines[0].startswith("/"):
        with contextlib.suppress(EOFError):
            while tty and select.select([sys.stdin], [], [], PASTE_GAP)[0]:
                lines.append(input())
    return "\n".join(lines)


def command(conversation: Conversation, text: str) -> None:
    """Carry out a /command; what it says goes to stderr, so a piped chat holds answers only."""
    name, _, rest = text.strip().partition(" ")
    rest = rest.strip()
    if name == "/help":
        said = HELP
    elif name == "/clear":
        conversation.turns.clear()
        said = "(forgotten)"
    elif name == "/system" and rest:
        conversation.system = rest
        said = "(system message set)"
    elif name == "/system":
        said = conversation.system if conversation.system is not None else "(the model's default)"
    elif name == "/save" and rest:
        try:
            with Path(rest).expanduser().open("a", encoding="utf-8") as file:
                file.write(json.dumps({"messages": conversation.messages}, ensure_ascii=False) + "\n")
            said = f"(saved {len(conversation.messages)} messages to {rest})"
        except OSError as error:
            said = f"cannot write {rest}: {error.strerror}"
    elif name == "/save":
        said = "/save wants a file name"
    else:
        said = f"unknown command {name}; /help lists them"
    print(said, file=sys.stderr)


def reply(conversation: Conversation, text: str, answer: Answer) -> None:
    """Stream one answer and remember it, also when Ctrl-C cuts it short. A refused message is not remembered."""
    conversation.turns.append({"role": "user", "content": text})
    said = ""
    try:
        for piece in answer(conversation.messages):
            said += piece
            show(piece)
    except KeyboardInterrupt:
        print(flush=True)
    except MartletError as error:
        print(
            f"martlet: {error}" + (" (/clear forgets the conversation)" if len(conversation.turns) > 1 else ""),
            file=sys.stderr,
        )
        conversation.turns.pop()
        return
    conversation.turns.append({"role": "assistant", "content": said.removesuffix("\n")})


def show(piece: str) -> None:
    """Print a piece of an answer at once. On a terminal, control characters are not obeyed: a model is not its user."""
    if sys.stdout.isatty():
        piece = "".join(c for c in piece if c in "\n\t" or (c >= " " and not "\x7f" <= c <= "\x9f"))
    sys.stdout.write(piece)
    sys.stdout.flush()
