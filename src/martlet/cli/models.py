"""`martlet models`: what there is, what is here, fetch and remove."""

from __future__ import annotations

import dataclasses
import json
import sys
from dataclasses import dataclass
from typing import Any

from martlet.cli.flags import Command, CommandGroup, flag


@dataclass(frozen=True)
class ListOptions:
    """What to print."""

    json: bool = flag("print JSON instead of a table", False)
    cached: bool = flag("only models that are on this machine", False)


@dataclass(frozen=True)
class FamiliesOptions:
    """What to print."""

    json: bool = flag("print JSON instead of a table", False)


@dataclass(frozen=True)
class ShowOptions:
    """What to print."""

    name: str = flag("a registered name, a folder or .gguf file, or a source such as hf:NAME", positional=True)
    json: bool = flag("print JSON instead of a table", False)


@dataclass(frozen=True)
class NameOptions:
    """What to do."""

    name: str = flag("a registered name or a source such as hf:NAME", positional=True)


def list_models(options: ListOptions) -> int:
    from martlet import hub

    rows = [row for entry in hub.registered() if (row := describe(entry))["cached"] or not options.cached]
    if options.json:
        print(json.dumps(rows, indent=2, ensure_ascii=False))
        return 0
    cells = [("name", "family", "size", "here", "about")]
    for row in rows:
        size = f"{row['size'] / 1e6:,.0f} MB" if row["size"] else ""
        cells.append((row["name"], row["family"], size, "yes" if row["cached"] else "", row["description"]))
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    for name, family, size, here, about in cells:
        print(f"{name:{widths[0]}}  {family:{widths[1]}}  {size:>{widths[2]}}  {here:{widths[3]}}  {about}")
    return 0


def list_families(options: FamiliesOptions) -> int:
    from martlet.model import families
    from martlet.runners.coverage import runners_for

    rows = []
    for name in families.names():
        page = families.get(name)
        spec = page.read(families.example(name))
        formats = ["safetensors"] + (["gguf"] if page.gguf is not None else [])
        rows.append({"family": name, "covers": page.about, "formats": formats, "runners": runners_for(spec)})
    if options.json:
        print(json.dumps(rows, indent=2, ensure_ascii=False))
        return 0
    cells = [("family", "formats", "runners", "covers")]
    cells += [(row["family"], ", ".join(row["formats"]), ", ".join(row["runners"]), row["covers"]) for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    for *columns, covers in cells:
        print("  ".join(f"{cell:{width}}" for cell, width in zip(columns, widths, strict=False)), covers, sep="  ")
    return 0


def show(options: ShowOptions) -> int:
    from martlet import hub

    entry = next((e for e in hub.registered() if options.name in (e.name, e.model_type)), None)
    facts = describe(entry) if entry is not None else dataclasses.asdict(hub.resolve(options.name, pull=False))
    if options.json:
        print(json.dumps(facts, indent=2, ensure_ascii=False, default=str))
        return 0
    width = max(map(len, facts))
    for key, value in facts.items():
        if value not in (None, "", (), 0) and not isinstance(value, dict):  # configs are for --json
            print(f"{key:{width}}  {', '.join(map(str, value)) if isinstance(value, (tuple, list)) else value}")
    return 0


def pull(options: NameOptions) -> int:
    from martlet import hub
    from martlet.cli.progress import download_bar

    with download_bar() as progress:
        card = hub.pull(options.name, progress)
    print(f"{card.name} is here: {card.path}", file=sys.stderr)
    return 0


def remove(options: NameOptions) -> int:
    from martlet import hub

    removed = hub.remove(options.name)
    if not removed:
        print(f"{options.name} is not on this machine", file=sys.stderr)
    for path in removed:
        print(f"removed {path}", file=sys.stderr)
    return 0


def describe(entry: Any) -> dict[str, Any]:
    """A registry entry as a dict, with whether and where the model is on this machine."""
    from martlet import hub

    path = hub.cached(entry.name)
    return {**entry._asdict(), "cached": path is not None, "path": str(path) if path else None}


COMMAND = CommandGroup(
    "List, show, fetch and remove models.",
    {
        "list": Command("Registered models, and which of them are on this machine.", ListOptions, list_models),
        "families": Command("Families of models that the native engine runs.", FamiliesOptions, list_families),
        "show": Command("All that is known about one model.", ShowOptions, show),
        "pull": Command("Fetch a model into the cache.", NameOptions, pull),
        "rm": Command("Remove a model from the cache.", NameOptions, remove),
    },
)
