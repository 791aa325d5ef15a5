"""Progress bars on stderr. Where stderr is no terminal nothing is drawn, so logs stay short."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)


@contextmanager
def download_bar() -> Iterator[Callable[[str, int, int | None], None]]:
    """A function (what, bytes done, bytes in all or None) that draws a bar for each `what`."""
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    bar = Progress(*columns, console=console, disable=not console.is_terminal, transient=True)
    tasks = {}

    def advance(what: str, done: int, total: int | None) -> None:
        bar.start()  # only now: most models are here already, and then the terminal is left alone
        if what not in tasks:
            tasks[what] = bar.add_task(what, total=total)
        bar.update(tasks[what], completed=done, total=total)

    try:
        yield advance
    finally:
        bar.stop()


@contextmanager
def row_bar(total: int, done: int) -> Iterator[Callable[[int], None]]:
    """A function to call with the number of new tokens whenever a row is finished."""
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
