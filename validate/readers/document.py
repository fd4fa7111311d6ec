"""The values that a JSON, JSONL, YAML or CSV file holds."""

from __future__ import annotations

import csv
import json
import math
from pathlib import Path
from typing import Any

import yaml

from servecast.sim.inputs.errors import InputError
from servecast.sim.inputs.files import read_text


def values_of(path: Path) -> list[Any]:
    """One JSON value, or one a line; YAML's one value by the file's ending, and an object a row of CSV.

    Raises:
        InputError: it cannot be read, is empty, or not what its ending says.
    """
    fix = "Give a result's JSON, JSONL or YAML file."
    text = read_text(path, fix=fix)
    if not text.strip():
        raise InputError("is empty", where=str(path), fix=fix)
    if path.suffix in (".yaml", ".yml"):
        try:
            return [yaml.safe_load(text)]
        except Exception as error:  # besides its own, what int(), date() and the like raise on a scalar
            raise InputError(f"is not YAML: {error}", where=str(path), fix="Save it again.") from None
    if path.suffix == ".csv":
        return _rows(text, path)
    try:
        return [json.loads(text)]
    except ValueError as whole:
        lines = [(number, line) for number, line in enumerate(text.splitlines(), start=1) if line.strip()]
        values = []
        for number, line in lines:
            try:
                values.append(json.loads(line))
            except ValueError as error:
                several = bool(values)
                raise InputError(
                    f"is not valid JSON ({error if several else whole})",
                    where=f"{path}, line {number}" if several else str(path),
                    fix="Is the file cut off? Save it again with the tool.",
                ) from None
        return values


_OF_VLLM = {"completed", "duration", "request_throughput"}


def is_csv_of_vllm(path: Path) -> bool:
    """Whether a CSV file is the summary of vllm bench sweep: a row a run, a column a key of its result."""
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            return set(next(csv.reader(file), [])) >= _OF_VLLM
    except (OSError, UnicodeDecodeError, csv.Error):
        return False


def _rows(text: str, path: Path) -> list[Any]:
    """A value a row: numbers where they are, without what is empty or a list."""
    try:
        rows = list(csv.DictReader(text.removeprefix("\ufeff").splitlines(keepends=True)))
    except csv.Error as error:
        raise InputError(f"is not CSV: {error}", where=str(path), fix="Save it again.") from None
    if not rows:
        raise InputError("has no rows", where=str(path), fix="Was the run broken off?")
    return [
        {
            key: _cell(cell)
            for key, cell in row.items()
            if key and isinstance(cell, str) and cell and not cell.startswith(("[", "{"))
        }
        for row in rows
    ]


def _cell(text: str) -> float | int | str:
    """A number, whole where it is (pandas writes a column with gaps as 8.0), or the text itself."""
    try:
        number = float(text)
    except ValueError:
        return text
    if number in (math.inf, -math.inf) or number != number:
        return text
    return int(number) if number.is_integer() and abs(number) < 2**53 else number
