"""A plugin's parameters, as its JSON reader takes them."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from servecast.sim.inputs.errors import InputError


class Parameters:
    """Names and values; null is as if it were not written.

    Args:
        place: the file and the path of the parameters in it, for messages.
    """

    def __init__(self, values: Any, place: str) -> None:
        if not isinstance(values, Mapping):
            raise InputError("parameters are not a mapping", where=place, fix="Write names and values.")
        self._values, self._place = values, place

    def paths(self) -> Iterator[str]:
        """Dotted paths of all values that are written; a list is one value."""
        for name, value in self._values.items():
            if isinstance(value, Mapping):
                yield from (f"{name}.{path}" for path in Parameters(value, self.where(name)).paths())
            elif value is not None:
                yield str(name)

    def where(self, path: str) -> str:
        """The place of a parameter, for messages."""
        return f"{self._place}.{path}"

    def error(self, what: str, path: str, fix: str) -> InputError:
        """An error about a parameter."""
        return InputError(what, where=self.where(path), fix=fix)

    def block(self, name: str) -> Parameters:
        """Parameters under a name; empty where it is absent."""
        return Parameters(self._get(name, {}), self.where(name))

    def whole(self, name: str, default: int) -> int:
        """A whole number; the default also in place of 0 and below, as the plugins have it."""
        value = self.amount(name, default)
        return value if value > 0 else default

    def amount(self, name: str, default: int) -> int:
        """A whole number."""
        value = self._get(name, default)
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if isinstance(value, bool) or not isinstance(value, int):
            raise self._wrong(name, value, "a whole number")
        return value

    def number(self, name: str, default: float, *, low: float = 0.0, high: float = float("inf")) -> float:
        """A number of a range, its ends included."""
        value = self._get(name, default)
        if (
            isinstance(value, bool)
            or not isinstance(value, int | float)
            or not low <= value <= high
            or value == float("inf")
        ):
            limits = f"from {low:g} on" if high == float("inf") else f"from {low:g} to {high:g}"
            raise self._wrong(name, value, f"a number {limits}")
        return float(value)

    def flag(self, name: str, default: bool) -> bool:
        """True or false."""
        value = self._get(name, default)
        if not isinstance(value, bool):
            raise self._wrong(name, value, "true or false")
        return value

    def text(self, name: str, default: str) -> str:
        """Text."""
        value = self._get(name, default)
        if not isinstance(value, str):
            raise self._wrong(name, value, "text")
        return value

    def texts(self, name: str) -> list[str]:
        """A list of text; empty where it is absent."""
        value = self._get(name, [])
        if not isinstance(value, list) or not all(isinstance(each, str) for each in value):
            raise self._wrong(name, value, "a list of text")
        return list(value)

    def blocks(self, name: str) -> list[Parameters]:
        """A list of parameters; empty where it is absent."""
        value = self._get(name, [])
        if not isinstance(value, list):
            raise self._wrong(name, value, "a list")
        return [Parameters(each, self.where(f"{name}.{number}")) for number, each in enumerate(value)]

    def duration_s(self, name: str, default: str) -> float:
        """A duration in Go's form ("2m", "1m30s", "500ms"), in seconds."""
        text = self.text(name, default)
        units = {"h": 3600.0, "m": 60.0, "s": 1.0, "ms": 1e-3, "us": 1e-6, "ns": 1e-9}
        parts = re.findall(r"(\d+(?:\.\d+)?)(h|ms|us|ns|m|s)", text)
        if not parts or "".join(number + unit for number, unit in parts) != text:
            raise self._wrong(name, text, "a duration such as 2m or 1m30s")
        return sum(float(number) * units[unit] for number, unit in parts)

    def _get(self, name: str, default: Any) -> Any:
        value = self._values.get(name)
        return default if value is None else value

    def _wrong(self, name: str, value: Any, expected: str) -> InputError:
        return self.error(f"{name} is not {expected}: {value!r}", name, "Correct it.")
