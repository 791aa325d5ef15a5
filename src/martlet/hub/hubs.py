"""Models from Hugging Face and ModelScope, through their own libraries and into their own caches.

The libraries are imported only to fetch. Pickled weights (*.bin, *.pt, *.pth) are never asked for.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable
from pathlib import Path

from martlet.errors import DownloadError
from martlet.hub.cache import Progress
from martlet.hub.files import missing_weights

ALLOW = (
    "*.safetensors",
    "*.json",
    "*.jinja",
    "*.model",
    "*.tiktoken",
    "tokenizer*",
    "vocab*",
    "merges*",
    "LICENSE*",
    "NOTICE*",
)
LIBRARIES = {"hf": "huggingface_hub", "modelscope": "modelscope"}
EXTRAS = {"hf": "martlet[hf]", "modelscope": "martlet[modelscope]"}


def installed(hub: str) -> bool:
    return importlib.util.find_spec(LIBRARIES[hub]) is not None


def fetch(hub: str, repo: str, revision: str | None, progress: Progress | None) -> Path:
    """Bring a repository's safetensors, configs and tokenizer here; returns the folder.

    DownloadError, with the remedy, when the library is missing, the hub unreachable, or the repository unknown.
    """
    if not installed(hub):
        raise DownloadError(f"{hub}:{repo} needs the {LIBRARIES[hub]} library: pip install '{EXTRAS[hub]}'")
    if progress:
        progress(f"fetch {hub}:{repo}", 0, None)
    try:
        folder = _SNAPSHOT[hub](repo, revision)
    except Exception as error:  # each library has its own zoo of network and HTTP errors
        raise DownloadError(
            f"{hub}:{repo} could not be fetched ({type(error).__name__}: {_first_line(error)}). Check the name and the "
            "network, and log in if the model is gated; or give the path of a folder that holds it"
        ) from error
    if missing := missing_weights(folder):
        raise DownloadError(
            f"{hub}:{repo} came without {', '.join(missing)}: the repository has no safetensors weights, and pickled "
            "ones are never fetched. Convert it elsewhere and give the folder's path"
        )
    return folder


def cached(hub: str, repo: str, revision: str | None = None) -> Path | None:
    """The complete local copy of a repository, found without importing the library or asking the network."""
    for folder in _candidates(hub, repo, revision):
        if (folder / "config.json").is_file() and not missing_weights(folder):
            return folder
    return None


def _snapshot_hf(repo: str, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(repo, revision=revision, allow_patterns=list(ALLOW)))


def _snapshot_modelscope(repo: str, revision: str | None) -> Path:
    from modelscope import snapshot_download

    return Path(snapshot_download(repo, revision=revision, allow_patterns=list(ALLOW)))


_SNAPSHOT: dict[str, Callable[[str, str | None], Path]] = {"hf": _snapshot_hf, "modelscope": _snapshot_modelscope}


def _candidates(hub: str, repo: str, revision: str | None) -> list[Path]:
    """Folders where the libraries keep a repository. Source: their documentation of the cache layout."""
    home = Path.home() / ".cache"
    if hub == "hf":
        root = Path(os.environ.get("HF_HOME") or Path(os.environ.get("XDG_CACHE_HOME") or home) / "huggingface")
        base = Path(os.environ.get("HF_HUB_CACHE") or root / "hub") / f"models--{repo.replace('/', '--')}"
        reference = base / "refs" / (revision or "main")
        commit = reference.read_text().strip() if reference.is_file() else revision
        return [base / "snapshots" / commit] if commit else []
    root = Path(os.environ.get("MODELSCOPE_CACHE") or home / "modelscope")
    if revision not in (None, "master"):
        return []  # the folder does not tell which revision it holds
    spelled = repo.replace(".", "___")
    return [root / middle / name for middle in ("hub/models", "models", "hub", "") for name in (repo, spelled)]


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else "no message"
