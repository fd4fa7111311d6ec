"""Rules about what few requests do to a row: warm-up, a handful of waves, percentiles beyond the sample."""

from __future__ import annotations

import math
from collections.abc import Iterator

from servecast.validate.check.finding import (
    IDLE,
    SHORT,
    WAVES,
    Finding,
    asked,
    completion_rate,
    each_row,
    finding,
    in_flight,
    latency,
    needed,
)
from servecast.validate.check.table import Level, Report, Span, Value

_TAIL, _SHRINKS = 2.0, 2.0  # a tail this many times its median, and that of the next load
_EXCESS = 3.0
_AGREE = 0.35  # two sizes of one outlier


@each_row
def few_waves(_report: Report, level: Level) -> Iterator[Finding]:
    """A closed loop of a few requests a slot is mostly ramp and drain: its throughput is not that of its
    concurrency."""
    slots, count = needed(level.concurrency), needed(level.num_requests)
    asked(completion_rate(level) and latency(level))
    flight = in_flight(level)
    if flight is None or level.open_loop or count >= WAVES * slots or flight.span.high >= IDLE * slots:
        return
    waves = math.ceil(count / slots)
    message = (
        f"{count} requests in {slots} slots are {waves} wave{'s' * (waves > 1)}: on average "
        f"{flight.span.mid:.3g} were in flight, so the throughput is that of ramp and drain"
    )
    numbers = {
        "in_flight": flight.span.mid,
        "concurrency": float(slots),
        "requests": float(count),
        "filled": count / (waves * slots),
    }
    yield finding(level, _rates(level), message, numbers)


def warm_up(report: Report) -> Iterator[Finding]:
    """The tail of the lowest load is longer than that of the next: its first request warmed the server up."""
    known = [series[:2] for series in report.series() if len(series) > 1]
    asked([first for first, _ in known if first.percentiles("ttft")])
    for first, second in known:
        tails = [
            (value, median)
            for metric in ("ttft", "e2el")
            for value in first.percentiles(metric)
            if (value.rank or 0) > 50 and (median := _median(first, metric)) is not None
        ]
        long = [
            (value, median)
            for value, median in tails
            if value.metric == "ttft"
            and value.span.low > _TAIL * median.high
            and (then := second.get("ttft", value.statistic)) is not None
            and value.span.low > then.span.high
            and (typical := _median(second, "ttft")) is not None
            and value.value / median.mid > _SHRINKS * then.value / typical.mid
        ]
        if not long:
            continue
        cells = [
            value
            for value, median in tails
            if (value, median) in long
            or value.value - median.mid > _EXCESS * _excess(second, value.metric, value.statistic)
        ]
        value, median = max(long, key=lambda pair: pair[0].value)
        numbers = {"median_s": median.mid, value.statistic or "": value.value}
        sizes = _outlier_sizes(first, [pair for pair in tails if pair[0] in cells])
        message = (
            f"TTFT {value.statistic} is {value.value / median.mid:.3g} times its median at the lowest load, "
            "where nothing queues, and less so at the next: the first request warmed the server up"
        )
        one = bool(sizes) and min(sizes) > 0 and max(sizes) <= (1 + _AGREE) * min(sizes)
        if one:
            outlier_s = sum(sizes) / len(sizes)
            numbers |= {"outlier_s": outlier_s, "requests": float(first.num_requests or 0)}
            message += f"; one of {first.num_requests} requests, {outlier_s:.2g} s longer, explains all of it"
            cells += _slowed_rates(first, outlier_s)
        else:
            cells += _short_rates(first)
        yield finding(first, cells, message, numbers, certain=one and len(sizes) > 1)


def _median(level: Level, metric: str) -> Span | None:
    value = level.get(metric, "p50")
    if value is not None:
        return value.span if value.value > 0 else None
    time = latency(level) if metric == "e2el" else None
    return None if time is None else time.span


def _excess(level: Level, metric: str, statistic: str | None) -> float:
    value, median = level.get(metric, statistic), _median(level, metric)
    return 0.0 if value is None or median is None else max(0.0, value.value - median.mid)


def _outlier_sizes(level: Level, tails: list[tuple[Value, Span]]) -> list[float]:
    """By metric, how much longer than the median the one slowest request took, if all others took the median:
    the weight of the largest value in a percentile is known, and the highest has most of it. Nothing where
    the two largest or more decide."""
    count = level.num_requests
    if count is None or count < 3:
        return []
    sizes: dict[str, float] = {}
    for value, median in tails:  # by rising rank
        rank = (value.rank or 0) / 100
        place = rank * (count - 1) if level.law == "linear" else rank * (count + 1) - 1
        share = place - (count - 2)
        if share > 0:
            sizes[value.metric] = (value.value - median.mid) / share
    return list(sizes.values())


def _rates(level: Level) -> list[Value]:
    return level.of("output_throughput", "request_throughput")


def _slowed_rates(level: Level, outlier_s: float) -> list[Value]:
    """The throughputs of one slot that an outlier of this size moves by 2 % or more, as they show."""
    rate, time, count = completion_rate(level), _median(level, "e2el"), level.num_requests
    if rate is None or time is None or count is None or level.concurrency != 1:
        return []
    missing = outlier_s / (count * time.mid)
    seen = 1 / (rate.span * time).mid - 1
    return _rates(level) if missing > 0.02 and seen > missing / 2 else []


def _short_rates(level: Level) -> list[Value]:
    rate, time = completion_rate(level), _median(level, "e2el")
    if rate is None or time is None or level.concurrency != 1:
        return []
    return _rates(level) if (rate.span * time).high < SHORT else []


@each_row
def percentile_past_maximum(_report: Report, level: Level) -> Iterator[Finding]:
    """Of few values the exclusive law takes percentiles from past the largest."""
    asked(level.law == "exclusive")
    count = needed(level.num_requests)
    past = [value for value in level.of("ttft", "tpot", "e2el") if level.past(value)]
    if past:
        necessary = math.ceil(max((v.rank or 0) / (100 - (v.rank or 0)) for v in past))
        message = (
            f"of {count} requests the exclusive law extrapolates these past the slowest one; it takes "
            f"{necessary} requests"
        )
        numbers = {"requests": float(count), "needed": float(necessary)}
        yield finding(level, past, message, numbers, certain=True)
