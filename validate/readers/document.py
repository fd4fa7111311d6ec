"""The values that a JSON, JSONL or YAML file holds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml

from servecast.sim.inputs.errors import InputError


def values_of(path: Path) -> list[Any]:
    """One JSON value, or one a line; YAML's one value by the file's ending.

    Raises:
        InputError: it cannot be read, is empty, or not what its ending says.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(
            f"cannot be read: {error}", where=str(path), fix="Give a result's JSON, JSONL or YAML file."
        ) from None
    if not text.strip():
        raise InputError("is empty", where=str(path), fix="Give a result's JSON, JSONL or YAML file.")
    if path.suffix in (".yaml", ".yml"):
        try:
            return [yaml.safe_load(text)]
        except Exception as error:  # besides its own, what int(), date() and the like raise on a scalar
            raise InputError(f"is not YAML: {error}", where=str(path), fix="Save it again.") from None
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
