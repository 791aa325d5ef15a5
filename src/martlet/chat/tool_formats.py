"""How models write tool calls, as data.

A format says where calls stand in an answer and what they look like. `parser` reads answers by it, `tool_grammar`
makes a grammar of it for constrained decoding, and `tool_prompt` writes tools, past calls and results by it for
templates that know no tools themselves.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from martlet.errors import UsageError, did_you_mean


@dataclass(frozen=True, slots=True)
class ToolFormat:
    """begin, end: marks around a call, or around a list of calls. at: where `begin` may stand: anywhere, only at the
    start of a line, or only at the start of the answer (where it may also be left out if `begin_optional`).
    opening, separator, closing: what stands around and between the calls after one `begin`; without a separator every
    call has its own `begin`. pad: what is written between the marks and a call.
    call: what a call is:
      object   {"name": "f", "arguments": {"a": 1}}, where `arguments` is the key to write (both names are read)
      python   f(a=1)
      react    f, a new line, Action Input: and the arguments as an object
      chatglm3 f, a new line and a fenced tool_call(a=1); the format of ChatGLM3's turns, see `parser`
    stop: strings that end the model's turn when tools are in play. result: around a tool's answer in the prompt.
    hint: more that the model is told, where its template has nothing to say about tools. id_length: of the ids that
    templates of this format accept, 0 for any.
    """

    name: str
    call: Literal["object", "python", "react", "chatglm3"]
    begin: str = ""
    end: str = ""
    at: Literal["anywhere", "line", "start"] = "anywhere"
    begin_optional: bool = False
    pad: str = ""
    opening: str = ""
    separator: str = ""
    closing: str = ""
    arguments: str = "arguments"
    stop: tuple[str, ...] = ()
    result: tuple[str, str] = ("<tool_response>\n", "\n</tool_response>")
    hint: str = ""
    id_length: int = 0

    @property
    def marks(self) -> tuple[str, ...]:
        """Texts that some tokenizers have as control tokens, and that the parser has to see nonetheless."""
        return tuple(mark for mark in (self.begin, self.end) if mark)


_FORMATS = (
    ToolFormat("hermes", "object", begin="<tool_call>", end="</tool_call>", pad="\n"),
    ToolFormat(
        "llama3",
        "object",
        begin="<|python_tag|>",
        at="start",
        begin_optional=True,
        separator=";",
        arguments="parameters",
    ),
    ToolFormat(
        "mistral", "object", begin="[TOOL_CALLS]", opening="[", separator=",", closing="]", pad=" ", id_length=9
    ),
    ToolFormat("pythonic", "python", at="start", opening="[", separator=",", closing="]"),
    ToolFormat(
        "react",
        "react",
        begin="Action:",
        at="line",
        pad=" ",
        stop=("Observation:",),
        result=("Observation: ", ""),
        hint="Begin with a line of the form\nThought: what to do next\nAfter a call, wait: the next message brings "
        "its result as an Observation. Once you know enough, answer with\nFinal Answer: the answer",
    ),
    ToolFormat("chatglm3", "chatglm3", begin="<|assistant|>"),
)
FORMATS: dict[str, ToolFormat] = {tool_format.name: tool_format for tool_format in _FORMATS}
_ALIASES = {"qwen": "hermes", "qwen2": "hermes", "qwen3": "hermes", "llama3_json": "llama3", "react_en": "react"}


def tool_format(name: str) -> ToolFormat:
    """The format called `name`. Raises UsageError for an unknown one."""
    known = FORMATS.get(_ALIASES.get(name, name))
    if known is None:
        names = ", ".join(FORMATS)
        raise UsageError(
            f"unknown tool format {name!r}; there are {names}.{did_you_mean(name, FORMATS)}", param="tool_format"
        )
    return known


def detect(template: str) -> ToolFormat | None:
    """The format that a Jinja template asks a model for, None when it has no tools or an unknown form of calls."""
    if "tools" not in template:
        return None
    for mark, name in (
        ("<tool_call>", "hermes"),
        ("[TOOL_CALLS]", "mistral"),
        ("<|python_tag|>", "llama3"),
        ("Action Input", "react"),
        ("[func_name1(", "pythonic"),
        ('"parameters"', "llama3"),
    ):
        if mark in template:
            return FORMATS[name]
    return None
