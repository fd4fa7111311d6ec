"""A progress bar, where somebody is there to see it."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn


class Advance(Protocol):
    """Moves a progress bar to a share (0..1) of the work, and says what is going on."""

    def __call__(self, share: float, text: str) -> None: ...


@contextmanager
def progress_bar(title: str, *, shown: bool) -> Iterator[Advance]:
    """A bar on stderr if that is a terminal, otherwise (in a notebook) a line that is written anew."""
    if not shown:
        yield lambda share, text: None
        return
    if not sys.stderr.isatty():
        yield lambda share, text: print(f"\r{title}: {share:4.0%} {text:60}", end="", file=sys.stderr)
        print(f"\r{' ' * (len(title) + 67)}\r", end="", file=sys.stderr)
        return
    left = TimeRemainingColumn(compact=True, elapsed_when_finished=True)
    columns = TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), TextColumn("left"), left
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(title, total=1.0)

        def advance(share: float, text: str) -> None:
            bar.update(task, completed=share, description=f"{title}: {text}")

        yield advance
