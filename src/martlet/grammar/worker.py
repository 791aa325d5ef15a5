"""The process that compiles grammars and computes masks: `python -m martlet.grammar.worker FD WORDS MEMORY`.

Grammars come from strangers, and there are small ones that keep a compiler or a parser busy for minutes; this process
can be killed for it. It reads one JSON message a line and answers each with one line, in order:

    {"tokens": [latin-1 text ...], "special": [id ...], "eos": [id ...]}      first, once; no answer
    [number, "check", [kind, text, trigger]]                                  -> [number, error or null]
    [number, "step", opens, closes, fills]                                    -> [number, {key: error}]

opens: [key, [kind, text, trigger]] starts a matcher. fills: [key, tokens, slot] feeds tokens to a matcher and writes
the mask of what may follow to slot `slot` of the shared memory FD (none if it is -1), WORDS uint32 a slot, bit t % 32
of word t // 32 for token t. closes: keys to forget. Ends when its input does.
"""

from __future__ import annotations

import ctypes
import json
import mmap
import os
import queue
import re
import signal
import sys
import threading
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from typing import Any

import llguidance
import orjson
from llguidance import LLExecutor, LLMatcher, LLParserLimits, LLTokenizer
from llguidance.gbnf_to_lark import gbnf_to_lark

# Between tokens of JSON: nothing, a space, or a new line and its indent. A model cannot fill an answer with blanks.
WHITESPACE = r" |\n {0,32}"
# Where one text only can follow, llguidance would allow the first of its usual tokens alone; any spelling is right.
FREE = '%llguidance {"no_forcing": true}\n'
KEPT = 64  # compiled grammars
_PLACE = re.compile(r"(?:at )?(\d+)\(\d+\): ")
_QUOTED = re.compile(r"\s*(\d+ \| |\^+\s*$)")  # the text again, and marks below it
PROBES = 8  # masks that a check computes along one path
LIMITS = LLParserLimits(max_lexer_states=50_000, step_max_items=30_000, verbose_errors=False)


class Vocabulary:
    """What llguidance asks of a tokenizer. It tokenizes greedily; FREE keeps masks from depending on that."""

    is_tokenizer_wrapper = True

    def __init__(self, tokens: list[bytes], special: Sequence[int], eos: Sequence[int]):
        self.tokens, self.special_token_ids = tokens, list(special)
        self.eos_token_id, self.bos_token_id = eos[0], None
        self._ids = {text: token for token, text in enumerate(tokens) if text}
        self._longest = max(map(len, self._ids), default=1)

    def __call__(self, text: str | bytes) -> list[int]:
        data, at, ids = text.encode() if isinstance(text, str) else text, 0, []
        while at < len(data):
            for end in range(min(len(data), at + self._longest), at, -1):
                if (token := self._ids.get(data[at:end])) is not None:
                    ids.append(token)
                    break
            else:
                end = at + 1
            at = end
        return ids


class Compiler:
    """Grammars to matchers. The last few are kept and copied."""

    def __init__(self, tokens: list[bytes], special: Sequence[int], eos: Sequence[int]):
        self.special = {tokens[token].decode("utf-8", "replace"): token for token in special}
        self.tokenizer = LLTokenizer(Vocabulary(tokens, special, eos), eos_token=list(eos))
        self._kept: OrderedDict[tuple[str, str, str | None], LLMatcher] = OrderedDict()

    def matcher(self, kind: str, text: str, trigger: str | None) -> LLMatcher:
        """A fresh matcher. Raises ValueError with what is wrong with the grammar."""
        key = (kind, text, trigger)
        found = self._kept.get(key)
        if found is None:
            found = LLMatcher(self.tokenizer, self.source(kind, text, trigger), log_level=0, limits=LIMITS)
            if found.is_error():
                raise ValueError(explained(found.get_error(), kind))
            self._kept[key] = found
            if len(self._kept) > KEPT:
                self._kept.popitem(last=False)
        self._kept.move_to_end(key)
        return found.deep_copy()

    def source(self, kind: str, text: str, trigger: str | None) -> str:
        """The grammar as llguidance takes it. Raises ValueError."""
        if kind == "lark":
            return LLMatcher.grammar_from_lark(FREE + (gbnf_to_lark(text) if "::=" in text else text))
        if kind == "choice":
            rule = " | ".join(json.dumps(option, ensure_ascii=False) for option in json.loads(text))
        elif kind == "regex":
            rule = f"/{llguidance.regex_to_lark(text, use_ascii='')}/"
        else:
            rule = f"%json {json.dumps(schema(text))}"
        if trigger is None:
            return LLMatcher.grammar_from_lark(f"{FREE}start: {rule}")
        if trigger in self.special:
            before = rf"before: /(.|\n)*/ <[{self.special[trigger]}]>"
        else:
            before = r"before[lazy]: /(.|\n)*" + "".join(f"\\x{{{ord(c):x}}}" for c in trigger) + "/"
        return LLMatcher.grammar_from_lark(f"{FREE}start: /(.|\\n)*/ | before body\n{before}\nbody: {rule}")

    def check(self, grammar: Sequence[Any]) -> str | None:
        """Compile and take a few steps along one path; what went wrong, if anything."""
        try:
            matcher = self.matcher(*grammar)
        except ValueError as error:
            return str(error)
        for probe in range(PROBES):
            bits = int.from_bytes(matcher.compute_bitmask(), "little")
            if matcher.is_error():
                return explained(matcher.get_error())
            if matcher.is_stopped():
                return None if matcher.is_accepting() else "the grammar allows no answer at all"
            allowed = [token for token, bit in enumerate(reversed(bin(bits)[2:])) if bit == "1"]
            if not allowed:
                return "the grammar allows no answer at all"
            if not matcher.consume_token(allowed[len(allowed) * (2 * probe + 1) // (2 * PROBES)]):
                return explained(matcher.get_error())
        return None


def schema(text: str) -> dict[str, Any]:
    """A JSON Schema with our settings, which it may not change. Raises ValueError."""
    try:
        found = json.loads(text) if text else {"type": "object"}
    except RecursionError as error:
        raise ValueError("the schema is nested too deeply") from error
    if isinstance(found, bool):
        found = {} if found else {"enum": []}
    if not isinstance(found, dict):
        raise ValueError("a JSON Schema is an object")
    settings = {"whitespace_flexible": True, "whitespace_pattern": WHITESPACE, "lenient": False}
    return found | {"x-guidance": settings}


def explained(error: str, kind: str = "") -> str:
    """llguidance's error in a line; of keywords it does not know, their names.

    It speaks of the text it was given: FREE comes first, and only a Lark grammar's lines are the client's own.
    """
    lines = error.split("<non-verbose/>")[0].splitlines()
    line = " ".join(" ".join(line for line in lines if not _QUOTED.match(line)).split())
    if place := _PLACE.match(line):
        line = (f"line {int(place[1]) - 1}: " if kind == "lark" else "") + line[place.end() :]
    unknown = "Unimplemented keys: "
    if unknown in line:
        names = line.split(unknown, 1)[1].strip("[] ").replace('"', "")
        return f"the schema uses {names}, which cannot be enforced"
    if line.startswith("NoExtension"):
        return "the grammar allows no answer with this model's tokens"
    return line[:500] or "the grammar cannot be followed"


class Matchers:
    """The matchers of the sequences that run, and the shared memory their masks go to."""

    def __init__(self, compiler: Compiler, memory: mmap.mmap, words: int):
        self.compiler, self.words = compiler, words
        self._first = ctypes.c_char.from_buffer(memory)  # keeps the memory mapped
        self.address = ctypes.addressof(self._first)
        self.slots = len(memory) // (4 * words)
        self.live: dict[int, LLMatcher] = {}
        self.executor = LLExecutor()

    def step(
        self, opens: Iterable[Sequence[Any]], closes: Iterable[int], fills: Iterable[Sequence[Any]]
    ) -> dict[int, str]:
        errors = {}
        for key, grammar in opens:
            try:
                self.live[key] = self.compiler.matcher(*grammar)
            except ValueError as error:
                errors[key] = str(error)
        wanted = []
        for key, tokens, slot in fills:
            matcher = self.live.get(key)
            if matcher is not None:
                if tokens:
                    matcher.consume_tokens(tokens)
                wanted.append((key, matcher, slot))
        work = [(matcher, slot) for _, matcher, slot in wanted if slot >= 0 and not matcher.is_error()]
        if len(work) == 1:
            matcher, slot = work[0]
            matcher.unsafe_compute_mask_ptr(self.address + 4 * self.words * slot, 4 * self.words)
        elif work:
            self.executor.unsafe_compute_mask_ptr(work, self.address, 4 * self.words, self.slots)
        errors |= {key: explained(matcher.get_error()) for key, matcher, _ in wanted if matcher.is_error()}
        for key in closes:
            self.live.pop(key, None)
        return errors


def main() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which closes our input
    fd, words, memory_cap = map(int, sys.argv[1:4])
    cap_memory(memory_cap)
    inbox: queue.SimpleQueue[bytes] = queue.SimpleQueue()

    def read() -> None:
        for line in sys.stdin.buffer:
            inbox.put(line)
        os._exit(0)  # the parent is gone, whatever is being computed

    threading.Thread(target=read, daemon=True).start()
    first = orjson.loads(inbox.get())
    tokens = [text.encode("latin-1") for text in first["tokens"]]
    compiler = Compiler(tokens, first["special"], first["eos"])
    matchers = Matchers(compiler, mmap.mmap(fd, 0), words)
    while True:
        number, what, *rest = orjson.loads(inbox.get())
        answer = compiler.check(rest[0]) if what == "check" else matchers.step(*rest)
        os.write(1, orjson.dumps([number, answer], option=orjson.OPT_NON_STR_KEYS) + b"\n")


def cap_memory(size: int) -> None:
    """Bytes of address space; beyond them an allocation fails, which ends the process."""
    try:
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (size, size))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    except (ImportError, ValueError, OSError):  # a system without it
        return


if __name__ == "__main__":
    main()
