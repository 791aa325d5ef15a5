"""Answers as the parser gives them, in pieces, for tests of how endpoints frame them."""

from __future__ import annotations

import json
from dataclasses import dataclass, field

from hypothesis import strategies as st

from martlet.chat import CallArguments, CallStart, Content, Reasoning
from martlet.engine.request import Output, Request
from martlet.server.generation import Choice, Job, Usage

_TEXT = st.text(min_size=1, max_size=5)
_PIECE = st.one_of(_TEXT.map(Content), _TEXT.map(Reasoning), st.just("call"), st.just("arguments"))


def _numbered(pieces):
    deltas, calls = [], 0
    for piece in pieces:
        if piece == "call":
            deltas += [CallStart(calls, f"call_{calls}", "f"), CallArguments(calls, '{"a": ')]
            calls += 1
        elif piece == "arguments":  # of the call that is open
            if deltas and isinstance(deltas[-1], CallArguments):
                deltas.append(CallArguments(calls - 1, "1 "))
        else:
            deltas.append(piece)
    return deltas


@st.composite
def _cut(draw):
    deltas = _numbered(draw(st.lists(_PIECE, max_size=10)))
    cuts = sorted(draw(st.lists(st.integers(0, len(deltas)), max_size=4)))
    return [deltas[a:b] for a, b in zip([0, *cuts], [*cuts, len(deltas)], strict=True)]


CHUNKS = _cut()  # lists of deltas, one an output


@dataclass
class Said:
    content: str = ""
    reasoning: str = ""
    calls: list[tuple[str, str, str]] = field(default_factory=list)

    @classmethod
    def of(cls, chunks):
        said = cls()
        for delta in (delta for chunk in chunks for delta in chunk):
            if isinstance(delta, Content):
                said.content += delta.text
            elif isinstance(delta, Reasoning):
                said.reasoning += delta.text
            elif isinstance(delta, CallStart):
                said.calls.append((delta.id, delta.name, ""))
            else:
                id, name, arguments = said.calls[-1]
                said.calls[-1] = (id, name, arguments + delta.text)
        return said


def whole_and_streamed(make_shape, id, chunks):
    """(body, events as objects) of an answer that comes at once and in `chunks`."""
    request = Request("r", [1])
    finish = "tool_calls" if Said.of(chunks).calls else "stop"
    usage = Usage(1, 2, 0)
    shape = make_shape()
    whole = Choice(0, request, deltas=[delta for chunk in chunks for delta in chunk], finish_reason=finish)
    body = shape.body(Job(id, "m", [request], 1, shape), [whole], usage)
    shape = make_shape()
    job = Job(id, "m", [request], 1, shape, stream=True)
    choice = Choice(0, request)
    stream = shape.begin(job)
    for chunk in chunks:
        choice.deltas = chunk
        stream += shape.news(job, choice, Output("r"))
    choice.finish_reason = finish
    stream += shape.end(job, [choice], usage)
    return body, [json.loads(event.split("\ndata: ")[1]) for event in stream.decode().strip().split("\n\n")]
