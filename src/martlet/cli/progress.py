"""Progress bars on stderr. Where stderr is no terminal nothing is drawn, so logs stay short.

Rich takes as long to import as a model takes to load, so it is imported when there is something to draw.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.progress import Progress


@contextmanager
def download_bar() -> Iterator[Callable[[str, int, int | None], None]]:
    """A function (what, bytes done, bytes in all or None) that draws a bar for each `what`."""
    with ExitStack() as shown:
        bar, tasks = None, {}

        def advance(what: str, done: int, total: int | None) -> None:
            nonlocal bar
            bar = bar or shown.enter_context(_downloads())  # only now: most models are here already
            if what not in tasks:
                tasks[what] = bar.add_task(what, total=total)
            bar.update(tasks[what], completed=done, total=total)

        yield advance


def _downloads() -> Progress:
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    return Progress(*columns, console=console, disable=not console.is_terminal, transient=True)


@contextmanager
def layer_bar(what: str) -> Iterator[Callable[[int, int], None]]:
    """A function (layers done, layers in all) that draws a bar from its first call on."""
    with ExitStack() as shown:
        bar = task = None

        def advance(done: int, total: int) -> None:
            nonlocal bar, task
            if bar is None:
                from rich.console import Console
                from rich.progress import Progress

                console = Console(stderr=True)
                bar = shown.enter_context(Progress(console=console, disable=not console.is_terminal, transient=True))
                task = bar.add_task(what, total=total)
            bar.update(task, completed=done)

        yield advance


@contextmanager
def row_bar(total: int, done: int) -> Iterator[Callable[[int], None]]:
    """A function to call with the number of new tokens whenever a row is finished."""
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    console = Console(stderr=True)
    columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[rate]}"))
    with Progress(
        *columns, TimeElapsedColumn(), TimeRemainingColumn(), console=console, disable=not console.is_terminal
    ) as bar:
        task = bar.add_task("", total=total, completed=done, rate="")
        tokens = 0

        def advance(new_tokens: int) -> None:
            nonlocal tokens
            tokens += new_tokens
            bar.update(task, advance=1, rate=f"{tokens / (bar.tasks[task].elapsed or 1e-9):.1f} tok/s")

        yield advance
