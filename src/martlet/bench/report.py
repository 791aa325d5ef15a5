"""Results as a table for people and as JSON lines for machines."""

from __future__ import annotations

import dataclasses
import json
import re
import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from martlet.bench import machine
from martlet.bench.offline import Result

# (workload, figure, heading, digits, whether more is better)
ROWS = (
    ("start", "start_s", "start, s", 2, False),
    ("W1", "ttft_ms", "W1 time to first token, ms", 1, False),
    ("W1", "decode_tok_s", "W1 decode, tok/s", 1, True),
    ("W2", "prefill_tok_s", "W2 prefill, tok/s", 0, True),
    ("W2", "decode_tok_s", "W2 decode, tok/s", 1, True),
    ("W3", "output_tok_s", "W3 output, tok/s", 1, True),
    ("W4", "seconds", "W4 total, s", 2, False),
    ("W5", "ttft_ms", "W5 time to first token, ms", 1, False),
    ("W5", "itl_ms", "W5 between tokens, ms", 1, False),
    ("W5", "output_tok_s", "W5 output, tok/s", 1, True),
)

PEAK_HEADING = "peak memory, MB"
PATH = re.compile(r"(?<![\w/:.])(?:~|\.{1,2})?/(?:[^\s/'\"=,:;()]+/)*")  # up to the last name; not what follows http:


def without_paths(text: str) -> str:
    """The text with every path cut to its last name, so that results say nothing of the machine they come from."""
    return PATH.sub("", text)


def lines(results: Sequence[Result], machine_facts: dict[str, Any]) -> list[str]:
    """One JSON line a result: medians and every run, the machine, and the command that made them."""
    common = {
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "command": without_paths(shlex.join(["martlet", *sys.argv[1:]])),
        "machine": machine_facts,
    }
    rows = [{**dataclasses.asdict(r), "figures": r.figures, **common} for r in results]
    for row in rows:
        row["error"] = row["error"] and without_paths(row["error"])
        row["engine"] = row["engine"] if "://" in row["engine"] else without_paths(row["engine"])
    return [json.dumps(row) for row in rows]


def write(results: Sequence[Result], path: Path) -> None:
    """Append the lines of `results` to a file."""
    with path.open("a", encoding="utf-8") as file:
        file.writelines(line + "\n" for line in lines(results, machine.describe()))


def table(results: Sequence[Result]):
    """A rich table: a column an engine, a row a figure, each with its ratio to the first engine.

    Above 1 the engine is better than the first, whichever way the figure counts.
    """
    from rich.table import Table

    engines = list(dict.fromkeys(r.engine for r in results))
    by_key = {(r.engine, r.workload): r for r in results}
    out = Table("", *engines, box=None, pad_edge=False)
    for workload, key, heading, digits, more in ROWS:
        values = [by_key[e, workload].figures.get(key) if (e, workload) in by_key else None for e in engines]
        if any(v is not None for v in values):
            out.add_row(heading, *(_cell(v, values[0] if i else None, digits, more) for i, v in enumerate(values)))
    for workload in dict.fromkeys(r.workload for r in results):
        peaks = [by_key[e, workload].peak_mb if (e, workload) in by_key else None for e in engines]
        if any(peaks):
            heading = f"{workload} {PEAK_HEADING}"
            out.add_row(heading, *(_cell(v or None, peaks[0] if i else None, 0, False) for i, v in enumerate(peaks)))
    sizes = [next(r.installed_mb for r in results if r.engine == e) or None for e in engines]
    if any(sizes):
        out.add_row("installed, MB", *(_cell(v, sizes[0] if i else None, 0, False) for i, v in enumerate(sizes)))
    return out


def _cell(value: float | None, first: float | None, digits: int, more: bool) -> str:
    if value is None:
        return "-"
    text = f"{value:,.{digits}f}"
    if not first or not value:
        return text
    return f"{text}  ({value / first if more else first / value:.2f}x)"
