"""`martlet infer` over datasets: what a model answers to rows whose answers are known, such as those a run held back.

Answers go to RESULT_DIR/TIME.jsonl as they come, one {system, query, response, label, history} a line.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass, fields, replace
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from martlet.cli.flags import flag
from martlet.errors import UsageError

if TYPE_CHECKING:
    from martlet.cli.infer import InferOptions
    from martlet.cli.options import Loaded
    from martlet.engine.request import Request
    from martlet.train.arguments import SftArguments
    from martlet.train.rows import Row


@dataclass(frozen=True)
class EvaluationFlags:
    """Datasets."""

    load_dataset_config: bool = flag("answer the rows that the run of --ckpt_dir held back for evaluation", False)
    dataset: tuple[str, ...] = flag(
        "hold back a part of these rows, as martlet sft would, and answer it",
        (),
        metavar="DATASET",
        commas=True,
    )
    dataset_test_ratio: float | None = flag("that part (default: the run's, or 0.01)", None)
    dataset_seed: int | None = flag("of sampling and splitting (default: the run's, or 42)", None)
    model_name: tuple[str, ...] = flag("what self-cognition rows call the model: in Chinese, in English", ())
    model_author: tuple[str, ...] = flag("and its maker", ())
    show_dataset_sample: int = flag("most rows to answer; -1 for all", -1, aliases=("val_dataset_sample",))
    eval_human: bool | None = flag("true talks to you, whatever datasets are named; false answers them", None)
    result_dir: str | None = flag(
        "where answers to a dataset go, as DIR/TIME.jsonl (default: CKPT_DIR/infer_result)", None, metavar="DIR"
    )


def is_asked_for(options: InferOptions) -> bool:
    """Whether a dataset is to be answered row by row. Raises UsageError where the flags contradict each other."""
    named = options.load_dataset_config or options.dataset or (options.val_dataset and options.result_path is None)
    if options.eval_human:
        return False
    if options.eval_human is False and not named and not options.val_dataset:
        raise UsageError(
            "--eval_human false needs rows to answer: --load_dataset_config true, --dataset or --val_dataset",
            param="eval_human",
        )
    return bool(named)


def run(options: InferOptions) -> int:
    """Answer the rows; 1 when some could not be answered."""
    return 1 if evaluate(options)[1] else 0


def evaluate(options: InferOptions) -> tuple[Path, int]:
    """(the file of answers, how many rows could not be answered)"""
    from martlet.cli import infer
    from martlet.train.split import split_rows

    infer.check_sampling(options)
    arguments = run_arguments(options)
    folder = result_folder(options)
    loaded = infer.load(options, options, options)
    with closing(loaded.backend):
        arguments = replace(arguments, max_length=min(arguments.longest, loaded.backend.max_model_len))
        rows = split_rows(arguments, loaded.template, loaded.backend.tokenizer)
        for line in rows.left_out[:10]:
            print(f"left out: {line}", file=sys.stderr)
        held = [row for row, _ in rows.held]
        if options.show_dataset_sample >= 0:
            held = held[: options.show_dataset_sample]
        if not held:
            raise UsageError(
                "no row is held back to be answered; --dataset_test_ratio says how many are", param="dataset"
            )
        folder.mkdir(parents=True, exist_ok=True)
        result = folder / f"{time.strftime('%Y%m%d-%H%M%S')}.jsonl"
        answered, right, bad = answer_rows(loaded, options, arguments, held, result)
    print(
        f"{answered} rows answered, {right} of them word for word like the label; results in {result}", file=sys.stderr
    )
    return result, bad


def run_arguments(options: InferOptions) -> SftArguments:
    """Which rows, in the words of a training run: its own when asked for, under the flags that are given."""
    from martlet.train import layout
    from martlet.train.arguments import RlhfArguments, SftArguments

    arguments = SftArguments(max_length=-1)
    if options.load_dataset_config:
        if options.ckpt_dir is None:
            raise UsageError("--load_dataset_config true reads the run of --ckpt_dir; give that", param="ckpt_dir")
        saved = layout.read_args(Path(options.ckpt_dir).expanduser())
        if not saved:
            raise UsageError(
                f"{options.ckpt_dir} has neither args.json nor sft_args.json, so nothing tells of its datasets; "
                "name them with --dataset or --val_dataset",
                param="load_dataset_config",
            )
        kind = RlhfArguments if saved.get("rlhf_type") else SftArguments
        arguments = kind(**_known(kind, saved))
    if options.dataset or options.val_dataset:
        arguments = replace(arguments, dataset=options.dataset, val_dataset=options.val_dataset)
        arguments = replace(arguments, self_cognition_sample=0, train_dataset_sample=-1, val_dataset_sample=None)
    given = {name: getattr(options, name) for name in ("dataset_test_ratio", "dataset_seed", "system")}
    given |= {name: getattr(options, name) or None for name in ("model_name", "model_author")}
    arguments = replace(arguments, **{name: value for name, value in given.items() if value is not None})
    if not (arguments.dataset or arguments.val_dataset or arguments.self_cognition_sample):
        raise UsageError(
            "the run's arguments name no dataset; name one with --dataset or --val_dataset", param="dataset"
        )
    return arguments


def _known(kind: type, saved: dict[str, Any]) -> dict[str, Any]:
    """What of another run's arguments, maybe of another version of SWIFT, says something about rows."""
    names = {f.name for f in fields(kind)}
    theirs = {"split_dataset_ratio": "dataset_test_ratio", "data_seed": "dataset_seed"}  # SWIFT 3 and later
    saved = {**{ours: saved[name] for name, ours in theirs.items() if name in saved}, **saved}
    about_rows = names & {*ROWS, "rlhf_type"}
    found = {}
    for name in about_rows & saved.keys():
        value = saved[name]
        if value is not None:
            found[name] = tuple(v for v in value if v is not None) if isinstance(value, list) else value
    return found


ROWS = (
    *("dataset", "val_dataset", "dataset_test_ratio", "dataset_seed", "train_dataset_sample", "val_dataset_sample"),
    *("self_cognition_sample", "model_name", "model_author", "columns", "custom_dataset_info", "max_length"),
    *("max_prompt_length", "truncation_strategy", "system", "seed"),
)


def result_folder(options: InferOptions) -> Path:
    if options.result_dir is not None:
        return Path(options.result_dir).expanduser()
    if options.ckpt_dir is None:
        raise UsageError(
            "where shall the answers go? --result_path OUT.jsonl for a file of prompts, --result_dir DIR for a dataset",
            param="result_dir",
        )
    return Path(options.ckpt_dir).expanduser() / "infer_result"


def answer_rows(
    loaded: Loaded, options: InferOptions, arguments: SftArguments, rows: Sequence[Row], result: Path
) -> tuple[int, int, int]:
    """(answered, like the label, not answered); the answers are in `result`."""
    from martlet.cli import batch
    from martlet.cli.progress import row_bar

    def make_request(numbered: tuple[int, Row]) -> Request:
        number, row = numbered
        messages = asked(row, arguments.system)
        if loaded.template is None:
            ids = loaded.prompt_ids(messages)
        else:
            ids = loaded.template.render(messages, tools=list(row.tools) or None)
        return loaded.request(str(number), ids, options, turn=True)

    answered = right = bad = 0
    with result.open("w", encoding="utf-8") as out, row_bar(len(rows), 0) as advance:
        for (number, row), answer in batch.answers(loaded.backend, enumerate(rows, 1), make_request):
            if isinstance(answer, BaseException):
                bad += 1
                print(f"row {number}: {answer}", file=sys.stderr)
                advance(0)
                continue
            out.write(json.dumps(result_row(row, arguments.system, answer.text), ensure_ascii=False) + "\n")
            out.flush()
            answered += 1
            right += answer.text.strip() == row.answer.strip()
            advance(answer.tokens)
    return answered, right, bad


def asked(row: Row, system: str | None) -> list[dict[str, Any]]:
    """The messages before the answer, as training rendered them. Raises InvalidRequest for plain text."""
    from martlet.errors import InvalidRequest

    if row.text is not None:
        raise InvalidRequest("a row of plain text asks nothing", param="dataset")
    messages = list(row.prompt)
    if system and messages[0]["role"] != "system":
        messages.insert(0, {"role": "system", "content": system})
    return messages


def result_row(row: Row, system: str | None, response: str) -> dict[str, Any]:
    """As SWIFT writes it: history is [[query, response], ...] of the turns before the last question."""
    messages = asked(row, system)
    first = messages[0]["content"] if messages[0]["role"] == "system" else None
    turns = [m for m in messages if m["role"] != "system"]
    history = [
        [a["content"], b["content"]]
        for a, b in pairwise(turns)
        if a["role"] != "assistant" and b["role"] == "assistant"
    ]
    return {
        "system": first,
        "query": messages[-1]["content"],
        "response": response,
        "label": row.answer or json.dumps(row.messages[-1].get("tool_calls"), ensure_ascii=False),
        "history": history,
    }
