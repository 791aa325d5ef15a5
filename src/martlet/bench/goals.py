"""What the CPU engine must reach, as data, and the table that says whether it does."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from martlet.bench.engines import OURS
from martlet.bench.offline import first_line
from martlet.bench.precision import bits
from martlet.bench.timeline import medians
from martlet.errors import UsageError

Row = dict[str, Any]
BUSY = 1.25  # a slowdown above which a speed says nothing
SIZES = ("installed_mb", "peak_mb")  # what a busy machine does not change


@dataclass(frozen=True, slots=True)
class Goal:
    """A figure of a workload against peers. key: of figures, or a field of the row. wide: number of bits of our weights
    and, where `alike`, of theirs (None: the first of ours that was measured). against: peer ('' is the best of all) and
    the wanted ratio ours / theirs, or for '=' a wanted value. more: whether more is better."""

    workload: str
    key: str
    title: str
    wide: int | None
    against: tuple[tuple[str, float], ...]
    more: bool = True
    alike: bool = False
    digits: int = 0


GOALS = (
    Goal("W1", "decode_tok_s", "W1 decode, tok/s, 4-bit", 4, (("llama.cpp", 1.7),), alike=True, digits=1),
    Goal(
        "W1",
        "decode_tok_s",
        "W1 decode, tok/s, 8-bit",
        8,
        (("llama.cpp", 1.5), ("openvino", 2.4)),
        alike=True,
        digits=1,
    ),
    Goal(
        "W1", "decode_tok_s", "W1 decode, tok/s, 16-bit", 16, (("llama.cpp", 0.95), ("vllm", 2.5)), alike=True, digits=1
    ),
    Goal("W2", "prefill_tok_s", "W2 prefill, tok/s, 8-bit", 8, (("", 1.6),)),
    Goal("W3", "output_tok_s", "W3 output, tok/s, 8-bit", 8, (("", 2.0),)),
    Goal("W4", "seconds", "W4 total, s", 8, (("", 0.5),), more=False, digits=2),
    Goal("W5", "output_tok_s", "W5 output, tok/s", 8, (("", 2.5),)),
    Goal("W5", "ttft_ms", "W5 time to first token, ms", 8, (("", 0.7),), more=False),
    Goal(
        "start",
        "start_s",
        "start to first token, s",
        None,
        (("llama.cpp", 0.6), ("openvino", 0.6)),
        more=False,
        digits=2,
    ),
    Goal("", "installed_mb", "installed size, MB", None, (("=", 250.0),), more=False),
    Goal("W3", "peak_mb", "W3 peak memory, MB", 8, (("openvino", 1.0),), more=False),
)


def last_session(path: Path) -> list[Row]:
    """The lines that the last `martlet bench cpu` appended to a file. Raises UsageError when there are none."""
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    if not rows:
        raise UsageError(f"{path.name} holds no results", param="results")
    return [row for row in rows if row["time"] == rows[-1]["time"]]


def markdown(rows: Sequence[Row]) -> str:
    """The goals beside what was measured, all figures of all engines, and what they were measured on."""
    parts = [_head(rows), "## Goals", _goals(rows), "## Figures", _figures(rows), "## Engines", _engines(rows)]
    return "\n\n".join(parts) + "\n"


def value(row: Row, key: str) -> float | None:
    """A figure's median, or a field that is one number; None where it was not measured."""
    found = row[key] if key in row else medians(row["runs"]).get(key) if row["runs"] else None
    return found or None


def _head(rows: Sequence[Row]) -> str:
    machine = rows[0]["machine"]
    worst = max(slowdown(row) for row in rows)
    lines = [
        "# CPU benchmark",
        f"{rows[0]['time']}, {machine['cpu']}, {machine['cores']} cores ({', '.join(machine['features'])}), "
        f"{machine['memory']['total'] / 2**30:.0f} GiB, {machine['system']}, Martlet {machine['commit'] or ''}.",
        f"Medians of up to {max((len(r['runs']) for r in rows), default=0)} runs, all engines in one run of\n\n"
        f"    {rows[0]['command']}",
    ]
    lines.append(
        f"Around the measurements, a fixed piece of work on all cores took up to {worst:.2f} times as long as on a "
        f"quiet machine; from {BUSY} on, speeds say nothing."
    )
    return "\n\n".join(lines)


def _goals(rows: Sequence[Row]) -> str:
    lines = ["| figure | Martlet | against | ratio | wanted | reached |", "|---|---|---|---|---|---|"]
    for goal in GOALS:
        ours = _pick(rows, goal, lambda row: row["kind"] == "native", first=True)
        for peer, wanted in goal.against:
            sign = "at least" if goal.more else "at most"
            if peer == "=":
                cells = (
                    _said(ours, goal),
                    "-",
                    "-",
                    f"{sign} {wanted:g}",
                    _verdict(ours and value(ours, goal.key), wanted, goal),
                )
            else:
                theirs = _pick(rows, goal, partial(_is_peer, peer, goal))
                ratio = value(ours, goal.key) / value(theirs, goal.key) if ours and theirs else None
                said = f"{ratio:.2f}" if ratio else "-"
                who = _said(theirs, goal) if theirs else f"{peer or 'any peer'}: not measured"
                cells = (
                    _said(ours, goal),
                    who,
                    said,
                    f"{sign} {wanted:g}x",
                    _verdict(ratio, wanted, goal, ours, theirs),
                )
            lines.append(f"| {' | '.join((goal.title, *cells))} |")
    return "\n".join(lines)


def _pick(rows: Sequence[Row], goal: Goal, suits: Callable[[Row], bool], first: bool = False) -> Row | None:
    """Of the rows that suit and have the figure: ours of the goal's width, or the best."""
    found = [
        r for r in rows if (not goal.workload or r["workload"] == goal.workload) and suits(r) and value(r, goal.key)
    ]
    if first and goal.wide is not None:
        found = [row for row in found if bits(row["weights"]) == goal.wide]
    if not found or (first and goal.wide is None):
        return found[0] if found else None
    return (max if goal.more else min)(found, key=lambda row: value(row, goal.key))


def _is_peer(peer: str, goal: Goal, row: Row) -> bool:
    wide = not goal.alike or bits(row["weights"]) == goal.wide
    return row["kind"] not in OURS and peer in ("", row["kind"]) and wide


def _said(row: Row | None, goal: Goal) -> str:
    return f"{value(row, goal.key):,.{goal.digits}f} ({row['engine']})" if row else "not measured"


def _verdict(ratio: float | None, wanted: float, goal: Goal, *rows: Row | None) -> str:
    """No verdict on speeds from a busy machine: peers that spin between threads lose far more there than others."""
    if not ratio:
        return "-"
    if goal.key not in SIZES and any(slowdown(row) > BUSY for row in rows if row):
        return "unknown: the machine was busy"
    return "yes" if (ratio >= wanted if goal.more else ratio <= wanted) else "no"


def slowdown(row: Row) -> float:
    """By what else ran, around a measurement; 1 is a quiet machine."""
    return max(row["noise"].get("before", 1.0), row["noise"].get("after", 1.0))


def _figures(rows: Sequence[Row]) -> str:
    from martlet.bench.report import PEAK_HEADING, ROWS

    engines = list(dict.fromkeys(row["engine"] for row in rows))
    by_key = {(row["engine"], row["workload"]): row for row in rows}
    lines = [f"| | {' | '.join(engines)} |", "|---|" + "---|" * len(engines)]
    shown = list(dict.fromkeys(row["workload"] for row in rows))
    wanted = [*ROWS, *((name, "peak_mb", f"{name} {PEAK_HEADING}", 0, False) for name in shown)]
    for workload, key, heading, digits, _ in wanted:
        cells = []
        for engine in engines:
            row = by_key.get((engine, workload))
            number = value(row, key) if row else None
            cells.append(f"{number:,.{digits}f}" if number else "failed" if row and row["error"] else "-")
        if set(cells) != {"-"}:
            lines.append(f"| {heading} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _engines(rows: Sequence[Row]) -> str:
    lines = ["| engine | version | model | weights | installed, MB | notes |", "|---|---|---|---|---|---|"]
    for name in dict.fromkeys(row["engine"] for row in rows):
        those = [row for row in rows if row["engine"] == name]
        about: dict[str, str] = {}
        for row in those:
            about |= row["about"]
        said = [
            (row["workload"], f"failed: {first_line(row['error'])}" if row["error"] else row["note"]) for row in those
        ]
        notes = "; ".join(f"{workload}: {note}" for workload, note in said if note)
        size = f"{those[0]['installed_mb']:,.0f}" if those[0]["installed_mb"] else "-"
        cells = (name, about.get("version", "-"), those[0]["model"], those[0]["weights"], size, notes)
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)
