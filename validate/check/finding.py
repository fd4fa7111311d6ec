"""What a rule of `servecast check` finds, and the quantities that several rules derive from a level."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import wraps
from typing import Any, Literal, TypeVar

from servecast.validate.check.table import Level, Report, Span, Value

Confidence = Literal["certain", "likely", "possible"]
T = TypeVar("T")

SAME_RATE = 0.01  # rates that agree to this are one number
SHORT = 0.95  # fewer tokens than this share of rate x tokens are missing, not rounded
IDLE = 0.8  # share of a closed loop's slots in use, under which its throughput is not that of its load
WAVES = 10  # requests a slot, from which ramp and drain of a level no longer matter
_SKEW = 1.6  # mean over median of latencies, where lengths differ (lognormal of spread 1), or its inverse
LOW_RATE_OF_SATURATION = 0.9  # completions under this share of the arrivals
TWICE = (1.85, 2.15)


@dataclass(frozen=True, slots=True)
class Finding:
    """Something in a report that cannot be, or is not what it seems.

    Attributes:
        level: the row. columns: the cells of that row.
        numbers: what was set against what, by name; seconds, tokens, requests.
        confidence: "certain" follows by arithmetic; "likely" where a median or a percentile stands for what
            was not reported; "possible" where it rests on the predictor.
        message: one sentence. weight: how far off, to show the clearest of many first.
        rule: its id, which ``check`` fills in.
    """

    level: Level
    columns: tuple[str, ...]
    numbers: Mapping[str, float]
    confidence: Confidence
    message: str
    weight: float = field(default=1.0, compare=False)
    rule: str = ""

    def to_json(self) -> dict[str, Any]:
        """As ``servecast check --json`` prints it."""
        level = self.level
        return {
            "rule": self.rule,
            "cells": [
                {"table": level.table, "row": dict(level.keys), "column": name} for name in self.columns
            ],
            "numbers": dict(self.numbers),
            "confidence": self.confidence,
            "message": self.message,
        }


Rule = Callable[[Report], Iterable[Finding]]  # raises NotReported where it can be asked of no row


class NotReported(Exception):
    """A report does not say what a rule needs."""


def asked(said: object) -> None:
    """Raises NotReported if nothing is said."""
    if not said:
        raise NotReported


def needed(said: T | None) -> T:
    """What is said; NotReported if it is None."""
    if said is None:
        raise NotReported
    return said


def each_row(rule: Callable[[Report, Level], Iterable[Finding]]) -> Rule:
    """A rule that is asked of each row for itself, and of a report if it is of one of its rows."""

    @wraps(rule)
    def of_report(report: Report) -> list[Finding]:
        found: list[Finding] = []
        was_asked = False
        for level in report.levels:
            try:
                found += rule(report, level)
                was_asked = True
            except NotReported:  # what it found before it came to that stays
                continue
        asked(was_asked or found)
        return found

    return of_report


def finding(
    level: Level,
    cells: Iterable[Value | None],
    message: str,
    numbers: Mapping[str, float],
    *,
    certain: bool = False,
    weight: float | None = None,
) -> Finding:
    """What a rule found in those cells of a row that are reported; likely if not certain. Its weight, where
    it is not given, is how far the first two numbers lie apart."""
    columns = tuple(dict.fromkeys(value.column for value in cells if value is not None))
    if weight is None:
        one, other = (*numbers.values(), 1.0, 1.0)[:2]
        weight = max(one, other) / min(one, other) if min(one, other) > 0 else math.inf
    return Finding(level, columns, numbers, "certain" if certain else "likely", message, weight)


@dataclass(frozen=True, slots=True)
class Derived:
    """A quantity and what it was derived from. exact: by definition, not with a median for a mean."""

    span: Span
    values: tuple[Value, ...]
    exact: bool


def tokens_each(report: Report, level: Level) -> Span | None:
    """Output tokens a request: as known, or the most that the rows of its series imply (throughput in tokens
    over throughput in requests), where none says."""
    if level.output is not None:
        return level.output.mean if level.output.mean.low > 0 else None
    alike = [each for each in report.levels if (each.table, each.series) == (level.table, level.series)]
    if any(each.output is not None for each in alike):
        return None
    implied = [span for each in alike if (span := implied_tokens(each)) is not None]
    return max(implied, key=lambda span: span.low) if len(implied) > 2 else None


def implied_tokens(level: Level) -> Span | None:
    """Output tokens a request as the two throughputs of a row have it."""
    tokens, requests = level.get("output_throughput"), level.get("request_throughput")
    if tokens is None or requests is None or tokens.value <= 0 or requests.value <= 0:
        return None
    return tokens.span / requests.span


def completion_rate(level: Level) -> Derived | None:
    """Requests completed a second: tokens/s over tokens a request, or the reported requests/s. Of the two the
    lower, since a rate of sending is sometimes reported as the latter."""
    found = []
    tokens, requests = level.get("output_throughput"), level.get("request_throughput")
    if requests is not None and requests.value > 0:
        found.append(Derived(requests.span, (requests,), True))
    if tokens is not None and tokens.value > 0 and level.output is not None and level.output.mean.low > 0:
        found.append(Derived(tokens.span / level.output.mean, (tokens,), True))
    return min(found, key=lambda rate: rate.span.mid) if found else None


def token_time(level: Level, *metrics: str) -> Derived | None:
    """Mean seconds from a request's first token to its last: its gaps, by the mean of the first of these
    metrics that is reported (by itself that which is exact), else by the median TPOT."""
    gaps, fixed = level.gaps, level.equal_outputs
    if gaps is None:
        return None
    metrics = metrics or (("tpot", "itl") if fixed else ("itl", "tpot"))
    for metric in metrics:
        value = level.get(metric, "mean")
        if value is not None and value.value > 0:
            return Derived(value.span * gaps, (value,), metric == "itl" or fixed)
    value = level.get("tpot", "p50") if "tpot" in metrics else None
    return None if value is None or value.value <= 0 else Derived(value.span * gaps, (value,), False)


@dataclass(frozen=True, slots=True)
class Ratio:
    """Latency without TTFT over the gaps between tokens. exact: of means that add up."""

    value: float
    exact: bool

    @property
    def twice(self) -> bool:
        """Whether the gaps are about half of what they should be."""
        return TWICE[0] <= self.value <= TWICE[1]


def gaps_ratio(level: Level, metric: str) -> Ratio | None:
    """How much longer requests take from their first token to the last than the gaps of a metric (itl or
    tpot) add up to: 1, and 2 where each token was stamped twice."""
    rest, first = token_time(level, metric), level.get("ttft", "mean", "p50")
    if rest is None or first is None or level.output is None:
        return None
    mean, median = level.get("e2el", "mean"), level.get("e2el", "p50")
    if mean is not None and first.statistic == rest.values[0].statistic == "mean":
        return Ratio((mean.value - first.value) / rest.span.mid, rest.exact)
    if not level.output.fixed:
        return None
    per_token = level.get("ntpot", "mean", "p50")
    if median is not None:
        return Ratio((median.value - first.value) / rest.span.mid, False)
    if per_token is not None:
        return Ratio((per_token.value * level.output.mean.mid - first.value) / rest.span.mid, False)
    rate, slots = completion_rate(level), level.concurrency
    if rate is None or slots is None or level.open_loop or (level.num_requests or 0) < WAVES * slots:
        return None
    return Ratio((slots / rate.span.mid - first.value) / rest.span.mid, False)


def latency(level: Level) -> Derived | None:
    """A request's mean seconds from sending to the last token: as reported, else its median, else put
    together from TTFT and the time between tokens."""
    mean, median, parts = level.get("e2el", "mean"), level.get("e2el", "p50"), _summed(level)
    if mean is not None and mean.value > 0:
        return Derived(mean.span, (mean,), True)
    fixed = level.equal_outputs
    if median is not None and median.value > 0 and (fixed or parts is None):
        return Derived(
            median.span if fixed else Span(median.span.low / _SKEW, median.span.high * _SKEW),
            (median,),
            False,
        )
    if parts is not None:
        return parts
    per_token = level.get("ntpot", "mean", "p50")
    if per_token is not None and per_token.value > 0 and level.output is not None:
        return Derived(per_token.span * level.output.mean, (per_token,), False)
    return None


def _summed(level: Level) -> Derived | None:
    """TTFT and the time between tokens; by the ITL not exact, since one of its events may have several."""
    first, rest = level.get("ttft", "mean", "p50"), token_time(level)
    if first is None or rest is None:
        return None
    of_tokens = rest.values[0].metric == "tpot" and rest.values[0].statistic == "mean"
    exact = first.statistic == "mean" and of_tokens and rest.exact
    return Derived(first.span + rest.span, (first, *rest.values), exact)


def in_flight(level: Level) -> Derived | None:
    """Little's law: requests in flight of a level without failures are throughput x latency."""
    rate, time = completion_rate(level), latency(level)
    if rate is None or time is None or level.whole_run or not level.all_answered:
        return None
    return Derived(rate.span * time.span, (*rate.values, *time.values), rate.exact and time.exact)


def send_window_s(level: Level) -> Span | None:
    """Seconds that sending takes at the offered rate, give or take what Poisson arrivals vary."""
    if level.num_requests is None or level.request_rate is None:
        return None
    mean, varies = level.num_requests / level.request_rate, 3 / math.sqrt(level.num_requests)
    return Span(mean * max(0.0, 1 - varies), mean * (1 + varies))


def reports_send_rate(report: Report, level: Level) -> bool:
    """Requests/s equals the offered rate, but the tokens/s are of fewer requests: the former is the rate of
    sending, the latter is taken over a longer time."""
    requests, tokens = level.get("request_throughput"), level.get("output_throughput")
    rate, each = level.request_rate, tokens_each(report, level)
    if rate is None or requests is None or tokens is None or each is None or not level.all_answered:
        return False
    same = abs(requests.value / rate - 1) <= SAME_RATE
    return same and tokens.value > 0 and tokens.span.high < SHORT * requests.span.low * each.low
