"""Lengths as dashboards and metrics show them: quantiles, and histograms with their buckets."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping
from itertools import pairwise
from statistics import NormalDist
from typing import Annotated, Any, Literal

import numpy as np
import numpy.typing as npt
from pydantic import Field, GetJsonSchemaHandler, model_validator
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema

from servecast.sim.inputs.errors import InputError, reason
from servecast.sim.inputs.schema import Count, InputFile, Model, NonNegative, Positive, invalid

Tokens = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]
QUANTILE = re.compile(r"p(\d+(?:\.\d+)?)")
_LONGEST = 2**53


def gather_quantiles(data: Any) -> Any:
    """``{p50: 1, p95: 2, ...}`` as ``{quantiles: {p50: 1, p95: 2}, ...}``."""
    names = [key for key in data if QUANTILE.fullmatch(str(key))] if isinstance(data, Mapping) else []
    if not names or "quantiles" in data:
        return data
    rest = {key: value for key, value in data.items() if key not in names}
    return rest | {"quantiles": {name: data[name] for name in names}}


def check_quantiles(quantiles: Mapping[str, float]) -> None:
    """Raises PydanticCustomError for what no law has as its quantiles."""
    if len(quantiles) < 2:
        raise invalid("one quantile says nothing of the spread", "Give two or more, as p50 and p95.")
    for name in quantiles:
        match = QUANTILE.fullmatch(name)
        if match is None or not 0 < float(match[1]) < 100:
            fix = "Write p50, p95, p99.9, ...; the shortest and the longest are fields of their own."
            raise invalid(f"{name!r} is no quantile between p0 and p100", fix, at=name)
    for low, high in pairwise(sorted(quantiles, key=_rank)):
        if _rank(low) == _rank(high):
            raise invalid(f"{low} and {high} are one quantile", "Give it once.", at=low)
        if quantiles[high] < quantiles[low]:
            what = f"{high} {quantiles[high]:g} is below {low} {quantiles[low]:g}"
            raise invalid(what, "Quantiles rise: correct them.", at=high)


def draw_quantiles(quantiles: Mapping[str, float], n: int, rng: np.random.Generator) -> Floats:
    """``n`` values whose logarithm is linear in a standard normal between these quantiles, and beyond the
    outer ones as next to them."""
    names = sorted(quantiles, key=_rank)
    ranks = np.array([NormalDist().inv_cdf(_rank(name) / 100) for name in names])
    logs, unit = np.log([quantiles[name] for name in names]), rng.standard_normal(n)
    piece = np.clip(np.searchsorted(ranks, unit) - 1, 0, len(ranks) - 2)
    slopes = np.diff(logs) / np.diff(ranks)
    drawn: Floats = np.exp(
        np.minimum(logs[piece] + (unit - ranks[piece]) * slopes[piece], math.log(_LONGEST))
    )
    return drawn


def _rank(name: str) -> float:
    return float(name[1:])


class Quantiles(Model):
    """Two or more quantiles, as ``prompt_tokens: {p50: 800, p95: 4000}``.

    Two are met by one lognormal law. Between more of them, and beyond the outer two, the logarithm of the
    length is linear in the quantile of a standard normal.
    """

    kind: Literal["quantiles"] = "quantiles"
    quantiles: dict[str, Annotated[float, Field(strict=True, ge=1)]]
    """Length by quantile; ``p50``, ``p95``, ... may stand beside ``min_tokens``, without this."""
    min_tokens: Count = 1
    """Shortest; draws below it are set to it."""
    max_tokens: Count | None = None
    """Longest; draws above it are set to it."""

    @model_validator(mode="before")
    @classmethod
    def _from_names(cls, data: Any) -> Any:
        return gather_quantiles(data)

    @classmethod
    def __get_pydantic_json_schema__(cls, core: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        bounds = {"type": "integer", "minimum": 1}
        short = {
            "type": "object",
            "properties": {name: bounds for name in ("min_tokens", "max_tokens")},
            "patternProperties": {rf"^{QUANTILE.pattern}$": {"type": "number", "minimum": 1}},
            "minProperties": 2,
            "additionalProperties": False,
        }
        return {"anyOf": [short, handler(core)]}

    @model_validator(mode="after")
    def _rising(self) -> Quantiles:
        check_quantiles(self.quantiles)
        if self.max_tokens is not None and self.max_tokens < self.min_tokens:
            what = f"max_tokens {self.max_tokens} is below min_tokens {self.min_tokens}"
            raise invalid(what, "Swap or correct them.")
        return self

    def draw(self, n: int, rng: np.random.Generator) -> Tokens:
        """``n`` lengths."""
        drawn = np.rint(draw_quantiles(self.quantiles, n, rng))
        tokens: Tokens = np.clip(drawn, self.min_tokens, self.max_tokens or _LONGEST).astype(np.int64)
        return tokens


class Histogram(Model):
    """How many lengths lie in each bin: ``edges`` and ``counts``, or the buckets of a Prometheus histogram.

    Inside a bin lengths are uniform, as PromQL's ``histogram_quantile`` has it; where the mean is known they
    lie further down or up in all bins alike, so that it is met.
    """

    kind: Literal["histogram"] = "histogram"
    edges: tuple[NonNegative, ...] | None = None
    """Rising, one more than ``counts``; a bin holds what is above its lower edge, up to its upper one."""
    counts: tuple[NonNegative, ...] | None = None
    """How many lengths, or what share of them, each bin holds."""
    path: InputFile | None = None
    """A server's ``/metrics`` (text), or the JSON of a Prometheus query for its buckets. Of a range the
    increase from the first to the last sample counts."""
    metric: str | None = None
    """Name of the histogram in it, as ``vllm:request_prompt_tokens``."""
    labels: dict[str, str] = Field(default_factory=dict)
    """Labels of the series that count, as ``model_name``. Default, all."""
    mean: Positive | None = None
    """Mean length. Default, that of the file where it has the histogram's sum."""
    max_tokens: Count | None = None
    """Longest; where lengths lie above the last bucket that has a bound, it is theirs."""

    @model_validator(mode="after")
    def _one_source(self) -> Histogram:
        if (self.path is None) == (self.edges is None) or (self.edges is None) != (self.counts is None):
            raise invalid("a histogram needs one source", "Give edges and counts, or path and metric.")
        if self.path is None and (self.metric is not None or self.labels):
            raise invalid("metric or labels without a file", "Add its path, or remove them.", at="path")
        if self.edges is not None and self.counts is not None:
            if len(self.edges) != len(self.counts) + 1:
                what = f"{len(self.edges)} edges and {len(self.counts)} counts"
                raise invalid(what, "Give one edge more than counts.", at="edges")
            falls = next((i for i, gap in enumerate(np.diff(self.edges), 1) if gap <= 0), None)
            if falls is not None:
                raise invalid("the edges do not rise", "Sort them, each once.", at=f"edges.{falls}")
            if not sum(self.counts):
                raise invalid("all counts are 0", "Give at least one above 0.", at="counts")
            try:
                self._shape(np.array(self.edges), np.array(self.counts), self.mean)
            except InputError as error:
                raise invalid(error.what, error.fix, at="mean") from None
        return self

    def draw(self, n: int, rng: np.random.Generator) -> Tokens:
        """``n`` lengths. Reads the file, if there is one."""
        if self.path is None:
            edges, counts, mean = np.array(self.edges), np.array(self.counts), self.mean
        else:
            edges, counts, mean = self._buckets()
        exponent = self._shape(edges, counts, mean)
        ends = np.cumsum(counts)
        chosen = np.searchsorted(ends, rng.random(n) * ends[-1], side="right")
        within = rng.random(n) ** exponent * np.diff(edges)[chosen]
        low = edges[chosen]
        tokens: Tokens = np.maximum(np.ceil(low + within), np.floor(low) + 1).astype(np.int64)
        return tokens if self.max_tokens is None else np.minimum(tokens, self.max_tokens)

    def _shape(self, edges: Floats, counts: Floats, mean: float | None) -> float:
        """The exponent of a uniform number that places lengths inside their bins: 1, or what meets the mean.
        Lengths are whole and round up, half a token in the mean."""
        if mean is None:
            return 1.0
        shares = counts / counts.sum()
        low, width = float(shares @ edges[:-1]), float(shares @ np.diff(edges))
        place = (mean - 0.5 - low) / width
        if not -0.5 / width <= place <= 1:
            what = f"a mean of {mean:g} does not fit bins that allow means from {low:g} to {low + width:g}"
            raise self._error(what, "Correct the mean or the histogram.")
        place = min(max(place, 0.01), 0.99)
        return (1 - place) / place

    def _error(self, what: str, fix: str) -> InputError:
        return InputError(what, where=str(self.path or "histogram"), fix=fix)

    def _buckets(self) -> tuple[Floats, Floats, float | None]:
        """Edges, counts and mean of the file's histogram."""
        totals: dict[float, float] = {}
        sums = {"sum": math.nan, "count": math.nan}
        models: set[str] = set()
        for part, labels, value in self._samples():
            if any(labels.get(name) != wanted for name, wanted in self.labels.items()):
                continue
            if not (math.isfinite(value) and value >= 0):
                raise self._error(f"a sample of {self.metric or 'the histogram'} is {value}", "Query again.")
            models.add(labels.get("model_name", ""))
            if part in sums:
                sums[part] = value + (0 if math.isnan(sums[part]) else sums[part])
                continue
            try:
                bound = float(labels["le"])
            except (KeyError, ValueError):
                bound = math.nan
            if math.isnan(bound):
                what = "a series without the bound of its bucket (le)"
                raise self._error(what, "Query the buckets, as sum by (le) (increase(..._bucket[1d])).")
            totals[bound] = totals.get(bound, 0.0) + value
        if len(models) > 1:
            what = f"series of {len(models)} models: {', '.join(sorted(models))}"
            raise self._error(what, "Name one: labels: {model_name: ...}.")
        return self._bins(totals, sums)

    def _bins(
        self, totals: dict[float, float], sums: Mapping[str, float]
    ) -> tuple[Floats, Floats, float | None]:
        bounds = sorted(totals)
        if len(bounds) < 2 or not totals[bounds[-1]]:
            what = "its histogram is empty" if bounds else f"no buckets of {self.metric or 'a histogram'}"
            fix = "Correct metric (as vllm:request_prompt_tokens) and labels, or scrape a busier server."
            raise self._error(what, fix)
        for low, high in pairwise(bounds):
            if totals[high] < totals[low] * (1 - 1e-9):
                what = (
                    f"{totals[high]:g} at le={high:g} after {totals[low]:g} at le={low:g}: buckets cumulate"
                )
                raise self._error(what, "Give a histogram's own buckets, or its bins as edges and counts.")
        counts = np.maximum(np.diff([totals[bound] for bound in bounds], prepend=0.0), 0.0)
        if math.isinf(bounds[-1]):
            if counts[-1] and (self.max_tokens or 0) <= bounds[-2]:
                what = f"{counts[-1]:g} of {counts.sum():g} lengths lie above the last bound, {bounds[-2]:g}"
                raise self._error(what, f"Give their longest as max_tokens, above {bounds[-2]:g}.")
            bounds[-1] = float(self.max_tokens or 0) if counts[-1] else bounds[-2] + 1
        mean = self.mean
        if mean is None and sums["count"] > 0 and not math.isnan(sums["sum"]):
            mean = sums["sum"] / sums["count"]
        return np.array([0.0, *bounds]), counts, mean

    def _samples(self) -> Iterator[tuple[str, Mapping[str, str], float]]:
        """What each sample is ("bucket", "sum", "count"), its labels, and its value."""
        assert self.path is not None
        name = "" if self.metric is None else self.metric.removesuffix("_bucket")
        try:
            text = self.path.read_text("utf-8")
            if text.lstrip()[:1] in "{[":
                yield from _query_result(json.loads(text), name)
                return
            if not name:
                raise self._error("which of its histograms?", "Add metric: vllm:request_prompt_tokens.")
            from prometheus_client.parser import text_string_to_metric_families  # 50 ms of a start

            for family in text_string_to_metric_families(text):
                for sample in family.samples:
                    part = sample.name.removeprefix(f"{name}_")
                    if part != sample.name and part in ("bucket", "sum", "count"):
                        yield part, sample.labels, sample.value
        except (
            OSError,
            ValueError,
            KeyError,
            TypeError,
            IndexError,
            AttributeError,
            RecursionError,
        ) as error:
            if isinstance(error, InputError):
                raise
            fix = "Give the text of /metrics, or the JSON of Prometheus' /api/v1/query."
            raise self._error(f"cannot be read: {reason(error)}", fix) from None


def _query_result(document: Any, name: str) -> Iterator[tuple[str, Mapping[str, str], float]]:
    """The samples of a query's vector, or the increases over a range's matrix."""
    for series in document["data"]["result"] if isinstance(document, dict) else document:
        labels = {str(name): str(label) for name, label in series["metric"].items()}
        called = labels.get("__name__", "")
        if name and called and called.removesuffix("_bucket") != name:
            continue
        if "values" in series:
            values = [float(value) for _time, value in series["values"]]
            if min(np.diff(values), default=0.0) < 0:
                raise ValueError("a counter falls: the server was started anew in this range")
            yield "bucket", labels, values[-1] - values[0]
        else:
            yield "bucket", labels, float(series["value"][1])


def is_short(data: Mapping[str, Any]) -> str | None:
    """The kind of lengths that are written without one, by their fields."""
    if "quantiles" in data or any(QUANTILE.fullmatch(str(key)) for key in data):
        return "quantiles"
    if "edges" in data or "metric" in data:
        return "histogram"
    return "empirical" if "column" in data else None
