"""Answers as text: tables, blocks of facts, and single values."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np


def table(header: Sequence[str], rows: Sequence[Sequence[object]], *, title: str = "") -> str:
    """A table; numbers to the right. A missing value is a dash."""
    cells = [[cell_text(cell) for cell in row] for row in rows]
    numeric = [
        all(isinstance(row[column], int | float) or row[column] is None for row in rows)
        for column in range(len(header))
    ]
    lines = [line.rstrip() for line in aligned([header, *cells], numeric)]
    return "\n".join([title, *lines] if title else lines)


def keyed_table(columns: Mapping[str, str], rows: Sequence[Mapping[str, Any]], *, title: str = "") -> str:
    """A table of records. columns: header -> key."""
    return table(list(columns), [[row.get(key) for key in columns.values()] for row in rows], title=title)


def aligned(rows: Sequence[Sequence[str]], right: Sequence[bool]) -> list[str]:
    """A line a row, its columns aligned. right: by column, whether to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            text.rjust(width) if to_right else text.ljust(width)
            for text, width, to_right in zip(row, widths, right, strict=True)
        )
        for row in rows
    ]


def plain(value: Any) -> Any:
    """A value as JSON has it: lists, dicts, and Python's numbers; what is not finite is None."""
    if isinstance(value, Mapping):
        return {str(key): plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [plain(each) for each in value]
    if isinstance(value, np.generic):
        value = value.item()
    return None if isinstance(value, float) and not math.isfinite(value) else value


def counted(number: int, what: str) -> str:
    """How many of what: "1 GPU", "2 GPUs"."""
    return f"{number:,} {what}{'s' * (number != 1)}"


def cell_text(value: object) -> str:
    """A value as tables and blocks show it; numbers with four significant digits."""
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    return str(value)


def facts_text(title: str, facts: Mapping[str, object]) -> str:
    """A block of names and values."""
    width = max(map(len, facts), default=0)
    return "\n".join([title, *(f"  {name:<{width}}  {cell_text(value)}" for name, value in facts.items())])
