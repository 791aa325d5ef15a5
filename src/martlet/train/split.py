"""The rows of a run, split for training and for evaluation: one function, so that whoever asks later gets the same.

`martlet infer --load_dataset_config true` evaluates on what a run held back; what is left out counts, since the split
is made of what remains.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from martlet.chat.template import Template
from martlet.errors import UsageError
from martlet.hub.tokenizer import Tokenizer
from martlet.train import datasets
from martlet.train.arguments import RlhfArguments, SftArguments, json_object
from martlet.train.datasets import Dataset, Identity
from martlet.train.encode import encode, prompt_and_endings, shorten
from martlet.train.rows import Row, RowError

Pair = tuple[Row, Any]  # a row, and what a trainer takes for it


@dataclass(slots=True)
class Split:
    """train, held: rows and what they become. left_out: why, each."""

    train: list[Pair]
    held: list[Pair]
    left_out: list[str]


def split_rows(arguments: SftArguments, template: Template | None, tokenizer: Tokenizer) -> Split:
    """Read, encode and split what `arguments` name: Encoded for sft, what a preference trainer takes otherwise.

    Raises UsageError and DownloadError naming the flag.
    """
    words = list(arguments.dataset)
    if arguments.self_cognition_sample:
        words.append(f"{datasets.SELF_COGNITION}#{arguments.self_cognition_sample}")
    identity = None
    if any(datasets.read_spec(word).source == datasets.SELF_COGNITION for word in (*words, *arguments.val_dataset)):
        identity = Identity.of(arguments.model_name, arguments.model_author)
    seed = arguments.seed if arguments.dataset_seed is None else arguments.dataset_seed
    custom = Path(arguments.custom_dataset_info) if arguments.custom_dataset_info else None
    columns = json_object(arguments.columns, "columns")

    def load(names: Sequence[str]) -> Dataset:
        return datasets.load(names, seed=seed, identity=identity, columns=columns, custom=custom)

    own = [word for word in words if not word.startswith(datasets.SELF_COGNITION)]
    found = load(own) if own else Dataset()
    if arguments.train_dataset_sample >= 0:
        found.rows = datasets.sample(found.rows, min(arguments.train_dataset_sample, len(found.rows)), seed)
    about = [word for word in words if word not in own]
    if about:
        more = load(about)
        found.rows, found.problems = found.rows + more.rows, found.problems + more.problems
    held = load(arguments.val_dataset) if arguments.val_dataset else Dataset()
    problems = [str(problem) for problem in (*found.problems, *held.problems)]
    if problems and arguments.check_dataset_strategy == "error":
        raise UsageError(f"{problems[0]} ({len(problems)} bad rows in all)", param="dataset")
    encoder = _encoder(arguments, template, tokenizer)
    train_set, more = _all(encoder, found.rows)
    held_set, others = _all(encoder, held.rows)
    if not arguments.val_dataset:
        train_set, held_set = datasets.split(train_set, arguments.dataset_test_ratio, seed)
    if arguments.val_dataset_sample is not None:
        held_set = held_set[: arguments.val_dataset_sample]
    return Split(train_set, held_set, [*problems, *more, *others])


def _encoder(arguments: SftArguments, template: Template | None, tokenizer: Tokenizer) -> Callable[[Row], Any]:
    """Row -> what the trainer takes, raising RowError."""
    limit, system = arguments.longest, arguments.system
    if not isinstance(arguments, RlhfArguments):
        cut = arguments.truncation_strategy
        return lambda row: encode(row, template, tokenizer, system=system, max_length=limit, truncation=cut)
    if template is None:
        raise UsageError("preferences need a chat template: --template_type", param="template_type")

    def pair(row: Row) -> Any:
        prompt, chosen, rejected = prompt_and_endings(row, template, tokenizer, system=system)
        if arguments.rlhf_type == "kto":
            if rejected is not None:
                raise RowError("kto takes one answer a row, with a label; pairs are for dpo, orpo, simpo and cpo")
            if row.label is None:
                raise RowError("kto needs a label: true for a desirable answer, false for another")
        elif rejected is None:
            raise RowError(f"{arguments.rlhf_type} needs a rejected answer beside the chosen one")
        prompt, (chosen, rejected) = shorten(
            prompt,
            (chosen, rejected),
            max_prompt_length=arguments.max_prompt_length,
            max_length=limit,
            truncation=arguments.truncation_strategy,
        )
        if arguments.rlhf_type == "kto":
            return prompt, chosen, row.label
        return prompt, chosen, rejected

    return pair


def _all(encoder: Callable[[Row], Any], rows: Sequence[Row]) -> tuple[list[Pair], list[str]]:
    done, left_out = [], []
    for row in rows:
        try:
            done.append((row, encoder(row)))
        except RowError as error:
            left_out.append(f"{row.origin}: {error}")
    return done, left_out
