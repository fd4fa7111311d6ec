"""How commands print an answer: as text, or as one JSON object where asked."""

from __future__ import annotations

import shutil
import sys
import textwrap
from collections.abc import Mapping, Sequence
from datetime import date
from typing import Any

from servecast.sim.report.answer import Answer
from servecast.sim.run.results import to_text


def show(answer: Answer, *, json: bool, more: Sequence[str] = ()) -> int:
    """Print an answer and return its exit code. more: lines to print below its text."""
    if json:
        print_json(answer.to_json())
    else:
        print_text(str(answer), *more)
    return answer.exit_code


def print_text(*parts: str) -> None:
    """Text, on a terminal folded to its width."""
    lines = [line for part in parts for line in part.splitlines()]
    if sys.stdout.isatty():
        width = max(shutil.get_terminal_size().columns, 40)
        folded = [
            textwrap.wrap(line, width, subsequent_indent="    ", break_on_hyphens=False) for line in lines
        ]
        lines = [each for line, short in zip(lines, folded, strict=True) for each in (short or [line])]
    print(*lines, sep="\n")


def today() -> str:
    """The date, for a page."""
    return date.today().isoformat()


def print_json(document: Mapping[str, Any]) -> None:
    """The JSON object, alone on stdout."""
    sys.stdout.write(to_text(document))
