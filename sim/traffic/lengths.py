"""Prompt and output lengths: distributions over whole tokens, and how the two go together."""

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
from servecast.sim.traffic.measured_lengths import Histogram, Quantiles, Tokens, is_short


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
            fix = "Give mean and std, or median and sigma."
            raise invalid(f"a lognormal length with {', '.join(sorted(given)) or 'no parameters'}", fix)
        if self.max_tokens is not None and self.max_tokens < self.min_tokens:
            what = f"max_tokens {self.max_tokens} is below min_tokens {self.min_tokens}"
            raise invalid(what, "Swap or correct them.")
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

    kind: Literal["empirical"] = "empirical"
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
                    where, fix = f"{self.path}, line {number}", "Correct the file or the column's name."
                    raise InputError(f"no length of at least 1 token in column {self.column!r}", where, fix)
        if not values:
            raise InputError("no rows", where=str(self.path), fix="Give a CSV file with a header and rows.")
        return values


class InferencePerfLengths(Model):
    """inference-perf's ``Distribution``: whole numbers from ``min`` to ``max``, to which others are set.

    Its generators differ: that of ``random`` and ``synthetic`` data shifts a lognormal to start at ``min``,
    that of ``shared_prefix`` data does not, and draws a uniform up to ``max`` + 1.
    """

    kind: Literal["inference_perf"] = "inference_perf"
    generator: Literal["random", "shared_prefix"] = "random"
    """Whose."""
    type: Literal["normal", "skew_normal", "lognormal", "uniform", "poisson", "fixed"] = "normal"
    """Shape; a ``fixed`` one is ``mean``, whatever the bounds."""
    min: Count = 10
    """Shortest."""
    max: Count = 1024
    """Longest."""
    mean: Positive = 512.0
    """Mean, before draws are set to the bounds."""
    std_dev: NonNegative = 200.0
    """Standard deviation, likewise."""
    skew: Annotated[float, Field(strict=True)] = 0.0
    """Shape of a ``skew_normal``."""
    tokens_each: Positive = 1.0
    """Tokens that the server counts for each of these."""

    @model_validator(mode="after")
    def _possible(self) -> InferencePerfLengths:
        if self.min > self.max:
            raise invalid(f"min {self.min} is above max {self.max}", "Swap or correct them.")
        if self.generator == "random":
            if self.type in ("skew_normal", "poisson"):
                what = f"{self.type} lengths are for shared_prefix data alone"
                raise invalid(what, "Use normal.", at="type")
            if self.type == "normal" and not self.min <= self.mean <= self.max:
                what = f"mean {self.mean:g} is not between min {self.min} and max {self.max}"
                raise invalid(what, "inference-perf refuses that, too: correct them.", at="mean")
        return self

    def draw(self, n: int, rng: np.random.Generator) -> Tokens:
        """``n`` lengths."""
        if self.type == "fixed":
            whole = np.full(n, int(self.mean))
        else:
            whole = np.rint(np.clip(self._raw(n, rng), self.min, self.max))
        tokens: Tokens = np.maximum(np.rint(whole * self.tokens_each), 1).astype(np.int64)
        return tokens

    def _raw(self, n: int, rng: np.random.Generator) -> npt.NDArray[np.float64]:
        low, mean, std_dev, of_random = self.min, self.mean, self.std_dev, self.generator == "random"
        if self.type == "uniform":
            return rng.uniform(low, self.max if of_random else self.max + 1, n)
        if self.type == "poisson":
            return rng.poisson(mean, n).astype(np.float64)
        if self.type == "lognormal":
            shift = low if of_random else 0
            above = mean - shift if mean > shift else 1.0
            variance = math.log1p((std_dev / above) ** 2)
            return shift + rng.lognormal(math.log(above) - variance / 2, math.sqrt(variance), n)
        unit = rng.standard_normal(n)
        if self.type == "skew_normal":  # Azzalini 1985
            delta = self.skew / math.sqrt(1 + self.skew**2)
            other = delta * unit + math.sqrt(1 - delta**2) * rng.standard_normal(n)
            unit = np.where(unit >= 0, other, -other)
        return mean + std_dev * unit


def _kind(data: Any) -> str | None:
    if isinstance(data, dict):
        kind = data.get("kind", is_short(data))
        return kind if isinstance(kind, str) else None
    return "fixed" if isinstance(data, (int, float, str)) else getattr(data, "kind", None)


Lengths = Annotated[
    Annotated[Fixed, Tag("fixed")]
    | Annotated[Uniform, Tag("uniform")]
    | Annotated[Lognormal, Tag("lognormal")]
    | Annotated[Empirical, Tag("empirical")]
    | Annotated[Quantiles, Tag("quantiles")]
    | Annotated[Histogram, Tag("histogram")]
    | Annotated[InferencePerfLengths, Tag("inference_perf")],
    Discriminator(_kind),
]

Correlation = Annotated[float, Field(strict=True, ge=-1, le=1)] | Literal["rows"]


def check_pair(prompt: Lengths, output: Lengths, correlation: Correlation) -> None:
    """Raises PydanticCustomError where the two cannot go together as they are told to."""
    if correlation == "rows":
        tables = [
            (law.path, law.weights, len(law.values or ())) if isinstance(law, Empirical) else None
            for law in (prompt, output)
        ]
        if tables[0] is None or tables[0] != tables[1]:
            fix = "Give both as columns of one file, or as values of one length."
            raise invalid("prompts and outputs do not stand in the same rows", fix, at="length_correlation")
    elif isinstance(prompt, Fixed) or isinstance(output, Fixed):
        raise invalid("a fixed length goes with nothing", "Remove it.", at="length_correlation")


def draw_outputs(
    law: Lengths, prompts: Tokens, correlation: Correlation | None, rng: np.random.Generator
) -> Tokens:
    """Output lengths for these prompts. With a rank correlation they are those of their law in another order:
    ranks are those of two normals that have it (Iman and Conover 1982).

    Args:
        rng: of the outputs; with "rows", one in the state from which the prompts were drawn.
    """
    n = len(prompts)
    values = law.draw(n, rng)
    if correlation is None or correlation == "rows":
        return values
    normal, other = np.sort(rng.standard_normal(n)), rng.standard_normal(n)
    place = np.empty(n, dtype=np.int64)
    place[np.lexsort((rng.random(n), prompts))] = np.arange(n)  # equal prompts in any order
    r = 2 * math.sin(math.pi * correlation / 6)  # of normals whose ranks have Spearman's
    ranks = np.argsort(np.argsort(r * normal[place] + math.sqrt(max(0.0, 1 - r * r)) * other))
    found: Tokens = np.sort(values)[ranks]
    return found
