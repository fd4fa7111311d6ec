"""Rules about how times were taken: zeros, halves, and the grid of a clock."""

from __future__ import annotations

import math
from collections.abc import Iterator

from servecast.validate.check_finding import WAVES, Finding, completion_rate, latency, names, token_time
from servecast.validate.report_table import LATENCIES, Level, Report, Value

_TWICE = (1.85, 2.15)
_DRAIN_TWICE = (1.6, 2.8)  # the drain is the latency of the last requests, not of all
_CHANCE = 1e-5  # that numbers lie on a grid by themselves
_DIFFERENT = 4  # values, fewer say nothing of a grid
_TICKS_S = (1 / 64, 1 / 60)  # timers that no decimal grid shows
_SHORTEST_STEP_S = 1e-4  # no model's forward pass is shorter


def zero_latency(report: Report) -> Iterator[Finding]:
    """No engine step takes no time, so a percentile of 0 is not one of steps."""
    for level in report.levels:
        shortest = _SHORTEST_STEP_S
        if level.hardware is not None:
            shortest = max(shortest, level.hardware.roofline_s(decodes=1))
        for value in level.of(*LATENCIES):
            if value.value != 0 or value.statistic in ("min", "std"):
                continue
            sure = value.half < shortest
            share = f"{value.rank:g} % of the values" if value.rank is not None else "the mean"
            yield Finding(
                "zero-latency", level, names(value), {"reported_s": 0.0, "shortest_step_s": shortest},
                "certain" if sure else "possible",
                f"{value.metric} {value.statistic} is 0: {share} cannot be times between engine steps, of at "
                f"least {1e3 * shortest:.2g} ms; several events were stamped at once"
                if sure else f"{value.metric} {value.statistic} is rounded to 0",
            )  # fmt: skip


def halved_itl(report: Report) -> Iterator[Finding]:
    """The gaps between tokens add up to about half of the latency without TTFT: two timestamps a token."""
    for level in report.levels:
        gaps = [v for v in level.of("itl", "tpot") if v.value > 0 and v.statistic != "std"]
        if not gaps:
            continue
        ratio, source = _against_latency(level)
        median, mean = level.get("itl", "p50"), level.get("itl", "mean")
        zeros = median is not None and median.value == 0 and mean is not None
        numbers = {} if ratio is None else {"ratio": ratio}
        if zeros:
            assert mean is not None
            behind = _against_drain(level)
            numbers |= {"mean_s": mean.value, "least_mean_of_others_s": 2 * mean.value}
            if behind is not None:
                numbers["drain_over_latency"] = behind
            seen = behind is not None and _DRAIN_TWICE[0] <= behind <= _DRAIN_TWICE[1]
            text = "; the drain of the level agrees" if seen else ""
            yield Finding(
                "halved-itl", level, names(*gaps), numbers, "certain" if seen else "likely",
                "at least half of the gaps are 0, so those between tokens are on average "
                f"{2e3 * mean.value:.4g} ms or more, not {1e3 * mean.value:.4g}{text}",
            )  # fmt: skip
        elif ratio is not None and _TWICE[0] <= ratio <= _TWICE[1]:
            yield Finding(
                "halved-itl", level, names(*gaps), numbers, "certain" if source == "mean" else "likely",
                f"latency without TTFT is {ratio:.3g} times the gaps between tokens: two timestamps a token?",
                weight=ratio,
            )  # fmt: skip


def _against_latency(level: Level) -> tuple[float | None, str]:
    """Latency without TTFT over the sum of the gaps, and what the latency rests on."""
    rest, first = token_time(level), level.get("ttft", "mean", "p50")
    if rest is None or first is None or rest.span.mid <= 0:
        return None, ""
    mean = level.get("e2el", "mean")
    if mean is not None and rest.exact and first.statistic == "mean":
        return (mean.value - first.value) / rest.span.mid, "mean"
    if level.output is None or not level.output.fixed:
        return None, ""
    median, per_token = level.get("e2el", "p50"), level.get("ntpot", "mean", "p50")
    if median is not None:
        return (median.value - first.value) / rest.span.mid, "median"
    if per_token is not None:
        return (per_token.value * level.output.mean.mid - first.value) / rest.span.mid, "tokens"
    rate, slots = completion_rate(level), level.concurrency
    steady = level.num_requests is None or level.num_requests >= WAVES * (slots or 1)
    if rate is None or slots is None or level.open_loop or not steady:
        return None, ""
    return (slots / rate.span.mid - first.value) / rest.span.mid, "slots"


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
        if tick is None:
            continue
        for level, value in cells:
            yield Finding(
                "clock-grid", level, (column,), {"tick_s": tick, "reported_s": value.value}, "likely",
                f"all {len(digits)} different values of {column} are multiples of "
                f"{1e3 * tick:.4g} ms: the clock ticks so, or they were rounded",
            )  # fmt: skip


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
