"""Vocabularies of byte-level BPE kept as the two files that the `tokenizers` library reads by itself.

The library takes a vocabulary of 49,152 tokens and as many merges from Python's strings in 55 ms, and from files of its
own in 40. So what came out of a GGUF file is kept in the user's cache, under a name that tells the file as it lies on
the disk now from any other. What does not read back as the same model is not kept; a digest tells damaged files, which
are made again.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tokenizers import models

from martlet.hub.cache import cache_dir
from martlet.hub.files import fingerprint

log = logging.getLogger("martlet")

SMALLEST = 10_000  # tokens: smaller vocabularies are read at once anyway
MOST = 16  # vocabularies that are kept, of 1 to 10 MB each; the least recently used goes first
FILES = ("vocab.json", "merges.txt")
DIGEST = "sha256"

Vocabulary = tuple[dict[str, int], list[tuple[str, ...]]]


def model_of(source: Path, tokens: int, read: Callable[[], Vocabulary], **settings: Any) -> models.BPE:
    """The model of `source`, a file with that many tokens; settings are the library's. read: vocabulary and merges.

    Raises what the library raises for merges that do not fit.
    """
    if tokens < SMALLEST:
        return models.BPE(*read(), **settings)
    folder = cache_dir() / "vocabularies" / fingerprint(source)[:32]
    with contextlib.suppress(Exception):  # not kept yet, or removed this moment, for which the library raises just that
        if (folder / DIGEST).read_text() == _digest(folder):
            os.utime(folder)  # used just now: last to be removed
            return _kept(folder, settings)
    vocabulary, merges = read()
    model = models.BPE(vocabulary, merges, **settings)
    try:
        _keep(folder, vocabulary, merges, model, settings)
    except OSError as error:
        log.info("the vocabulary is not kept: %s", error)
    return model


def _kept(folder: Path, settings: dict[str, Any]) -> models.BPE:
    return models.BPE.from_file(*(str(folder / name) for name in FILES), **settings)


def _digest(folder: Path) -> str:
    digest = hashlib.sha256()
    for name in FILES:
        digest.update((folder / name).read_bytes())
    return digest.hexdigest()


def _keep(
    folder: Path, vocabulary: dict[str, int], merges: list[tuple[str, ...]], model: models.BPE, settings: dict[str, Any]
) -> None:
    """Put the files into `folder`, in one step."""
    import shutil
    import tempfile

    folder.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(dir=folder.parent))
    try:
        texts = json.dumps(vocabulary, ensure_ascii=False), "".join(f"{' '.join(pair)}\n" for pair in merges)
        for name, text in zip(FILES, texts, strict=True):
            (scratch / name).write_text(text, encoding="utf-8", newline="")
        (scratch / DIGEST).write_text(_digest(scratch))
        if _same(scratch, model, settings):
            shutil.rmtree(folder, ignore_errors=True)
            os.rename(scratch, folder)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    oldest_last = sorted(folder.parent.iterdir(), key=lambda path: path.stat().st_mtime, reverse=True)
    for path in oldest_last[MOST:]:
        shutil.rmtree(path, ignore_errors=True)


def _same(folder: Path, model: models.BPE, settings: dict[str, Any]) -> bool:
    try:
        return _kept(folder, settings).__getstate__() == model.__getstate__()
    except Exception:  # the library raises bare Exception for lines that it cannot read
        return False
