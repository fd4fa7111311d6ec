"""How commands print an answer: as text, or as one JSON object where asked."""

from __future__ import annotations

import sys
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
        print(answer, *more, sep="\n")
    return answer.exit_code


def today() -> str:
    """The date, for a page."""
    return date.today().isoformat()


def print_json(document: Mapping[str, Any]) -> None:
    """The JSON object, alone on stdout."""
    sys.stdout.write(to_text(document))
