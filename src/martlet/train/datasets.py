"""Datasets by name, hub id or path, in SWIFT's small language: [HF::|MS::]SOURCE[:SUBSET/...][#N].

SOURCE is a name of `datasets.toml`, `self-cognition`, a file (json, jsonl, csv, tsv, parquet), a folder of such files,
or a repository of a hub. #N takes N rows at random, and takes them again and again where there are fewer.
A row that cannot be trained on is left out, counted, and reported with its file, its line and the reason.
"""

from __future__ import annotations

import csv
import json
import random
import re
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

from martlet.errors import DownloadError, UsageError, did_you_mean
from martlet.train.rows import Row, RowError, parse

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

T = TypeVar("T")

HERE = Path(__file__).parent
SUFFIXES = (".jsonl", ".json", ".csv", ".tsv", ".parquet")
SELF_COGNITION = "self-cognition"


@dataclass(frozen=True, slots=True)
class Spec:
    """What one word of --dataset asks for. hub: "hf", "ms" or None (a name or a path)."""

    source: str
    subsets: tuple[str, ...] = ()
    sample: int | None = None
    hub: str | None = None


@dataclass(frozen=True, slots=True)
class Identity:
    """Who self-cognition rows say the model is, in Chinese and in English."""

    name: tuple[str, str]
    author: tuple[str, str]

    @classmethod
    def of(cls, name: Sequence[str | None], author: Sequence[str | None]) -> Identity:
        """From --model_name ZH [EN] and --model_author ZH [EN]; one word serves both languages."""
        for flag, words in (("model_name", name), ("model_author", author)):
            if not [word for word in words if word] or len(words) > 2:
                raise UsageError(
                    f"self-cognition rows need --{flag}: the name in Chinese and in English, or one for both",
                    param=flag,
                )
        both = [tuple(word for word in words if word) for words in (name, author)]
        return cls(*((words[0], words[-1]) for words in both))

    def fill(self, text: str, language: str) -> str:
        at = 0 if language == "zh" else 1
        return text.replace("{{NAME}}", self.name[at]).replace("{{AUTHOR}}", self.author[at])


@dataclass(frozen=True, slots=True)
class Problem:
    """A row that was left out. line: of the file, or the row's number where a file has no lines."""

    file: str
    line: int
    reason: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line}: {self.reason}"


@dataclass(slots=True)
class Dataset:
    """Rows to train on, and what was left out."""

    rows: list[Row] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Entry:
    """A named dataset. columns: renames, theirs to ours. split: of the repository, for training."""

    hf: str = ""
    ms: str = ""
    path: str = ""
    subset: str | None = None
    split: str = "train"
    columns: Mapping[str, str] = field(default_factory=dict)
    about: str = ""


def registry(custom: Path | None = None) -> dict[str, Entry]:
    """The named datasets; `custom` is a JSON file {name: {hf, ms, path, subset, split, columns}} that adds its own."""
    with open(HERE / "datasets.toml", "rb") as file:
        entries = {name: Entry(**table) for name, table in tomllib.load(file).items()}
    if custom is not None:
        try:
            entries |= {name: Entry(**table) for name, table in json.loads(custom.read_text("utf-8")).items()}
        except (OSError, ValueError, TypeError, AttributeError) as error:
            raise UsageError(f"custom_dataset_info {custom}: {error}", param="custom_dataset_info") from error
    return entries


def read_spec(word: str) -> Spec:
    """Raises UsageError for a word that is none."""
    rest, hub = word, None
    if match := re.match(r"(HF|MS)::", word, re.IGNORECASE):
        hub, rest = match[1].lower(), word[match.end() :]
    rest, mark, sample = rest.rpartition("#") if "#" in rest else (rest, "", "")
    if mark and (not sample.isdigit() or not int(sample)):
        raise UsageError(f"dataset {word!r}: after # comes how many rows to take, such as #500", param="dataset")
    subsets: tuple[str, ...] = ()
    if hub or not Path(rest).exists():  # a path may hold a colon
        rest, _, names = rest.partition(":")
        subsets = tuple(name for name in names.split("/") if name)
    if not rest:
        raise UsageError(f"dataset {word!r} names nothing", param="dataset")
    return Spec(rest, subsets, int(sample) if mark else None, hub)


def load(
    words: Iterable[str],
    *,
    seed: int = 42,
    identity: Identity | None = None,
    columns: Mapping[str, str] | None = None,
    custom: Path | None = None,
) -> Dataset:
    """All rows of the datasets that `words` name, one after the other.

    Raises UsageError for a name or a file that is not there and for a dataset with no usable row, DownloadError for a
    hub that cannot be reached.
    """
    found, entries = Dataset(), registry(custom)
    for word in words:
        spec = read_spec(word)
        part = Dataset()
        renames = dict(columns or {})
        if spec.source == SELF_COGNITION:
            if identity is None:
                raise UsageError("self-cognition needs --model_name and --model_author", param="model_name")
            records = _self_cognition(identity, spec.subsets)
        else:
            entry = entries.get(spec.source)
            renames = {**(entry.columns if entry else {}), **renames}
            records = _records(spec, entry, entries)
        for file, line, record in records:
            try:
                if isinstance(record, RowError):
                    raise record
                part.rows.append(replace(parse(record, renames), origin=f"{file}:{line}"))
            except RowError as error:
                part.problems.append(Problem(file, line, str(error)))
        if not part.rows:
            left_out = part.problems
            why = f"{len(left_out)} were left out; first: {left_out[0]}" if left_out else "it is empty"
            raise UsageError(f"dataset {word!r} holds no row to train on ({why})", param="dataset")
        found.rows += part.rows if spec.sample is None else sample(part.rows, spec.sample, seed)
        found.problems += part.problems
    return found


def sample(rows: Sequence[Row], count: int, seed: int) -> list[Row]:
    """`count` rows at random, each as often as the others or once more."""
    rounds, rest = divmod(count, len(rows))
    chance = random.Random(seed)
    taken = list(rows) * rounds + chance.sample(list(rows), rest)
    chance.shuffle(taken)
    return taken


def split(rows: Sequence[T], ratio: float, seed: int) -> tuple[list[T], list[T]]:
    """(for training, for validation): `ratio` of the rows, at least one when there are two, chosen by `seed`."""
    held = min(max(round(len(rows) * ratio), 1), len(rows) - 1) if ratio > 0 else 0
    order = list(range(len(rows)))
    random.Random(seed).shuffle(order)
    chosen = set(order[:held])
    return [r for i, r in enumerate(rows) if i not in chosen], [rows[i] for i in order[:held]]


Record = tuple[str, int, Any]  # file, line, a row as it stands there, or the RowError of a line that is none


def _records(spec: Spec, entry: Entry | None, entries: Mapping[str, Entry]) -> Iterator[Record]:
    path = Path(entry.path if entry and entry.path else spec.source).expanduser()
    if spec.hub is None and path.exists():
        return _from_path(path)
    if entry is not None:
        hub = spec.hub or ("hf" if entry.hf else "ms")
        name = entry.hf if hub == "hf" else entry.ms
        if not name:
            raise UsageError(f"dataset {spec.source!r} is not on {hub.upper()}", param="dataset")
        return _from_hub(hub, name, spec.subsets or ((entry.subset,) if entry.subset else ()), entry.split)
    looks_like_path = path.suffix in SUFFIXES or spec.source.startswith((".", "/", "~"))
    if spec.hub is None and (looks_like_path or spec.source.count("/") != 1):
        hint = did_you_mean(spec.source, [*entries, SELF_COGNITION])
        raise UsageError(
            f"dataset {spec.source!r} is neither a file, a folder, nor a name that is known.{hint}"
            " A repository is written HF::owner/name or MS::owner/name",
            param="dataset",
        )
    return _from_hub(spec.hub or "hf", spec.source, spec.subsets, "train")


def _from_path(path: Path) -> Iterator[Record]:
    files = [path]
    if path.is_dir():
        files = sorted(file for file in path.iterdir() if file.suffix in SUFFIXES)
        if not files:
            raise UsageError(f"dataset folder {path} holds no {', '.join(SUFFIXES)} file", param="dataset")
    for file in files:
        try:
            yield from _from_file(file)
        except UnicodeDecodeError as error:
            raise UsageError(f"dataset {file} is not UTF-8: {error}", param="dataset") from error
        except (OSError, csv.Error) as error:
            raise UsageError(f"dataset {file} cannot be read: {error}", param="dataset") from error


def _from_file(path: Path) -> Iterator[Record]:
    name = str(path)
    match path.suffix.lower():
        case ".jsonl":
            yield from _from_lines(path)
        case ".json":
            text = path.read_text("utf-8-sig")
            try:
                rows = json.loads(text)
            except (ValueError, RecursionError) as error:
                if text.lstrip().startswith("{"):  # many a .json holds a row a line
                    yield from _from_lines(path)
                    return
                raise UsageError(f"dataset {path} is not JSON: {error}", param="dataset") from error
            rows = rows.get("data", [rows]) if isinstance(rows, dict) else rows
            yield from ((name, number, row) for number, row in enumerate(rows, 1))
        case ".csv" | ".tsv":
            with open(path, encoding="utf-8-sig", newline="") as file:
                reader = csv.DictReader(file, delimiter="\t" if path.suffix.lower() == ".tsv" else ",")
                for row in reader:
                    wide = None in row
                    cells = {key: value for key, value in row.items() if value not in ("", None) and key is not None}
                    yield name, reader.line_num, RowError("more cells than the header has") if wide else cells
        case ".parquet":
            yield from _from_parquet(path)
        case _:
            raise UsageError(f"dataset {path}: known files are {', '.join(SUFFIXES)}", param="dataset")


def _from_lines(path: Path) -> Iterator[Record]:
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            try:
                text = line.decode("utf-8-sig" if number == 1 else "utf-8")
                if text.strip():
                    yield str(path), number, json.loads(text.rstrip())
            except UnicodeDecodeError as error:
                yield str(path), number, RowError(f"not UTF-8: {error}")
            except json.JSONDecodeError as error:
                yield str(path), number, RowError(f"not JSON: {error.msg} at column {error.colno}")
            except RecursionError:
                yield str(path), number, RowError("its JSON is nested too deep")


def _from_parquet(path: Path) -> Iterator[Record]:
    import pyarrow.parquet

    try:
        batches = pyarrow.parquet.ParquetFile(path).iter_batches(1024)
        for at, row in enumerate((row for batch in batches for row in batch.to_pylist()), 1):
            yield str(path), at, row
    except pyarrow.ArrowException as error:
        raise UsageError(f"dataset {path} is not parquet: {error}", param="dataset") from error


def _self_cognition(identity: Identity, languages: tuple[str, ...]) -> Iterator[Record]:
    file = HERE / "self_cognition.json"
    for number, row in enumerate(json.loads(file.read_text("utf-8")), 1):
        tag = row["tag"]
        if not languages or tag in languages:
            yield file.name, number, {key: identity.fill(row[key], tag) for key in ("query", "response")}


def _from_hub(hub: str, name: str, subsets: tuple[str, ...], part: str) -> Iterator[Record]:
    for subset in subsets or (None,):
        try:
            if hub == "hf":
                import datasets

                rows: Iterable[Any] = datasets.load_dataset(name, subset, split=part)
            else:
                from modelscope import MsDataset

                rows = MsDataset.load(name, subset_name=subset or "default", split=part)
        except ImportError as error:
            raise DownloadError(f"dataset {name!r}: {error}; pip install 'martlet[train]'", param="dataset") from error
        except Exception as error:  # the libraries raise what they like
            raise DownloadError(
                f"dataset {name!r} could not be fetched from {hub.upper()}: {type(error).__name__}: {error}",
                param="dataset",
            ) from error
        where = f"{hub.upper()}::{name}" + (f":{subset}" if subset else "")
        yield from ((where, number, row) for number, row in enumerate(rows, 1))
