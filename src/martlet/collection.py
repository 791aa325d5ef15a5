"""Starting without garbage collections."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator


@contextlib.contextmanager
def uncollected(*, freeze: bool = False) -> Iterator[None]:
    """Collect no garbage meanwhile. For starts, which import and read hundreds of thousands of objects and keep them:
    looking through these again and again took a twelfth of a start.

    freeze: nor look through them later, which takes 7 ms at once; for a process that keeps them to its end.
    """
    was = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if freeze:
            gc.freeze()
        if was:
            gc.enable()
