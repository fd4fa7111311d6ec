"""Fields of a model's config.json, checked as they are read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from servecast.sim.inputs.errors import InputError

LARGEST = 1 << 40  # of any size


@dataclass(frozen=True, slots=True)
class ConfigFile:
    """The fields of a config, and where it lies, for messages."""

    config: Mapping[str, Any]
    where: str

    def count(self, *fields: str, default: int | None = None) -> int:
        """A positive whole number, under the first of ``fields`` that is there."""
        field = next((name for name in fields if self.config.get(name) is not None), fields[0])
        value = self.config.get(field, default)
        value = default if value is None else value
        if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= LARGEST:
            problem = "is missing" if value is None else f"is {short(value)}, not a positive integer"
            raise InputError(
                f"{field} {problem}",
                where=f"{self.where}: {field}",
                fix="Take the file from the model's repository.",
            )
        return value

    def amount(self, *fields: str, default: int = 0) -> int:
        """A whole number that may be 0 or missing."""
        value = next((self.config[name] for name in fields if self.config.get(name) is not None), None)
        return default if value in (None, 0, False) else self.count(*fields)

    def listed(self, field: str) -> list[Any]:
        """A list, empty where there is none."""
        value = self.config.get(field) or []
        if not isinstance(value, list):
            raise InputError(
                f"{field} is {short(value)}, not a list",
                where=f"{self.where}: {field}",
                fix="Take the file from the model's repository.",
            )
        return value

    def says(self, answer: bool | str, default: bool = False) -> bool:
        """A fact of the family, or of the file's field of that name."""
        return bool(self.config.get(answer, default)) if isinstance(answer, str) else answer


def short(value: object) -> str:
    """A value as text of at most 40 characters."""
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:37]}..."
