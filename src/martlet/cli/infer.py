"""`martlet infer`: chat in the terminal, answer one prompt, or answer a file of them."""

from __future__ import annotations

import io
import sys
import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, replace
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any

from martlet.cli import evaluate, repl, swift_flags
from martlet.cli.adapters import AdapterFlags
from martlet.cli.evaluate import EvaluationFlags
from martlet.cli.flags import Command, flag
from martlet.cli.options import EngineFlags, Loaded, ModelFlags, SamplingFlags, check_sampling, load
from martlet.errors import UsageError

if TYPE_CHECKING:
    from martlet.cli.batch import Row
    from martlet.engine.request import Request

_TURNS = count(1)


@dataclass(frozen=True)
class InferOptions(EvaluationFlags, SamplingFlags, AdapterFlags, EngineFlags, ModelFlags):
    """Input and output."""

    prompt: str | None = flag("answer this and leave; - reads it from the standard input", None)
    system: str | None = flag("system message; '' for none (default: the model's own)", None)
    val_dataset: tuple[str, ...] = flag(
        "with --result_path: answer every row of a .jsonl file, and go on where a killed run stopped; without: answer "
        "all rows of these datasets, beside their labels",
        (),
        metavar="DATASET",
        aliases=("custom_val_dataset_path",),
    )
    result_path: str | None = flag("where the answers of --val_dataset go, one JSON line each", None, metavar="FILE")
    stream: bool = flag("print an answer as it comes", True)
    verbose: bool = flag("print the pace of every answer on stderr", False)


def run(options: InferOptions) -> int:
    """Check what can be checked without a model, load it, and do what was asked."""
    check_sampling(options)
    if evaluate.is_asked_for(options):
        if options.prompt is not None:
            raise UsageError("--prompt and datasets exclude each other", param="prompt")
        if options.result_path is not None:
            raise UsageError("answers to a dataset go to --result_dir DIR", param="result_path")
        return evaluate.run(options)
    if options.result_dir is not None:
        raise UsageError("--result_dir goes with --load_dataset_config, --dataset or --val_dataset", param="result_dir")
    if options.val_dataset and not options.eval_human:
        return run_dataset(options)
    if options.result_path is not None:
        raise UsageError("--result_path goes with --val_dataset", param="result_path")
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="replace")  # bytes that are no text shall not end a conversation
    prompt = sys.stdin.read() if options.prompt == "-" else options.prompt
    if prompt is not None and not prompt.strip():
        raise UsageError("the prompt is empty", param="prompt")
    alone = replace(options, max_num_seqs=options.max_num_seqs or 1)  # one conversation needs the memory of one
    loaded = load(alone, alone, alone)
    with closing(loaded.backend):
        if prompt is None:
            return run_chat(loaded, options)
        for piece in answer(loaded, options, conversation(options.system, prompt)):
            repl.show(piece)
    return 0


def run_chat(loaded: Loaded, options: InferOptions) -> int:
    if loaded.template is None:
        name = loaded.backend.card.name
        print(f"{name} is a base model: it continues your text and knows no conversation.", file=sys.stderr)
    return repl.chat(lambda messages: answer(loaded, options, messages), options.system)


def run_dataset(options: InferOptions) -> int:
    from martlet.cli import batch
    from martlet.cli.progress import row_bar

    source, result = dataset_paths(options)
    done = batch.already_done(source, result)
    loaded = load(options, options, options)
    with closing(loaded.backend):

        def make_request(row: Row) -> Request:
            messages = row.messages
            if messages is None:
                ids = loaded.backend.tokenizer.encode_prompt(row.prompt)
            else:
                own_system = messages[0]["role"] == "system"
                ids = loaded.prompt_ids(messages if own_system else conversation(options.system) + messages)
            return loaded.request(str(row.number), ids, options, turn=messages is not None)

        tally = batch.run_file(loaded.backend, source, result, done, make_request, row_bar)
    print(f"{tally}; results in {result}", file=sys.stderr)
    return 1 if tally.bad else 0


def dataset_paths(options: InferOptions) -> tuple[Path, Path]:
    """(--val_dataset, --result_path), checked before a model is loaded for nothing."""
    if options.prompt is not None:
        raise UsageError("--prompt and --val_dataset exclude each other", param="prompt")
    if len(options.val_dataset) != 1:
        raise UsageError("--result_path takes the answers of one --val_dataset file", param="val_dataset")
    source, result = Path(options.val_dataset[0]).expanduser(), Path(options.result_path or "").expanduser()
    if not source.is_file():
        raise UsageError(f"--val_dataset: no file {source}", param="val_dataset")
    if not result.parent.is_dir():
        raise UsageError(f"--result_path: no folder {result.parent}", param="result_path")
    if result.exists() and result.samefile(source):
        raise UsageError("--result_path must not be the --val_dataset itself", param="result_path")
    return source, result


def conversation(system: str | None, prompt: str | None = None) -> list[dict[str, Any]]:
    said = (("system", system), ("user", prompt))
    return [{"role": role, "content": text} for role, text in said if text is not None]


def answer(loaded: Loaded, options: InferOptions, messages: list[dict[str, Any]]) -> Iterator[str]:
    """The answer to `messages`, in pieces as they come (or whole), and then a line end.

    Leaving the iterator stops the model.
    """
    ids = loaded.prompt_ids(messages)
    request = loaded.request(f"turn-{next(_TURNS)}", ids, options, turn=True, stream=options.stream)
    began, first, tokens = time.perf_counter(), None, 0
    with closing(loaded.backend.generate([request])) as outputs:
        for output in outputs:
            if output.error is not None:
                raise output.error
            first = first or time.perf_counter()
            tokens += len(output.token_ids)
            yield output.text
    yield "\n"
    if options.verbose and first is not None:
        pace = (tokens - 1) / max(time.perf_counter() - first, 1e-9)
        told = f"{len(ids)} prompt tokens; {tokens} tokens, first after {first - began:.2f} s, then {pace:.1f} tok/s"
        print(f"[{told}]", file=sys.stderr)


COMMAND = Command(
    "Chat with a model in the terminal; with --prompt answer once; with --val_dataset answer a file.",
    InferOptions,
    run,
    not_yet=swift_flags.INFER,
    startup_log=True,
)
