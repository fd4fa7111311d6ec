"""Rules about how times were taken: zeros, halves, and the grid of a clock."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace

from servecast.validate.check.finding import (
    Finding,
    asked,
    completion_rate,
    each_row,
    finding,
    gaps_ratio,
    latency,
    token_time,
)
from servecast.validate.check.table import LATENCIES, Level, Report, Value

_DRAIN_TWICE = (1.6, 2.8)  # the drain is the latency of the last requests, not of all
_CHANCE = 1e-5  # that numbers lie on a grid by themselves
_DIFFERENT = 4  # values, fewer say nothing of a grid
_FINE = 0.005  # of the smallest value: a tick under it is how numbers are printed
_TICKS_S = (1 / 64, 1 / 60)  # timers that no decimal grid shows
_SHORTEST_STEP_S = 1e-4  # no model's forward pass is shorter


@each_row
def zero_latency(_report: Report, level: Level) -> Iterator[Finding]:
    """No engine step takes no time, so a percentile of 0 is not one of steps."""
    asked(level.of(*LATENCIES))
    shortest = _shortest_step_s(level)
    for value in level.of(*LATENCIES):
        if value.value != 0 or value.statistic in ("min", "std"):
            continue
        if value.metric in ("itl", "tpot") and level.output is not None and level.gaps is None:
            continue  # of outputs of one token a 0 says that there are no gaps
        sure = value.half < shortest
        share = f"{value.rank:g} % of the values" if value.rank is not None else "the mean"
        message = (
            f"{value.metric} {value.statistic} is 0: {share} cannot be times between engine steps, of at "
            f"least {1e3 * shortest:.2g} ms; several events were stamped at once"
            if sure
            else f"{value.metric} {value.statistic} is rounded to 0"
        )
        numbers = {"reported_s": 0.0, "shortest_step_s": shortest}
        found = finding(level, [value], message, numbers, certain=sure)
        yield found if sure else replace(found, confidence="possible")


def _shortest_step_s(level: Level) -> float:
    of_weights = 0.0 if level.hardware is None else level.hardware.roofline_s(decodes=1)
    return max(_SHORTEST_STEP_S, of_weights)


@each_row
def halved_itl(_report: Report, level: Level) -> Iterator[Finding]:
    """The gaps between tokens add up to about half of the latency without TTFT: two timestamps a token."""
    asked(token_time(level) or level.of("itl"))
    if level.halved:
        message = "the tool stamped each token twice, so that it reports half of ITL and TPOT; put right here"
        yield finding(level, level.of("itl", "tpot"), message, {}, certain=True)
        return
    for metric in ("itl", "tpot"):
        gaps = [v for v in level.of(metric) if v.value > 0 and v.statistic != "std"]
        ratio = gaps_ratio(level, metric)
        if gaps and ratio is not None and ratio.twice:
            message = (
                f"latency without TTFT is {ratio.value:.3g} times the gaps between tokens by their "
                f"{metric}: two timestamps a token?"
            )
            yield finding(level, gaps, message, {"ratio": ratio.value}, certain=ratio.exact)
        elif gaps and ratio is None and metric == "itl":
            yield from _half_are_zero(level, gaps)


def _half_are_zero(level: Level, gaps: list[Value]) -> Iterator[Finding]:
    median, mean = level.get("itl", "p50"), level.get("itl", "mean")
    if median is None or mean is None or median.value != 0 or median.half >= _shortest_step_s(level):
        return
    behind = _against_drain(level)
    numbers = {"mean_s": mean.value, "least_mean_of_others_s": 2 * mean.value}
    if behind is not None:
        numbers["drain_over_latency"] = behind
    seen = behind is not None and _DRAIN_TWICE[0] <= behind <= _DRAIN_TWICE[1]
    message = (
        "at least half of the gaps are 0, so those between tokens are on average "
        f"{2e3 * mean.value:.4g} ms or more, not {1e3 * mean.value:.4g}"
        + ("; the drain of the level agrees" if seen else "")
    )
    yield finding(level, gaps, message, numbers, certain=seen)


def _against_drain(level: Level) -> float | None:
    """Seconds from the last send to the last token over the latency by TTFT and gaps; None where the rate is
    not known or the first tokens are late, so that the drain is the queue's."""
    rate, done, time = level.request_rate, completion_rate(level), latency(level)
    ranked, first = level.percentiles("ttft"), level.get("ttft", "mean", "p50")
    if rate is None or done is None or time is None or level.num_requests is None or first is None:
        return None
    after = level.num_requests / done.span.mid - level.num_requests / rate
    late = max([first.value, *(value.value for value in ranked)])
    return after / time.span.mid if after > 0 and late < 0.2 * after else None


def clock_grid(report: Report) -> Iterator[Finding]:
    """All values of a column are multiples of more than its last digit: a clock's tick, or rounding."""
    asked(len([level for level in report.levels if level.of(*LATENCIES)]) >= _DIFFERENT)
    columns: dict[tuple[str, str], list[tuple[Level, Value]]] = {}
    for level in report.levels:
        for value in level.of(*LATENCIES):
            if value.value > 0 and value.half > 0:
                columns.setdefault((level.table, value.column), []).append((level, value))
    for (_, column), cells in columns.items():
        if len({value.half for _, value in cells}) > 1:
            continue  # not printed with fixed digits
        digits = {round(value.value / (2 * value.half)) for _, value in cells}
        unit = 2 * cells[0][1].half
        tick = _tick_s(digits, unit)
        if tick is None or tick < _FINE * min(value.value for _, value in cells):
            continue
        for level, value in cells:
            message = (
                f"all {len(digits)} different values of {column} are multiples of {1e3 * tick:.4g} ms: the "
                "clock ticks so, or they were rounded"
            )
            yield finding(level, [value], message, {"tick_s": tick, "reported_s": value.value})


def _tick_s(digits: set[int], unit: float) -> float | None:
    """The grid that different numbers, in units of their last digit, would not lie on by chance."""
    if len(digits) < _DIFFERENT:
        return None
    divisor = math.gcd(*digits)
    if divisor > 1 and divisor ** -len(digits) < _CHANCE:
        return divisor * unit
    for tick in _TICKS_S:
        chance = min(1.0, 2 * unit / tick) ** len(digits)
        if chance < _CHANCE and all(
            abs(number * unit - round(number * unit / tick) * tick) <= 0.51 * unit
            and number * unit > 0.5 * tick
            for number in digits
        ):
            return tick
    return None
