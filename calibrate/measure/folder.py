"""A folder of measurements: what machine it was (facts.json), and rows that are on disk once measured."""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TextIO, TypeVar

from .errors import MeasureError

SAME_MACHINE = ("gpu", "torch", "vllm")  # facts that rows of one folder share
Row = dict[str, Any]
Case = TypeVar("Case")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags that every measurement has."""
    parser.add_argument("--out", type=Path, required=True, help="folder for the measurements")
    parser.add_argument("--time-budget", type=float, metavar="S", help="stop cleanly after S seconds")
    parser.add_argument("--resume", action="store_true", help="go on in a folder, skipping what it has")


def say(text: str) -> None:
    """Tell whoever waits, apart from the answer."""
    print(text, file=sys.stderr, flush=True)


def walk(
    todo: Sequence[Case], budget: Budget, measure: Callable[[Case], str], expected_s: Callable[[Case], float]
) -> None:
    """Measure cases in their order while each would end in time.

    Args:
        measure: a case, and says its key. expected_s: how long one will probably take.
    """
    progress = Progress(len(todo), budget)
    for index, case in enumerate(todo):
        if not budget.fits(expected_s(case)):
            say(f"the time budget is spent: {index} of {len(todo)} cases measured; --resume goes on")
            return
        progress.done(measure(case))


def read_rows(file: Path, *, warn: Callable[[str], None] = say) -> list[Row]:
    """The rows of a JSONL file, without a last line that was cut off while it was written.

    Args:
        warn: told that a line was dropped.

    Raises:
        MeasureError: another line is no JSON object with "row" and "case".
    """
    try:
        lines = file.read_bytes().split(b"\n")
    except OSError as error:
        raise MeasureError(
            f"cannot be read: {error.strerror}", str(file), "Give a folder that `measure` wrote."
        ) from error
    rows, last = [], len(lines) - 1  # what follows the last newline was cut off, or is empty
    for number, line in enumerate(lines):
        if number == last:
            if line.strip():
                warn(f"{file}: line {number + 1} was cut off while it was written; dropped")
            continue
        try:
            row = json.loads(line)
            if not isinstance(row, dict) or not {"row", "case"} <= row.keys():
                raise ValueError("no object with 'row' and 'case'")
        except ValueError as error:
            fix = "Remove that line, or measure into a new folder."
            raise MeasureError(f"line {number + 1} is no measured row ({error})", str(file), fix) from error
        rows.append(row)
    return rows


class Folder:
    """The measurements of one machine. A context manager: leaving it closes the rows' file.

    Args:
        path: made if it is not there.
        file: name of the rows' file, "engine.jsonl" or "kernels.jsonl".
        facts: of this machine (see facts.collect).
        resume: go on where an earlier run stopped, skipping its cases; without it, rows there are refused.

    Attributes:
        rows: that an earlier run left. cases: keys of all rows that are there.

    Raises:
        MeasureError: the folder is another machine's, or has rows and ``resume`` is not given.
    """

    def __init__(self, path: Path, file: str, facts: Row, *, resume: bool = False) -> None:
        self.path, self._rows_file = path, path / file
        try:
            path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise MeasureError(
                f"cannot be made: {error.strerror}", f"--out {path}", "Name a folder that can be written."
            ) from error
        self._check_facts(facts)
        rows = read_rows(self._rows_file) if self._rows_file.exists() else []
        if rows and not resume:
            fix = "Give --resume to go on, or a new --out."
            raise MeasureError(f"has {len(rows)} rows already", str(self._rows_file), fix)
        self.rows, self.cases = rows, {str(row["case"]) for row in rows}
        self._facts = facts
        self._file: TextIO | None = None

    def _check_facts(self, facts: Row) -> None:
        file = self.path / "facts.json"
        if not file.exists():
            return
        known = read_facts(self.path)
        for name in SAME_MACHINE:
            if known.get(name) != facts.get(name):
                raise MeasureError(
                    f"was measured with {name} {known.get(name)!r}, this machine has {facts.get(name)!r}",
                    str(file),
                    "Give another --out: one folder holds one machine's measurements.",
                )

    def add(self, *rows: Row) -> None:
        """Append rows; they are on disk when this returns. Nothing is written before the first."""
        if self._file is None:
            self._file = self._open()
        at = {"at": round(time.time(), 3)}
        self._file.write("".join(json.dumps(row | at, separators=(",", ":")) + "\n" for row in rows))
        self._file.flush()
        os.fsync(self._file.fileno())
        self.cases.update(str(row["case"]) for row in rows)

    def _open(self) -> TextIO:
        facts = self.path / "facts.json"
        if not facts.exists():
            part = facts.with_name(facts.name + ".part")
            part.write_text(json.dumps(self._facts, indent=1) + "\n", encoding="utf-8")
            part.replace(facts)
        if self._rows_file.exists():
            _drop_cut_off_line(self._rows_file)
        return self._rows_file.open("a", encoding="utf-8")

    def __enter__(self) -> Folder:
        return self

    def __exit__(self, *_error: object) -> None:
        if self._file is not None:
            self._file.close()


def read_facts(folder: Path) -> Row:
    """facts.json of a folder of measurements.

    Raises:
        MeasureError: it is not there or not such a file.
    """
    file = folder / "facts.json"
    try:
        facts = json.loads(file.read_text(encoding="utf-8"))
        if facts["schema_version"] != 1:
            raise ValueError(f"schema_version {facts['schema_version']!r}, not 1")
    except OSError as error:
        raise MeasureError(
            f"cannot be read: {error.strerror}", str(file), "Give a folder that `measure` wrote."
        ) from error
    except (ValueError, KeyError, TypeError) as error:
        raise MeasureError(f"is not the facts of a machine ({error})", str(file), "Measure again.") from error
    return dict(facts)


def _drop_cut_off_line(file: Path) -> None:
    """Cut the file after its last newline, so that the next row starts a line of its own."""
    content = file.read_bytes()
    whole = content.rfind(b"\n") + 1
    if whole < len(content):
        os.truncate(file, whole)


class Budget:
    """A limit on wall time, in seconds; None is no limit. It runs from when it is made."""

    def __init__(self, seconds: float | None, clock: Callable[[], float] = time.monotonic) -> None:
        if seconds is not None and not 0 < seconds < math.inf:
            raise MeasureError(f"{seconds} is no time", "--time-budget", "Give seconds above 0.")
        self._clock, self._start = clock, clock()
        self._seconds = math.inf if seconds is None else seconds

    @property
    def spent_s(self) -> float:
        return self._clock() - self._start

    @property
    def left_s(self) -> float:
        """Infinite without a limit; negative when it is over."""
        return self._seconds - self.spent_s

    def fits(self, seconds: float) -> bool:
        """Whether something that takes this long would end in time."""
        return seconds <= self.left_s


class Progress:
    """A line on stderr: cases done, and the time left. Rewritten on a terminal, else one every 5 s.

    Args:
        total: cases to do. budget: of the whole run.
    """

    EVERY_S = 5.0

    def __init__(self, total: int, budget: Budget, stream: TextIO | None = None) -> None:
        self._total, self._budget, self._done = total, budget, 0
        self._began = budget.spent_s
        self._stream = sys.stderr if stream is None else stream
        self._shown = -math.inf

    @property
    def left_s(self) -> float:
        """Expected time to the end of all cases, at the mean pace so far, and at most what the budget has."""
        if not self._done:
            return self._budget.left_s
        pace = (self._budget.spent_s - self._began) / self._done
        return min(pace * (self._total - self._done), self._budget.left_s)

    def done(self, case: str) -> None:
        """One more case is done."""
        self._done += 1
        now, last = self._budget.spent_s, self._done == self._total
        terminal = self._stream.isatty()
        if not terminal and not last and now - self._shown < self.EVERY_S:
            return
        self._shown = now
        text = f"{self._done}/{self._total} measured, about {_duration(self.left_s)} left: {case}"
        self._stream.write(f"\r\x1b[K{text}" + ("\n" if last else "") if terminal else text + "\n")
        self._stream.flush()


def _duration(seconds: float) -> str:
    if seconds == math.inf:
        return "an unknown time"
    seconds = max(0, round(seconds))
    return f"{seconds} s" if seconds < 120 else f"{round(seconds / 60)} min"
