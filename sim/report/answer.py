"""What every question is answered with: an object that the command prints, and a notebook shows."""

from __future__ import annotations

import html
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any

from servecast.sim.report.page import write_plain_page


class Answer(ABC):
    """The answer to a question: print it, take its parts, or write it as a page.

    ``print(answer)`` prints what the command of the question prints, and ``to_json`` returns what it prints
    with ``--json``. In a notebook an answer shows its text.
    """

    @property
    def exit_code(self) -> int:
        """What the command ends with. 0: good; 1: the verdict is a fail; 3: inconclusive."""
        return 0

    @abstractmethod
    def to_text(self) -> str:
        """For people."""

    @abstractmethod
    def to_json(self) -> dict[str, Any]:
        """For programs: plain values, as the command prints them with ``--json``."""

    def to_html(self, path: Path | str) -> Path:
        """Write a page, a single file that needs no network, and return its path.

        Raises:
            InputError: the file cannot be written.
        """
        title = f"servecast: {type(self).__name__.lower()}"
        return write_plain_page(path, title=title, text=self.to_text())

    def __str__(self) -> str:
        return self.to_text()

    def __repr__(self) -> str:
        return self.to_text()

    def _repr_html_(self) -> str:
        return f"<pre>{html.escape(self.to_text())}</pre>"
