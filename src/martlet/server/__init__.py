"""HTTP: the OpenAI API over any backend. The only room that knows HTTP."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from martlet.server.options import ServerOptions

if TYPE_CHECKING:
    from martlet.server.app import create_app
    from martlet.server.deploy import run, serve

__all__ = ["ServerOptions", "create_app", "run", "serve"]

_LAZY = {"create_app": "martlet.server.app", "run": "martlet.server.deploy", "serve": "martlet.server.deploy"}


def __getattr__(name: str):
    # FastAPI costs a third of a second to import; a command line that only wants ServerOptions need not pay it.
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'martlet.server' has no attribute {name!r}")
