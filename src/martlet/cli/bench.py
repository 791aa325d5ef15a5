"""`martlet bench`: speed and memory, measured and printed beside what others do."""

from __future__ import annotations

import shutil
import signal
import sys
from dataclasses import dataclass
from pathlib import Path

from martlet.cli.flags import Command, CommandGroup, flag
from martlet.cli.options import DEFAULT_MODEL, DTYPES
from martlet.errors import UsageError


@dataclass(frozen=True)
class CpuOptions:
    """What to measure."""

    model: str = flag("the model all engines run; peers need it as .gguf", DEFAULT_MODEL, metavar="NAME")
    workloads: tuple[str, ...] = flag(
        "W1-W5 and start, with commas or spaces", ("W1", "W2", "W3", "W4", "W5", "start"), commas=True, metavar="NAME"
    )
    engines: tuple[str, ...] = flag(
        "NAME[:TYPE][@W1+W2][=MODEL] of native, reference, transformers, vllm, llama.cpp, openvino: the type to run in "
        "(native:int8, vllm:bf16), the workloads it is for, another file or folder; others are compared with the first",
        ("native", "transformers", "vllm", "llama.cpp", "openvino"),
        commas=True,
        metavar="ENGINE",
    )
    runs: int = flag("how often; figures are medians", 5)
    seconds: float | None = flag("fewer runs of a workload on an engine where they would take longer", None)
    quiet_seconds: float = flag("before each measurement, wait at most so long for others to leave the machine", 20.0)
    dtype: str = flag("number type of weights and activations of our backends", "auto", choices=DTYPES)
    quant: str | None = flag("smaller weights for the native engine", None, metavar="NAME")
    device: str = flag("where our backends run", "cpu", choices=("auto", "cpu", "cuda"))
    python: tuple[str, ...] = flag("ENGINE=PATH: the Python that has this engine, when it is another one", ())
    output: str | None = flag("append the results to this file, one JSON line each", None, metavar="FILE")
    report: str | None = flag("write goals and figures to this Markdown file", None, metavar="FILE")


@dataclass(frozen=True)
class GpuOptions:
    """What to measure."""

    models: tuple[str, ...] = flag(
        "shapes, with random weights: qwen3-0.6b, llama3-8b", ("qwen3-0.6b", "llama3-8b"), commas=True, metavar="NAME"
    )
    workloads: tuple[str, ...] = flag(
        "G1-G6 and start", ("start", "G1", "G2", "G3", "G4", "G5", "G6"), commas=True, metavar="NAME"
    )
    engines: tuple[str, ...] = flag(
        "NAME[@G1+G2] of native, native:fp8_kv (keys and values in FP8), native:fp8 (weights too), vllm, transformers, "
        "and the workloads it is for; those that are not installed are skipped",
        ("native", "native:fp8_kv@G1", "vllm", "transformers@start+G2+G4"),
        commas=True,
        metavar="ENGINE",
    )
    clients: tuple[int, ...] = flag("of G5, how many at once", (1, 64, 256), commas=True)
    seconds: float = flag("the most that one process of an engine may take", 600.0)
    output: str | None = flag("append the results to this file, one JSON line each", None, metavar="FILE")
    report: str | None = flag("write goals and figures to this Markdown file", None, metavar="FILE")


@dataclass(frozen=True)
class ReportOptions:
    """Which results."""

    results: str = flag("a file that bench cpu --output wrote; its last run counts", metavar="FILE")
    report: str = flag("the Markdown file to write", metavar="FILE")


@dataclass(frozen=True)
class HttpOptions:
    """What to measure."""

    url: str = flag("an OpenAI-compatible server, up to and with /v1")
    model: str = flag("the name to ask it for", metavar="NAME")
    api_key: str | None = flag("sent as a bearer token", None, metavar="KEY")
    workloads: tuple[str, ...] = flag("W1-W5", ("W5",), commas=True, metavar="NAME")
    runs: int = flag("how often; a server with a prefix cache is faster from the second run on", 1)
    ignore_eos: bool = flag("ask for answers of full length; false for servers that refuse the field", True)
    output: str | None = flag("append the results to this file, one JSON line each", None, metavar="FILE")


@dataclass(frozen=True)
class MemoryOptions:
    """What to measure."""

    block_size: int = flag("tokens in a KV block", 16)
    samples: int = flag("answers to one prompt", 6)
    prompt: int = flag("tokens of that prompt", 256)
    output: int = flag("tokens of each answer", 128)


@dataclass(frozen=True)
class PrecisionOptions:
    """What to measure."""

    model: str = flag("the model; starts with --quant auto know its figures then", DEFAULT_MODEL, metavar="NAME")
    quants: tuple[str, ...] = flag(
        "number formats to measure", ("stored", "bf16", "int8", "int4"), commas=True, metavar="QUANT"
    )
    tokens: int = flag("tokens of text to measure on", 2000)
    text: str | None = flag("a text file to measure on (default: the prompts of W3)", None, metavar="FILE")
    output: str | None = flag("append the results to this file, one JSON line each", None, metavar="FILE")


def run_cpu(options: CpuOptions) -> int:
    import json

    from rich.console import Console

    from martlet.bench import engines, goals, report, session, workloads

    pythons = interpreters(options.python)
    _check_runs(options.runs, options.output, options.report)
    for name in options.workloads:
        workloads.load(name)
    wanted = []
    for entry in map(engines.parse, dict.fromkeys(options.engines)):
        for name in entry.only:
            workloads.load(name)
        reason = None if entry.name in pythons else engines.missing(entry.name)
        if reason is None:
            wanted.append(entry)
        else:
            print(f"{entry.name} is skipped: {reason}", file=sys.stderr)
    if not wanted:
        raise UsageError("none of these engines is installed", param="engines")
    jobs = _jobs(wanted, options)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # an exception, so that servers under test are stopped too
    plan = session.Plan(options.workloads, options.runs, options.seconds, options.quiet_seconds, pythons)
    results = session.measure_all(jobs, plan, tell)
    if options.report is not None:
        from martlet.bench.machine import describe

        rows = [json.loads(line) for line in report.lines(results, describe())]
        Path(options.report).expanduser().write_text(goals.markdown(rows), encoding="utf-8")
    return finish(Console(), report, results, options.output)


def run_gpu(options: GpuOptions) -> int:
    import json

    from martlet.bench import report
    from martlet.bench.gpu import report as gpu_report
    from martlet.bench.gpu import session, shapes
    from martlet.bench.machine import describe

    _check_runs(1, options.output, options.report)
    shapes.check("model", options.models, shapes.SHAPES)
    shapes.check("workload", options.workloads, shapes.WORKLOADS)
    if not options.clients or min(options.clients) < 1:
        raise UsageError(f"--clients wants numbers from 1 on, got {options.clients}", param="clients")
    entries = [session.parse(word) for word in dict.fromkeys(options.engines)]
    entries = session.installed(entries, lambda text: print(text, file=sys.stderr))
    if not entries:
        raise UsageError("none of these engines is installed", param="engines")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # an exception, so that servers under test are stopped too
    plan = session.Plan(options.models, options.workloads, options.clients, options.seconds)
    machine, lines = describe(), []

    def keep(result) -> None:
        tell_gpu(result)
        lines.extend(report.lines([result], machine))
        if options.output is not None:  # at once: what follows may take long, or end badly
            with Path(options.output).expanduser().open("a", encoding="utf-8") as file:
                file.write(lines[-1] + "\n")

    results = session.measure_all(entries, plan, keep)
    text = gpu_report.markdown([json.loads(line) for line in lines])
    print(text)
    if options.report is not None:
        Path(options.report).expanduser().write_text(text, encoding="utf-8")
    return int(any(result.error is not None for result in results))


def tell_gpu(result) -> None:
    """One line a measurement, as soon as it is there."""
    what = f"{result.model} {result.workload} {result.engine}"
    figures = ", ".join(f"{key} {number:.5g}" for key, number in result.figures.items())
    print(f"{what}: failed: {result.error}" if result.error else f"{what}: {figures}", file=sys.stderr)


def run_report(options: ReportOptions) -> int:
    from martlet.bench import goals

    results = Path(options.results).expanduser()
    if not results.is_file():
        raise UsageError(f"--results: no file {options.results}", param="results")
    _check_runs(1, None, options.report)
    Path(options.report).expanduser().write_text(goals.markdown(goals.last_session(results)), encoding="utf-8")
    return 0


def _jobs(wanted: list, options: CpuOptions) -> list:
    """Jobs with labels that differ; every model is looked for before anything is measured."""
    from martlet import hub
    from martlet.bench import engines
    from martlet.cli.progress import download_bar

    jobs = []
    for entry in wanted:
        model = entry.model or options.model
        folder = Path(model).expanduser()
        if entry.name in ("openvino", "vllm") and folder.is_dir():
            path = folder  # in a format of their own, perhaps
        else:
            with download_bar() as progress:
                path = Path(hub.resolve(model, progress=progress).path)
        made = engines.job(entry, model, path, DTYPES, options.dtype, options.quant, options.device)
        if made.label in {job.label for job in jobs}:
            made = made._replace(label=f"{made.label} {Path(model).stem}")
        if made.label in {job.label for job in jobs}:
            raise UsageError(f"two of --engines are {made.label}", param="engines")
        jobs.append(made)
    return jobs


def run_http(options: HttpOptions) -> int:
    from rich.console import Console

    from martlet.bench import http, offline, report, workloads
    from martlet.bench.timeline import figures

    _check_runs(options.runs, options.output, None)
    extra = {"ignore_eos": True} if options.ignore_eos else {}
    endpoint = http.Endpoint(options.url, options.model, options.api_key, extra)
    results = []
    for name in options.workloads:
        workload = workloads.load(name)
        result = offline.Result(options.url, options.model, name)
        http.warm_up(endpoint, workload)
        for _ in range(options.runs):
            timelines = http.measure(endpoint, workload)
            result.runs.append(figures(timelines))
            result.note = http.check(timelines, workload)
        tell(result)
        results.append(result)
    return finish(Console(), report, results, options.output)


def run_memory(options: MemoryOptions) -> int:
    from rich.console import Console

    from martlet.bench import memory

    waste = memory.measure_waste(options.block_size)
    sharing = memory.measure_sharing(options.samples, options.prompt, options.output, options.block_size)
    Console().print(memory.table(waste, sharing))
    return 0


def run_precision(options: PrecisionOptions) -> int:
    import json
    from dataclasses import asdict

    from rich.console import Console
    from rich.table import Table

    from martlet import hub
    from martlet.bench import quality as bench
    from martlet.cli.progress import download_bar
    from martlet.runners import quality

    if options.tokens < 1:
        raise UsageError(f"--tokens must be at least 1, got {options.tokens}", param="tokens")
    _check_runs(1, options.output, None)
    text = options.text if options.text is None else _text(options.text)
    with download_bar() as progress:
        card = hub.resolve(options.model, progress=progress)
    words = ["martlet bench precision --model", options.model, "--quants", ",".join(options.quants)]
    words += ["--tokens", str(options.tokens), *(["--text", options.text] if options.text else [])]
    texts = bench.passages(card, options.tokens, text)
    found = list(bench.measure(card, options.quants, texts, " ".join(words)))
    table = Table("quant", "mean |change| of log-probability", "mean loss", "good for auto")
    for one in found:
        table.add_row(one.quant, f"{one.change:.4f}", f"{one.loss:+.4f}", "yes" if one.good else "no")
    Console().print(table)
    if card.format != "dummy":
        print(f"kept in {quality.keep(card, found)}", file=sys.stderr)
    if options.output is not None:
        with Path(options.output).expanduser().open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(asdict(one)) + "\n" for one in found)
    return 0


def _text(name: str) -> str:
    try:
        return Path(name).expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"--text {name}: {error}", param="text") from None


def tell(result) -> None:
    """One line a measurement, as soon as it is there."""
    what = f"{result.workload} {result.engine}"
    if result.error is not None:
        print(f"{what}: failed: {result.error}", file=sys.stderr)
        return
    keys = ("start_s",) if result.workload == "start" else ("ttft_ms", "decode_tok_s", "output_tok_s", "seconds")
    text = ", ".join(f"{key} {result.figures[key]:.4g}" for key in keys)
    print(f"{what}: {text}" + (f" ({result.note})" if result.note else ""), file=sys.stderr)


def finish(console, report, results, output: str | None) -> int:
    """Print the table and append the lines; 1 when a measurement failed."""
    if any(r.error is None for r in results):
        console.print(report.table([r for r in results if r.error is None]))
    if output is not None:
        report.write(results, Path(output).expanduser())
        print(f"results appended to {output}", file=sys.stderr)
    return int(any(r.error is not None for r in results))


def interpreters(pairs: tuple[str, ...]) -> dict[str, str]:
    """--python ENGINE=PATH ... as a map."""
    found = {}
    for pair in pairs:
        engine, equals, path = pair.partition("=")
        if not equals or shutil.which(path) is None:
            raise UsageError(f"--python wants ENGINE=PATH of a Python interpreter, got {pair!r}", param="python")
        found[engine] = path
    return found


def _check_runs(runs: int, output: str | None, report: str | None) -> None:
    if runs < 1:
        raise UsageError(f"--runs must be at least 1, got {runs}", param="runs")
    for name, file in (("output", output), ("report", report)):
        if file is not None and not Path(file).expanduser().parent.is_dir():
            raise UsageError(f"--{name}: no folder {Path(file).parent}", param=name)


COMMAND = CommandGroup(
    "Measure speed and memory against other engines, in one run on one machine.",
    {
        "cpu": Command("Workloads W1-W5 and start on several engines, each in its own process.", CpuOptions, run_cpu),
        "gpu": Command("Workloads G1-G6 and start on a GPU, with random weights.", GpuOptions, run_gpu),
        "report": Command("Results of bench cpu as Markdown, beside the goals.", ReportOptions, run_report),
        "http": Command("Workloads against any OpenAI-compatible server.", HttpOptions, run_http),
        "precision": Command(
            "What number formats cost in log-probability of real text, on a CPU.", PrecisionOptions, run_precision
        ),
        "memory": Command("KV memory that paging wastes, and that shared prompts save.", MemoryOptions, run_memory),
    },
)
