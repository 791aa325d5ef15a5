"""An answer's text, piece by piece, into content, reasoning and tool calls.

What comes out depends on the text alone, never on where it was cut, so that streaming and not streaming agree.
Nothing is lost: what begins like a call and turns out to be none, or a call of an unknown tool, is content. Once a
call has been announced (its name is known and its arguments have begun) everything up to its end mark is its
arguments, be it JSON or not. White space around calls and thoughts is markup and goes with the marks.
"""

from __future__ import annotations

import json
import re
import secrets
import string
from collections.abc import Callable, Collection, Sequence

from martlet.chat.incremental import SPACE, Cursor, Read, json_string, json_value
from martlet.chat.python_call import MAX_CHARACTERS, balanced, parse_arguments
from martlet.chat.reasoning import ReasoningFormat
from martlet.chat.reply import CallArguments, CallStart, Content, Delta, Reasoning
from martlet.chat.tool_formats import ToolFormat

_NAME = re.compile(r"[A-Za-z0-9_.\-]+")
_LONGEST_NAME = 256
_ARGUMENTS = ("arguments", "parameters")
_FENCED = re.compile(r"\s*```[A-Za-z]*[ \t]*\r?\n(.*?)\n?[ \t]*```\s*", re.DOTALL)
_ALPHABET = string.ascii_letters + string.digits


def new_call_id() -> str:
    return "call_" + "".join(secrets.choice(_ALPHABET) for _ in range(24))


class Parser:
    """Reads one answer.

    tools: names that may be called; none: nothing is a call. reasoning: how thoughts are marked, None where the
    model has none. inside_reasoning: the prompt has already opened them. max_calls: what comes after so many calls
    is content.
    """

    def __init__(
        self,
        tool_format: ToolFormat | None = None,
        tools: Collection[str] = (),
        *,
        reasoning: ReasoningFormat | None = None,
        inside_reasoning: bool = False,
        max_calls: int | None = None,
        call_id: Callable[[], str] = new_call_id,
    ):
        self._answer = _Answer(tool_format, frozenset(tools), reasoning, inside_reasoning, max_calls, call_id)
        self._reading = self._answer.read()
        next(self._reading, None)

    def feed(self, text: str) -> list[Delta]:
        """More of the answer; returns what it decides."""
        if not text:
            return []
        self._answer.text += text
        return self._go_on()

    def finish(self) -> list[Delta]:
        """The answer has ended; returns what was still open. Nothing may be fed afterwards."""
        self._answer.ended = True
        return self._go_on()

    def _go_on(self) -> list[Delta]:
        next(self._reading, None)
        deltas, self._answer.deltas = self._answer.deltas, []
        return deltas


class _Answer(Cursor):
    """deltas: what is decided and not yet given out. `held`: white space that is content only if content follows.
    `fresh`: no content yet since the last mark. `open`: the call whose arguments are being given out as they come.
    """

    def __init__(
        self,
        tool_format: ToolFormat | None,
        tools: frozenset[str],
        reasoning: ReasoningFormat | None,
        inside: bool,
        max_calls: int | None,
        call_id: Callable[[], str],
    ):
        super().__init__()
        self.deltas: list[Delta] = []
        self._format, self._tools = tool_format, tools
        self._reasoning, self._inside = reasoning, inside and reasoning is not None
        self._max_calls, self._call_id = max_calls, call_id
        self._plain = reasoning is None and not (tool_format and (tools or tool_format.call == "chatglm3"))
        self._calls = 0
        self._open: int | None = None
        self._kind: type[Content] | type[Reasoning] = Content
        self._held = ""
        self._gap = ""  # between content before and after calls
        self._spoken = False  # there was content
        self._fresh = False
        self._last = "\n"  # the character before text[0], for marks at the start of a line

    # What is said.

    def _say(self, text: str) -> None:
        text = self._held + text
        if self._fresh:
            text = text.lstrip(SPACE)
        said = text.rstrip(SPACE)
        self._held = text[len(said) :]
        if said:
            self._fresh = False
            self.deltas.append(self._kind(self._gap + said))
            self._gap, self._spoken = "", self._kind is Content

    def _boundary(self, kind: type[Content] | type[Reasoning]) -> None:
        if self._spoken and not self._gap:
            self._gap = self._held or "\n"
        self._held, self._fresh, self._kind = "", True, kind

    def _start(self, name: str) -> int:
        self._boundary(Content)
        number, self._calls = self._calls, self._calls + 1
        self.deltas.append(CallStart(number, self._call_id(), name))
        self.forget()
        return number

    def _whole_call(self, name: str, arguments: str) -> None:
        self.deltas.append(CallArguments(self._start(name), arguments))

    def _flush(self) -> None:
        if self._open is not None and self.at:
            self.deltas.append(CallArguments(self._open, self.text[: self.at]))
            self.forget()

    def blocked(self) -> None:
        self._flush()

    def forget(self) -> None:
        self._last = self.text[self.at - 1] if self.at else self._last
        super().forget()

    # What is read.

    def read(self) -> Read[None]:
        known = self._format
        if self._plain:
            while True:
                if self.text:
                    self.deltas.append(Content(self.text))
                    self.text = ""
                if self.ended:
                    return
                yield
        if self._reasoning:
            yield from self._thoughts(self._reasoning)
        if known is not None and known.call == "chatglm3":
            yield from self._turns(known)
        elif known is None or not self._tools:
            yield from self._text_until("")
        else:
            if known.at == "start":
                start = self.at
                yield from self.space()
                if not (yield from self._call_list(known)):
                    self.at = start
            while known.at != "start" and (yield from self._text_until(known.begin)):
                if not (yield from self._call_list(known)):
                    self.at = len(known.begin)
                    self._say(known.begin)
                    self.forget()
            yield from self._text_until("")
        if not self._fresh and self._held:
            self.deltas.append(self._kind(self._held))

    def _text_until(self, mark: str) -> Read[bool]:
        """Say everything up to `mark`, which is left; False at the end of the text."""
        while True:
            found = self._find(mark) if mark else -1
            undecided = 0 if self.ended or found >= 0 else _overlap(self.text[self.at :], mark)
            end = found if found >= 0 else len(self.text) - undecided
            if end > self.at:
                self._say(self.text[self.at : end])
            self.at = end
            self.forget()
            if found >= 0 or self.ended:
                return found >= 0
            yield

    def _find(self, mark: str) -> int:
        found = self.text.find(mark, self.at)
        if self._format is not None and self._kind is Content and self._format.at == "line":
            while found >= 0 and (self.text[found - 1] if found else self._last) != "\n":
                found = self.text.find(mark, found + 1)
        return found

    def _thoughts(self, marks: ReasoningFormat) -> Read[None]:
        start = self.at
        yield from self.space()
        if not (yield from self.literal(marks.begin)) and not self._inside:
            self.at = start
            return
        self._boundary(Reasoning)
        self.forget()
        if (yield from self._text_until(marks.end)):
            self.at = len(marks.end)
            self.forget()
            self._boundary(Content)

    def _call_list(self, known: ToolFormat) -> Read[bool]:
        """Read the calls behind one mark. False, and nothing done, when there is none."""
        start = self.at
        some = False
        if ((yield from self.literal(known.begin)) or known.begin_optional) and (
            yield from self._spaced(known.opening)
        ):
            while True:
                yield from self.space()
                if not (yield from self._call(known)):
                    self.at = start
                    return some
                some = True
                self.forget()
                start = self.at
                if not known.separator or not (yield from self._spaced(known.separator)):
                    break
            if (yield from self._spaced(known.closing)):
                yield from self._spaced(known.end)
            yield from self.space()
            self.forget()
        else:
            self.at = start
        return some

    def _spaced(self, mark: str) -> Read[bool]:
        """Read white space and `mark`, or stay and return False."""
        start = self.at
        if not mark:
            return True
        yield from self.space()
        if (yield from self.literal(mark)):
            return True
        self.at = start
        return False

    def _call(self, known: ToolFormat) -> Read[bool]:
        if self._max_calls is not None and self._calls >= self._max_calls:
            return False
        if known.call == "object":
            return (yield from self._object_call(known))
        name = yield from self.run(_NAME, _LONGEST_NAME)
        if name not in self._tools:
            return False
        if known.call == "react":
            if not (yield from self._spaced("Action Input:")):
                return False
            yield from self.space()
            if not (yield from self.more()) or self.text[self.at] != "{":
                return False
            yield from self._arguments(name, known)
            return True
        if not (yield from self.more()) or self.text[self.at] != "(":
            return False
        written = yield from balanced(self)
        arguments = None if written is None else parse_arguments("f" + written)
        if arguments is None:
            return False
        self._whole_call(name, arguments)
        return True

    def _arguments(self, name: str, known: ToolFormat) -> Read[bool]:
        """Give out the object that begins here as it comes; if it turns out to be broken, everything up to the end."""
        self._open = self._start(name)
        whole = yield from json_value(self)
        while not whole:
            found = self.text.find(known.end, self.at) if known.end else -1
            undecided = 0 if self.ended or found >= 0 else _overlap(self.text[self.at :], known.end)
            self.at = found if found >= 0 else len(self.text) - undecided
            self._flush()
            if found >= 0 or self.ended:
                break
            yield
        self._flush()
        self._open = None
        return whole

    def _object_call(self, known: ToolFormat) -> Read[bool]:
        """{"name": ..., "arguments": ...} in any order, other members passed over."""
        name: str | None = None
        waiting: str | None = None  # arguments that came before the name
        done = False
        if not (yield from self.literal("{")):
            return False
        while True:
            yield from self.space()
            key = yield from self._string()
            if key is None or not (yield from self._spaced(":")):
                break
            yield from self.space()
            if key == "name":
                if name is not None:
                    break
                name = yield from self._string()
                if name not in self._tools:
                    break
                if waiting is not None:
                    self._whole_call(name, waiting)
                    done = True
            elif key in _ARGUMENTS:
                if waiting is not None or done or not (yield from self.more()):
                    break
                if name is not None and self.text[self.at] == "{":
                    if not (yield from self._arguments(name, known)):
                        return True
                    done = True
                else:
                    waiting = yield from self._whole_arguments()
                    if waiting is None:
                        break
                    if name is not None:
                        self._whole_call(name, waiting)
                        done = True
            elif not (yield from json_value(self)):
                break
            yield from self.space()
            if (yield from self.literal(",")):
                continue
            if (yield from self.literal("}")):
                if name is not None and not done:
                    self._whole_call(name, waiting or "{}")
                    done = True
                return done
            break
        if done:  # the call is whole; what is odd behind it is content
            self.at = 0
        return done

    def _string(self) -> Read[str | None]:
        start = self.at
        if not (yield from json_string(self)):
            return None
        return json.loads(self.text[start : self.at])

    def _whole_arguments(self) -> Read[str | None]:
        """An object, or a string that holds one, as JSON text."""
        start = self.at
        if not (yield from json_value(self)):
            return None
        written = self.text[start : self.at]
        try:
            value = json.loads(written)
            if isinstance(value, str):
                written, value = value, json.loads(value)
            written.encode()
        except (ValueError, RecursionError):
            return None
        return written if isinstance(value, dict) else None

    def _turns(self, known: ToolFormat) -> Read[None]:
        """ChatGLM3's answer: turns between marks. A turn is a tool's name or nothing, a new line, and its text."""
        while True:
            header = yield from self._header()
            if header in self._tools and (self._max_calls is None or self._calls < self._max_calls):
                yield from self._fenced_call(header, known.begin)
            elif header is not None and not header:
                self._fresh = True
                self.forget()
            if not (yield from self._text_until(known.begin)):
                return
            self.at = len(known.begin)
            self.forget()
            self._boundary(Content)

    def _header(self) -> Read[str | None]:
        """The first line if it is empty or may name a tool, read with its end; else None, and nothing is read."""
        while True:
            line, found, _ = self.text[self.at :].partition("\n")
            head = line.strip(SPACE)
            if not found and head and not any(name.startswith(head) for name in self._tools):
                return None
            if found:
                if head and head not in self._tools:
                    return None
                self.at += len(line) + 1
                return head
            if self.ended:
                return None
            yield

    def _fenced_call(self, name: str, mark: str) -> Read[None]:
        """The rest of the turn as a call; when it is none, nothing of the turn is read."""
        while True:
            found = self.text.find(mark, self.at)
            if found >= 0 or self.ended:
                break
            if len(self.text) > MAX_CHARACTERS:
                break
            yield
        end = found if found >= 0 else len(self.text)
        fenced = _FENCED.fullmatch(self.text, self.at, end)
        arguments = parse_arguments(fenced.group(1)) if fenced and _is_tool_call(fenced.group(1)) else None
        if arguments is None:
            self.at = 0
            return
        self.at = end
        self._whole_call(name, arguments)


def _is_tool_call(code: str) -> bool:
    return re.match(r"\s*tool_call\s*\(", code) is not None


def _overlap(text: str, mark: str) -> int:
    """Length of the longest end of `text` that begins `mark` without being all of it."""
    for size in range(min(len(mark) - 1, len(text)), 0, -1):
        if mark.startswith(text[-size:]):
            return size
    return 0


def marks(formats: Sequence[ToolFormat | ReasoningFormat | None]) -> tuple[str, ...]:
    """The texts that a parser of these formats has to see."""
    return tuple(dict.fromkeys(mark for known in formats if known is not None for mark in known.marks))
