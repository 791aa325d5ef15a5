"""Every error a user can cause. One root, mapped once to an exit code (cli) and once to an HTTP status (server).

A message says what was asked, what was found and what would work. `param` names the flag or request field at fault.
"""

from __future__ import annotations

from collections.abc import Iterable


class MartletError(Exception):
    """Root of all errors that are somebody's input or environment, not a bug. Shown without a traceback."""

    exit_code = 1
    http_status = 500

    def __init__(self, message: str, *, param: str | None = None):
        super().__init__(message)
        self.message = message
        self.param = param


class UsageError(MartletError):
    """A flag or a call is wrong."""

    exit_code = 2
    http_status = 400


class InvalidRequest(MartletError):
    """A generation request that can never be served: wrong type or range, prompt too long, empty messages."""

    exit_code = 2
    http_status = 400


class ModelNotFound(MartletError):
    """No model of that name, path or repository."""

    exit_code = 3
    http_status = 404


class CheckpointError(MartletError):
    """A weight file is missing, truncated, corrupt or of an unknown layout. Names the file and the tensor."""

    exit_code = 4


class DownloadError(MartletError):
    """A model could not be fetched: offline, no disk space, wrong checksum, missing library."""

    exit_code = 5


class BackendUnavailable(MartletError):
    """The asked-for backend, device or library is not here. Says what to install."""

    exit_code = 6


class OutOfMemory(MartletError):
    """The model or its cache does not fit. Gives the numbers and the flag value that would."""

    exit_code = 7


class Overloaded(MartletError):
    """Too many requests are queued; try again later."""

    http_status = 429


def did_you_mean(word: str, known: Iterable[str], *, count: int = 3) -> str:
    """' Did you mean a, b?' for the names nearest to `word`, or '' when none is near."""
    import difflib

    near = difflib.get_close_matches(word[:200], list(known), n=count, cutoff=0.5)
    return f" Did you mean {', '.join(near)}?" if near else ""
