"""Prompt and output lengths: distributions over whole tokens."""

from __future__ import annotations

import csv
import math
from typing import Annotated, Any, Literal

import numpy as np
import numpy.typing as npt
from pydantic import Discriminator, Field, GetJsonSchemaHandler, Tag, model_validator
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema

from servecast.sim.inputs.errors import InputError
from servecast.sim.inputs.schema import Count, InputFile, Model, NonNegative, Positive, invalid

Tokens = npt.NDArray[np.int64]


class Fixed(Model):
    """Always the same length; ``prompt_tokens: 256`` is short for it."""

    kind: Literal["fixed"] = "fixed"
    tokens: Count
    """The length."""

    @model_validator(mode="before")
    @classmethod
    def _from_number(cls, data: Any) -> Any:
        return data if isinstance(data, dict) else {"kind": "fixed", "tokens": data}

    @classmethod
    def __get_pydantic_json_schema__(cls, core: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        return {"anyOf": [{"type": "integer", "minimum": 1}, handler(core)]}

    def draw(self, n: int, rng: np.random.Generator) -> Tokens:
        """``n`` lengths."""
        return np.full(n, self.tokens, dtype=np.int64)


class Uniform(Model):
    """Whole numbers from floor(tokens (1 - r)) to ceil(tokens (1 + r)), both included, at least 1: the rule
    of vLLM's random dataset with ``--random-range-ratio r``."""

    kind: Literal["uniform"]
    tokens: Count
    """The middle."""
    range_ratio: Annotated[NonNegative, Field(lt=1)] = 0.0
    """Half the width, as a share of it."""

    def draw(self, n: int, rng: np.random.Generator) -> Tokens:
        """``n`` lengths."""
        low = max(1, math.floor(self.tokens * (1 - self.range_ratio)))
        high = math.ceil(self.tokens * (1 + self.range_ratio))
        return rng.integers(low, high + 1, size=n)


class Lognormal(Model):
    """Rounded lognormal lengths, given by ``mean`` and ``std``, or by ``median`` and ``sigma``."""

    kind: Literal["lognormal"]
    mean: Positive | None = None
    """Mean length."""
    std: Positive | None = None
    """Standard deviation of the length."""
    median: Positive | None = None
    """Median length."""
    sigma: Positive | None = None
    """Standard deviation of the length's logarithm."""
    min_tokens: Count = 1
    """Shortest; draws below it are set to it."""
    max_tokens: Count | None = None
    """Longest; draws above it are set to it."""

    @model_validator(mode="after")
    def _one_form(self) -> Lognormal:
        given = {name for name in ("mean", "std", "median", "sigma") if getattr(self, name) is not None}
        if given not in ({"mean", "std"}, {"median", "sigma"}):
            raise invalid(
                f"a lognormal length with {', '.join(sorted(given)) or 'no parameters'}",
                "Give mean and std, or median and sigma.",
            )
        if self.max_tokens is not None and self.max_tokens < self.min_tokens:
            raise invalid(
                f"max_tokens {self.max_tokens} is below min_tokens {self.min_tokens}", "Swap or correct them."
            )
        return self

    def draw(self, n: int, rng: np.random.Generator) -> Tokens:
        """``n`` lengths."""
        if self.mean is not None and self.std is not None:
            variance = math.log1p((self.std / self.mean) ** 2)
            mu, sigma = math.log(self.mean) - variance / 2, math.sqrt(variance)
        else:
            assert self.median is not None
            assert self.sigma is not None
            mu, sigma = math.log(self.median), self.sigma
        lengths = np.rint(np.exp(mu + sigma * rng.standard_normal(n)))
        return np.clip(lengths, self.min_tokens, self.max_tokens or 2**53).astype(np.int64)


class Empirical(Model):
    """Drawn with replacement from ``values``, or from a ``column`` of a CSV file."""

    kind: Literal["empirical"]
    values: tuple[Count, ...] | None = None
    """Lengths to draw from."""
    weights: tuple[NonNegative, ...] | None = None
    """How often each of them counts."""
    path: InputFile | None = None
    """CSV file with a header."""
    column: str | None = None
    """Its column of lengths."""

    @model_validator(mode="after")
    def _one_source(self) -> Empirical:
        if (self.values is None) == (self.path is None) or (self.path is None) != (self.column is None):
            raise invalid("an empirical length needs one source", "Give values, or path and column.")
        if self.values is not None and not self.values:
            raise invalid("values is empty", "List at least one length.")
        if self.weights is not None and (
            self.values is None or len(self.weights) != len(self.values) or not sum(self.weights)
        ):
            raise invalid("weights do not fit values", "Give one weight a value, not all of them 0.")
        return self

    def draw(self, n: int, rng: np.random.Generator) -> Tokens:
        """``n`` lengths. Reads the file, if there is one."""
        values: Tokens = np.array(self._column() if self.values is None else self.values, dtype=np.int64)
        weights = np.ones(len(values)) if self.weights is None else np.array(self.weights)
        cumulative = np.cumsum(weights)
        chosen: Tokens = values[np.searchsorted(cumulative, rng.random(n) * cumulative[-1], side="right")]
        return chosen

    def _column(self) -> list[int]:
        assert self.path is not None
        values = []
        with self.path.open(newline="", encoding="utf-8") as lines:
            for number, row in enumerate(csv.DictReader(lines), start=2):
                try:
                    values.append(int(row[self.column or ""]))
                except (KeyError, TypeError, ValueError):
                    values.append(0)
                if values[-1] < 1:
                    raise InputError(
                        f"no length of at least 1 token in column {self.column!r}",
                        where=f"{self.path}, line {number}",
                        fix="Correct the file or the column's name.",
                    )
        if not values:
            raise InputError("no rows", where=str(self.path), fix="Give a CSV file with a header and rows.")
        return values


def _kind(data: Any) -> str | None:
    if isinstance(data, dict):
        kind = data.get("kind")
        return kind if isinstance(kind, str) else None
    return "fixed" if isinstance(data, (int, float, str)) else getattr(data, "kind", None)


Lengths = Annotated[
    Annotated[Fixed, Tag("fixed")]
    | Annotated[Uniform, Tag("uniform")]
    | Annotated[Lognormal, Tag("lognormal")]
    | Annotated[Empirical, Tag("empirical")],
    Discriminator(_kind),
]
