"""How commands print: rich on a terminal, plain text otherwise, and one JSON object where asked."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Protocol


def print_json(document: Mapping[str, Any]) -> None:
    """The JSON object, alone on stdout."""
    from servecast.sim.run.results import to_text

    sys.stdout.write(to_text(document))


def print_table(header: Sequence[str], rows: Sequence[Sequence[object]], *, title: str = "") -> None:
    """A table; numbers to the right. A missing value is a dash."""
    cells = [[cell_text(cell) for cell in row] for row in rows]
    numeric = [
        all(isinstance(row[column], int | float) or row[column] is None for row in rows)
        for column in range(len(header))
    ]
    if sys.stdout.isatty():
        from rich.console import Console
        from rich.table import Table

        table = Table(title=title or None, title_justify="left")
        for name, right in zip(header, numeric, strict=True):
            table.add_column(name, justify="right" if right else "left")
        for texts in cells:
            table.add_row(*texts)
        Console().print(table)
        return
    widths = [max(map(len, column)) for column in zip(header, *cells, strict=True)]
    if title:
        print(title)
    for texts in [list(header), *cells]:
        aligned = [
            text.rjust(width) if right else text.ljust(width)
            for text, width, right in zip(texts, widths, numeric, strict=True)
        ]
        print("  ".join(aligned).rstrip())


def cell_text(value: object) -> str:
    """A value as tables and blocks show it; numbers with four significant digits."""
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    return str(value)


def print_facts(title: str, facts: Mapping[str, object]) -> None:
    """A block of names and values."""
    print(f"\n{title}")
    width = max(map(len, facts), default=0)
    for name, value in facts.items():
        print(f"  {name:<{width}}  {cell_text(value)}")


class Advance(Protocol):
    """Moves a progress bar to a share (0..1) of the work, and says what is going on."""

    def __call__(self, share: float, text: str) -> None: ...


@contextmanager
def progress_bar(title: str) -> Iterator[Advance]:
    """A progress bar on stderr while that is a terminal; nothing otherwise."""
    if not sys.stderr.isatty():
        yield lambda share, text: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    columns = TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn()
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(title, total=1.0)

        def advance(share: float, text: str) -> None:
            bar.update(task, completed=share, description=f"{title}: {text}")

        yield advance
