"""Rendering a checkpoint's Jinja template, which is somebody else's program: sandboxed, and bounded in time and memory.

Templates see plain data and immutable containers. What they may cost is metered at the places where a template can
make work: loop rounds, calls, filters, operators and output. Each single operation takes and gives at most MAX_SIZE
characters and items, so checking the clock between operations is enough.
"""

from __future__ import annotations

import contextlib
import functools
import json
import re
import threading
import time
from collections.abc import Iterator, Mapping
from datetime import datetime
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.compiler import CodeGenerator
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

MAX_SOURCE = 256 * 1024  # characters of a template
MAX_SIZE = 16 * 1024 * 1024  # characters and items an operation may take or give, and of the whole output
MAX_ARGUMENT = 100_000  # a number that a template hands to a function: widths, counts
MAX_INT_BITS = 4096
MAX_SECONDS = 5.0  # processor time of one rendering


class LimitExceeded(jinja2.TemplateRuntimeError):
    """A template asked for more time or memory than a prompt can need."""


class _Meter(threading.local):
    """The processor time at which this thread's rendering ends."""

    deadline = float("inf")

    def tick(self) -> None:
        if time.thread_time() > self.deadline:
            raise LimitExceeded(f"the template ran longer than {MAX_SECONDS:g} s")


_meter = _Meter()


def _weigh(value: Any) -> int:
    """Characters and items in `value`, nested ones counted as often as they appear; LimitExceeded above MAX_SIZE.

    Counting stops at the limit, so a list that holds itself many times over costs no more than the limit.
    """
    weight, todo = 0, [value]
    while todo:
        item = todo.pop()
        weight += len(item) if isinstance(item, (str, list, tuple, dict)) else 1
        if weight > MAX_SIZE:
            raise LimitExceeded(f"the template built a value of more than {MAX_SIZE} characters and items")
        if isinstance(item, (list, tuple)):
            _meter.tick()
            todo += item
        elif isinstance(item, dict):
            _meter.tick()
            todo += (*item.keys(), *item.values())
    return weight


def _admit(function: Any, subject: Any, args: tuple, kwargs: Mapping[str, Any]) -> None:
    """Check a call before it is made: the size of what goes in, numbers, and what replace, join and the like give."""
    _meter.tick()
    values = (*args, *kwargs.values())
    weight = _weigh((subject, *values))
    name = getattr(function, "__name__", "").removeprefix("do_")
    numbers = [abs(v) for v in values if isinstance(v, int)]
    if max(numbers, default=0) > MAX_ARGUMENT:
        raise LimitExceeded(f"the template calls {name} with {max(numbers)}; at most {MAX_ARGUMENT} is allowed")
    pieces = len(subject) if isinstance(subject, (str, list, tuple)) else weight
    growth = max((len(v) for v in values if isinstance(v, str)), default=0)
    if name == "join" and isinstance(subject, str) and args and isinstance(args[0], (list, tuple)):
        pieces, growth = len(args[0]), len(subject)  # "separator".join(items)
    elif name in ("indent", "expandtabs", "_tojson"):
        growth = max([growth, *numbers])
    elif name in ("format", "format_map"):
        _check_format(subject)
    elif name not in ("replace", "join", "translate"):
        return
    if weight + (pieces + 1) * growth > MAX_SIZE:
        raise LimitExceeded(f"the template's {name} could give more than {MAX_SIZE} characters")


def _check_format(text: Any) -> None:
    if isinstance(text, str) and re.search(r"\d{5}|\*", text):
        raise LimitExceeded("the template formats text to a width that no prompt needs")


def _binop(operator_name: str, left: Any, right: Any) -> None:
    """Check an operator that can make much of little."""
    _meter.tick()
    if isinstance(left, int) and isinstance(right, int):
        bits = left.bit_length() * max(right, 1) if operator_name == "**" else left.bit_length() + right.bit_length()
        if bits > MAX_INT_BITS:
            raise LimitExceeded("the template computes a number too large for a prompt")
    elif operator_name == "*":
        count, items = (left, right) if isinstance(left, int) else (right, left)
        if isinstance(count, int) and count > 0 and _weigh(items) * count > MAX_SIZE:
            raise LimitExceeded(f"the template repeats a value to more than {MAX_SIZE} characters or items")
    elif operator_name == "+":
        _weigh((left, right))
    elif operator_name == "%" and isinstance(left, str):
        _check_format(left)
        _weigh((left, right))


def _metered(items: Any) -> Iterator[Any]:
    """What every `for` of a template runs over."""
    for item in items:
        _meter.tick()
        yield item


def _concat(items: list[Any]) -> str:
    """The `~` operator."""
    _meter.tick()
    _weigh(items)
    return "".join(map(str, items))


class _Compiler(CodeGenerator):
    """Puts the meter into loops and concatenations, which the sandbox has no hook for."""

    def visit_Template(self, node: nodes.Template, frame: Any = None) -> None:
        for loop in list(node.find_all(nodes.For)):
            loop.iter = nodes.Filter(loop.iter, "_metered", [], [], None, None, lineno=loop.lineno)
        for parent in [node, *node.find_all(nodes.Node)]:
            for field, value in list(parent.iter_fields()):
                if isinstance(value, nodes.Concat):
                    setattr(parent, field, _concat_node(value))
                elif isinstance(value, list):
                    value[:] = [_concat_node(v) if isinstance(v, nodes.Concat) else v for v in value]
        node.set_environment(self.environment)
        super().visit_Template(node, frame)


def _concat_node(node: nodes.Concat) -> nodes.Filter:
    return nodes.Filter(nodes.List(node.nodes, lineno=node.lineno), "_concat", [], [], None, None, lineno=node.lineno)


class _Generation(Extension):
    """`{% generation %}` marks what an assistant said, for training; when prompting, its body is plain output."""

    tags = {"generation"}

    def parse(self, parser: Any) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _Environment(ImmutableSandboxedEnvironment):
    code_generator_class = _Compiler
    intercepted_binops = frozenset({"*", "**", "+", "%"})

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        _binop(operator, left, right)
        return super().call_binop(context, operator, left, right)

    def call(__self, __context: Any, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        bound = getattr(__obj, "__wrapped__", __obj)  # the sandbox wraps str.format
        _admit(__obj, getattr(bound, "__self__", None), args, kwargs)
        return super().call(__context, __obj, *args, **kwargs)


def _bounded(function: Any) -> Any:
    """A filter that checks what it is given. jinja2 marks filters that want its context with an attribute: kept."""
    skip = 1 if hasattr(function, "jinja_pass_arg") else 0

    @functools.wraps(function)
    def bounded(*args: Any, **kwargs: Any) -> Any:
        _admit(function, args[skip], args[skip + 1 :], kwargs)
        return function(*args, **kwargs)

    return bounded


def _tojson(value: Any, ensure_ascii=False, indent=None, separators=None, sort_keys=False) -> str:
    """As templates expect it: no HTML escapes, which jinja2's own filter would put in."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _strftime_now(form: str) -> str:
    return datetime.now().strftime(form)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


@jinja2.pass_context
def _finalize(_context: Any, value: Any) -> Any:
    """Every value on its way out. It asks for the context so that nothing is written out while compiling."""
    _weigh(value)
    return value


# Of no use in a prompt, and hard to bound.
_DROPPED_FILTERS = ("center", "pprint", "sum", "urlize", "wordwrap", "xmlattr")


@functools.cache
def _environment() -> _Environment:
    """The one environment; it holds no state of a rendering."""
    # optimized=False: constant expressions must not be computed while compiling, where nothing is metered.
    made = _Environment(
        trim_blocks=True,
        lstrip_blocks=True,
        optimized=False,
        finalize=_finalize,
        extensions=[_Generation, loopcontrols],
        cache_size=0,
    )
    made.filters["tojson"] = _tojson
    made.filters = {name: _bounded(f) for name, f in made.filters.items() if name not in _DROPPED_FILTERS}
    made.filters |= {"_metered": _metered, "_concat": _concat}
    made.globals.pop("lipsum")
    made.globals |= {"raise_exception": _raise_exception, "strftime_now": _strftime_now}
    return made


def compile_template(source: str) -> jinja2.Template:
    """Compile Jinja source. Raises jinja2.TemplateError when it is not a template, or longer than MAX_SOURCE."""
    if len(source) > MAX_SOURCE:
        raise LimitExceeded(f"the template has {len(source)} characters; at most {MAX_SOURCE} are read")
    try:
        with _deadline():
            return _environment().from_string(source)
    except (RecursionError, MemoryError, SyntaxError, ValueError) as error:
        raise jinja2.TemplateError(f"the template cannot be compiled: {error or type(error).__name__}") from error


def render(template: jinja2.Template, variables: Mapping[str, Any]) -> str:
    """Render under the limits. Raises jinja2.TemplateError, also for a limit, and TypeError or the like for a template
    that treats a value as what it is not."""
    with _deadline():
        pieces, size = [], 0
        try:
            for piece in template.generate(**variables):
                _meter.tick()
                size += len(piece)
                if size > MAX_SIZE:
                    raise LimitExceeded(f"the template wrote more than {MAX_SIZE} characters")
                pieces.append(piece)
        except RecursionError as error:
            raise LimitExceeded("the template calls itself without end") from error
        return "".join(pieces)


@contextlib.contextmanager
def _deadline() -> Iterator[None]:
    _meter.deadline = time.thread_time() + MAX_SECONDS
    try:
        yield
    finally:
        _meter.deadline = float("inf")
