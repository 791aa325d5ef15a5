"""Results of `martlet bench gpu` as Markdown: each goal beside what was measured, then all figures."""

from __future__ import annotations

from collections.abc import Sequence

from martlet.bench.goals import Row, value
from martlet.bench.gpu.shapes import GOALS, VLLM, WORKLOADS, Goal

# (workload, figure, heading, digits, whether more is better)
ROWS = (
    ("start", "start_s", "start to first token, s", 1, False),
    ("G1", "output_tok_s", "G1 output, tok/s", 0, True),
    ("G2", "ttft_ms", "G2 time to first token, ms", 2, False),
    ("G2", "token_ms", "G2 between tokens, ms", 3, False),
    ("G3", "prefill_tok_s", "G3 prefill, tok/s", 0, True),
    ("G4", "decode_tok_s", "G4 decode, tok/s", 0, True),
    *(
        (f"G5 x{clients}", key, f"G5, {clients} clients: {said}", digits, more)
        for clients in (1, 64, 256)
        for key, said, digits, more in (
            ("output_tok_s", "output, tok/s", 0, True),
            ("ttft_ms", "time to first token, ms", 1, False),
            ("itl_ms", "between tokens, ms", 2, False),
        )
    ),
    *(("G6", f"x{count}", f"G6 decode with {count} adapters, tok/s", 0, True) for count in (0, 1, 4, 16)),
    ("G6", "kept", "G6 kept with 16 adapters", 3, True),
)


def markdown(rows: Sequence[Row]) -> str:
    machine = rows[0]["machine"]
    gpu = "; ".join(machine["gpus"]) or "no GPU"
    parts = [
        "# GPU benchmark",
        f"{rows[0]['time']}, {gpu}, Martlet {machine['commit'] or ''}.\n\n    {rows[0]['command']}",
        "\n".join(f"- {name}: {about}" for name, about in WORKLOADS.items()),
        "## Goals",
        _goals(rows),
    ]
    for model in dict.fromkeys(row["model"] for row in rows):
        parts += [f"## {model}", _figures([row for row in rows if row["model"] == model])]
    return "\n\n".join(parts) + "\n"


def _found(rows: Sequence[Row], goal: Goal, engine: str) -> float | None:
    wanted = (engine, goal.model, goal.workload)
    those = [row for row in rows if (row["engine"], row["model"], row["workload"]) == wanted]
    return value(those[0], goal.key) if those else None


def _goals(rows: Sequence[Row]) -> str:
    """Against vLLM as measured in the same run; where it was not, against what it once gave on one H200."""
    headings = {(workload, key): heading for workload, key, heading, *_ in ROWS}
    lines = ["| model | figure | ours | against | ratio | wanted | reached |", "|---|---|---|---|---|---|---|"]
    for goal in GOALS:
        ours = _found(rows, goal, f"native:{goal.variant}" if goal.variant else "native")
        if ours is None:
            continue
        if goal.against == "=":
            ratio, against = ours, "-"
        else:
            theirs = _found(rows, goal, goal.against or "vllm")
            kept = None if goal.against or theirs else VLLM[goal.model].get((goal.workload, goal.key))
            base = theirs or kept
            ratio = ours / base if base else None
            who = (goal.against or "vLLM") + (" (recorded)" if kept else "")
            against = f"{base:,.6g} {who}" if base else "not measured"
        reached = (
            "-" if ratio is None else "yes" if (ratio >= goal.wanted) == goal.more or ratio == goal.wanted else "no"
        )
        heading = headings[goal.workload, goal.key] + (f", {goal.variant}" if goal.variant else "")
        sign = "at least" if goal.more else "at most"
        cells = (goal.model, heading, f"{ours:,.5g}", against, "-" if ratio is None else f"{ratio:.3f}",
                 f"{sign} {goal.wanted:g}", reached)  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _figures(rows: Sequence[Row]) -> str:
    engines = list(dict.fromkeys(row["engine"] for row in rows))
    by_key = {(row["engine"], row["workload"]): row for row in rows}
    lines = [f"| | {' | '.join(engines)} |", "|---|" + "---|" * len(engines)]
    for workload, key, heading, digits, _ in ROWS:
        cells = []
        for engine in engines:
            row = by_key.get((engine, workload))
            number = value(row, key) if row else None
            cells.append(f"{number:,.{digits}f}" if number else "failed" if row and row["error"] else "-")
        if set(cells) != {"-"}:
            lines.append(f"| {heading} | {' | '.join(cells)} |")
    return "\n".join(lines)
