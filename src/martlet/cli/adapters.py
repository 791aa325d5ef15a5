"""Flags for LoRA adapters, and what they mean together: which model, which adapters beside it or merged into it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from martlet.cli.flags import flag
from martlet.errors import ModelNotFound, UsageError

if TYPE_CHECKING:
    from martlet.cli.options import ModelFlags
    from martlet.runners.base import LoadOptions

DEFAULT_NAME = "default-lora"  # SWIFT's name for the adapter of --ckpt_dir
SLOTS = 16  # adapters in a batch, where adapters are served and nothing is said


@dataclass(frozen=True)
class AdapterFlags:
    """Adapters."""

    ckpt_dir: str | None = flag(
        f"a checkpoint of SWIFT: a whole model, or a LoRA adapter that is served as {DEFAULT_NAME} beside its base",
        None,
        metavar="DIR",
    )
    adapters: tuple[str, ...] = flag(
        "LoRA adapters (PEFT folders) that requests choose by name; without NAME= the folder's name is it",
        (),
        metavar="NAME=DIR",
        aliases=("lora_modules", "vllm_lora_modules"),
    )
    merge_lora: bool = flag("merge the adapter into the weights while they are read, and serve that alone", False)
    enable_lora: bool = flag("room for adapters that come later", False, aliases=("vllm_enable_lora",))
    max_loras: int | None = flag(
        f"adapters that one batch may mix (default: {SLOTS} where adapters are served, else none)", None
    )
    max_lora_rank: int | None = flag(
        "largest rank of an adapter (default: 64, or that of --adapters)", None, aliases=("vllm_max_lora_rank",)
    )


@dataclass(frozen=True, slots=True)
class Chosen:
    """model, model_type: what to resolve, None where no flag and no adapter says. beside: name -> folder."""

    model: str | None
    model_type: str | None
    beside: Mapping[str, str] = field(default_factory=dict)
    merge: Path | None = None


def choose(model: ModelFlags, flags: AdapterFlags) -> Chosen:
    """What the flags ask for. Raises UsageError where they contradict each other."""
    name, model_type = model.model or model.model_id_or_path, model.model_type
    if flags.ckpt_dir is None and not flags.adapters and not flags.merge_lora:
        return Chosen(name, model_type)
    from martlet.hub import peft

    beside: dict[str, str] = {}
    if flags.ckpt_dir is not None:
        if peft.folder_of(flags.ckpt_dir) is not None:
            beside[DEFAULT_NAME] = flags.ckpt_dir
        elif flags.merge_lora:
            raise UsageError(f"--merge_lora true: --ckpt_dir {flags.ckpt_dir} is no adapter", param="merge_lora")
        elif name is not None:
            raise UsageError(
                f"--ckpt_dir {flags.ckpt_dir} is a whole model, and the model is said to be {name}; give one of them",
                param="ckpt_dir",
            )
        else:
            if not Path(flags.ckpt_dir).expanduser().is_dir():
                raise UsageError(f"--ckpt_dir: there is no folder {flags.ckpt_dir}", param="ckpt_dir")
            name = str(Path(flags.ckpt_dir).expanduser())
            model_type = model_type or _registered(peft.origin(name).model_type)
    for given in flags.adapters:
        key, equals, path = given.partition("=")
        key, path = (key, path) if equals else (Path(given).name, given)
        if not key or not path:
            raise UsageError(f"--adapters takes NAME=DIR or DIR, not {given!r}", param="adapters")
        if key in beside:
            raise UsageError(f"--adapters: two adapters are called {key}", param="adapters")
        beside[key] = path
    for path in beside.values():
        peft.find(path)
    if name is None and model_type is None and beside:
        name, model_type = _base(next(iter(beside.values())))
    if not flags.merge_lora:
        return Chosen(name, model_type, beside)
    if len(beside) != 1:
        raise UsageError(
            f"--merge_lora true merges one adapter: {', '.join(beside) or 'none is given'}", param="merge_lora"
        )
    return Chosen(name, model_type, merge=Path(*beside.values()).expanduser())


def _base(adapter: str) -> tuple[str | None, str | None]:
    """(model, model type) that an adapter says it was trained on."""
    from martlet.hub import peft, registry

    origin = peft.origin(adapter)
    model_type = _registered(origin.model_type)
    if origin.base and (Path(origin.base).expanduser().exists() or registry.find(origin.base)):
        return origin.base, model_type
    if model_type or not origin.base:
        return None, model_type
    raise ModelNotFound(
        f"adapter {adapter} was trained on {origin.base}, which is neither registered nor a folder here; say with "
        "--model where it is",
        param="model",
    )


def _registered(model_type: str | None) -> str | None:
    from martlet.hub import registry

    return model_type if model_type and registry.find(model_type) else None


def with_slots(load: LoadOptions, flags: AdapterFlags, chosen: Chosen, *, more_may_come: bool = False) -> LoadOptions:
    """Load options with room for the adapters that are asked for."""
    for name in ("max_loras", "max_lora_rank"):
        value = getattr(flags, name)
        if value is not None and value < (name == "max_lora_rank"):
            raise UsageError(f"--{name} must be at least {int(name == 'max_lora_rank')}, got {value}", param=name)
    wanted = flags.enable_lora or more_may_come or bool(chosen.beside)
    slots = flags.max_loras if flags.max_loras is not None else SLOTS * wanted
    if chosen.beside and not slots:
        raise UsageError("--max_loras 0 leaves no room for the adapters that are given", param="max_loras")
    rank = flags.max_lora_rank
    if rank is None and chosen.beside:
        from martlet.hub import peft

        ranks = [peft.rank_of(path) for path in chosen.beside.values()]
        rank = max([load.max_lora_rank, *ranks])
    return replace(load, max_adapters=slots, max_lora_rank=load.max_lora_rank if rank is None else rank)
