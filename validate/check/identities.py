"""Rules that hold whatever was served: order of percentiles, sums of latencies, tokens against requests."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

from servecast.validate.check.finding import (
    Finding,
    asked,
    completion_rate,
    each_row,
    finding,
    gaps_ratio,
    implied_tokens,
    needed,
    reports_send_rate,
    token_time,
    tokens_each,
)
from servecast.validate.check.table import LATENCIES, Level, Report, exactly

_SLACK = 0.02  # of a sum, for clocks that start and stop a little apart
_DIFFERENT = 1.6  # how far a mean TPOT times the mean length may be off the mean of their product
_CLOCK_S = 2e-3  # between a tool's own stamps and those that it saves
_MEDIANS = 0.30  # the median of a sum against the sum of medians


@each_row
def records(_report: Report, level: Level) -> Iterator[Finding]:
    """A result's figures are those of the requests that it lists."""
    asked(level.records)
    for value, again in level.records:
        clock_s = _CLOCK_S if value.metric in ("ttft", "e2el") else 0.0
        if abs(value.value - again) > _SLACK * max(abs(again), value.value) + clock_s:
            message = f"{value.column} is {value.value:.4g}, but {again:.4g} of the requests that are listed"
            numbers = {"reported": value.value, "of_records": again}
            yield finding(level, [value], message, numbers, certain=True)


@each_row
def all_failed(_report: Report, level: Level) -> Iterator[Finding]:
    """A run in which no request was answered measured nothing."""
    success, failed, sent = level.get("success"), level.failed or 0.0, level.num_requests
    asked(level.failed is not None or level.of("success"))
    none = success is not None and success.span.high <= 0
    if sent is None:  # none completed, or it does not say
        none |= failed > 0 and not any(value.value > 0 for value in level.values.values())
    else:
        none |= failed >= sent
    if none:
        count = f"all {failed:g} requests" if failed else "all requests"
        message = f"{count} failed: whatever else the row says was not measured"
        numbers = {"failed": failed, "answered": 0.0}
        yield finding(level, level.values.values(), message, numbers, certain=True)


@each_row
def percentile_order(_report: Report, level: Level) -> Iterator[Finding]:
    """Percentiles rise with their rank, lie under the maximum, and a share 1-q of the requests takes at least
    the q-th percentile, so that the mean is at least (1-q) times it."""
    asked([m for m in LATENCIES if sum(v.statistic != "std" for v in level.of(m)) > 1])
    for metric in LATENCIES:
        ranked = level.percentiles(metric)
        for lower, higher in pairwise(ranked):
            if lower.span.low > higher.span.high:
                message = f"{metric} {lower.statistic} is above {higher.statistic}"
                numbers = {lower.statistic or "": lower.value, higher.statistic or "": higher.value}
                yield finding(level, [lower, higher], message, numbers, certain=True)
        most, least, mean = (level.get(metric, name) for name in ("max", "min", "mean"))
        for value in [*ranked, *([mean] if mean is not None else [])]:
            beyond = most is not None and value.span.low > most.span.high and level.law == "linear"
            below = least is not None and value.span.high < least.span.low
            other = most if beyond else least
            if other is not None and (beyond or below):
                what = "above the largest" if beyond else "below the least"
                numbers = {value.statistic or "": value.value, other.statistic or "": other.value}
                message = f"{metric} {value.statistic} is {what}"
                yield finding(level, [value, other], message, numbers, certain=True)
        for value in ranked if mean is not None else ():
            assert mean is not None
            share = 1 - (value.rank or 0) / 100
            if level.num_requests is not None and share * level.num_requests < 1:
                continue  # an interpolation, which need not be a request's value
            if mean.span.high < share * value.span.low * (1 - _SLACK):
                message = (
                    f"{100 * share:.3g} % of the requests take {value.value:.4g} s or more, so the mean "
                    f"of {metric} is {share * value.value:.4g} s or more, not {mean.value:.4g}"
                )
                numbers = {"mean": mean.value, "least_mean": share * value.value}
                yield finding(level, [mean, value], message, numbers, certain=True)


@each_row
def e2e_sum(_report: Report, level: Level) -> Iterator[Finding]:
    """A request's latency is its TTFT and its gaps: exactly in the means, by bounds in the percentiles."""
    asked(level.of("e2el") and level.of("ttft"))
    for total in level.of("e2el"):
        first = level.get("ttft", total.statistic)
        if total.statistic != "std" and first is not None and total.span.high < first.span.low:
            message = f"{total.statistic} of the whole latency is under that of its first token"
            numbers = {"e2e_s": total.value, "ttft_s": first.value}
            yield finding(level, [total, first], message, numbers, certain=True)
    sums = [_sum_of_means(level, "tpot"), _sum_of_means(level, "itl"), _sum_of_medians(level)]
    found = [each for each in sums if each is not None]
    yield from [each for each in found if each.confidence == "certain"][:1] or found[:1]


def _sum_of_means(level: Level, metric: str) -> Finding | None:
    total, first, rest = level.get("e2el", "mean"), level.get("ttft", "mean"), token_time(level, metric)
    if total is None or first is None or rest is None or total.span.high < first.span.low:
        return None  # or nothing is left for the gaps
    parts = first.span + rest.span
    slack = _SLACK * total.value
    if not rest.exact:  # the mean TPOT of outputs that differ: long ones may have the shorter gaps
        if rest.values[0].statistic != "mean":
            return None
        slack = (_DIFFERENT - 1) * max(total.value, parts.mid)
    ratio = gaps_ratio(level, metric)
    if total.span.low - slack <= parts.high and parts.low <= total.span.high + slack:
        return None
    if ratio is not None and ratio.twice:
        return None  # halved-itl says it
    merged = metric == "itl" and parts.mid > total.value
    message = (
        f"mean latency {total.value:.4g} s, but TTFT and the gaps between tokens add up to {parts.mid:.4g} s"
        + (", or several tokens came in an event" if merged else "")
    )
    numbers = {"e2e_s": total.value, "ttft_s": first.value, "tokens_s": rest.span.mid}
    cells, weight = [total, first, *rest.values], abs(total.value / parts.mid - 1)
    return finding(level, cells, message, numbers, certain=rest.exact and not merged, weight=weight)


def _sum_of_medians(level: Level) -> Finding | None:
    """For equal lengths: p_q of the sum is at least that of either part, and near the sum of the medians."""
    total, first = level.get("e2el", "p50"), level.get("ttft", "p50")
    gap = level.get("tpot", "p50") or level.get("itl", "p50")
    if level.gaps is None or not level.equal_outputs or total is None or first is None or gap is None:
        return None
    if gap.value <= 0:
        return None
    decode = gap.span * level.gaps
    low = total.span.high < (1 - _MEDIANS) * (first.span.low + decode.low)
    ratio = gaps_ratio(level, gap.metric)
    # a median gap says nothing of the long ones; a median TPOT does
    high = gap.metric == "tpot" and total.span.low > (1 + _MEDIANS) * (first.span.high + decode.high)
    if not (low or high) or (ratio is not None and ratio.twice) or _spread(level) > _MEDIANS * total.value:
        return None  # halved-itl says a ratio of 2
    message = (
        f"median latency {total.value:.4g} s, but the medians of TTFT and of the gaps between tokens add up "
        f"to {first.value + decode.mid:.4g} s"
    )
    numbers = {"e2e_s": total.value, "ttft_s": first.value, "tokens_s": decode.mid}
    weight = abs((total.value - first.value) / decode.mid - 1)
    return finding(level, [total, first, gap], message, numbers, weight=weight)


def _spread(level: Level) -> float:
    """How far TTFT's highest percentile is above its median, s: where it is far, medians do not add up."""
    ranked = level.percentiles("ttft")
    median = level.get("ttft", "p50")
    return 0.0 if median is None or not ranked else ranked[-1].value - median.value


@each_row
def throughput_against_requests(report: Report, level: Level) -> Iterator[Finding]:
    """Tokens/s over requests/s are the tokens of a request."""
    asked(level.output is not None)
    implied, each = needed(implied_tokens(level)), tokens_each(report, level)
    if each is None or reports_send_rate(report, level):
        return
    if implied.low > each.high * (1 + _SLACK) or implied.high < each.low * (1 - _SLACK):
        message = (
            f"tokens/s over requests/s is {implied.mid:.4g} tokens a request, not {each.mid:.4g}: the "
            "two are not over the same time, or not of the same requests"
        )
        numbers = {"tokens_a_request": each.mid, "implied_tokens_a_request": implied.mid}
        rates = [level.get("output_throughput"), level.get("request_throughput")]
        yield finding(level, rates, message, numbers, certain=True)


@each_row
def wall_time(_report: Report, level: Level) -> Iterator[Finding]:
    """The whole run is requests over requests/s, and no request takes longer."""
    yield from _own_duration(level)
    count, rate = needed(level.num_requests), needed(completion_rate(level))
    if rate.span.low <= 0 or level.whole_run:
        return
    longest = count / rate.span.low
    for value in level.of("ttft", "e2el"):
        if value.statistic != "std" and value.span.low > longest * (1 + _SLACK) and not level.past(value):
            message = (
                f"{value.metric} {value.statistic} of {value.value:.4g} s in a run that by its "
                f"throughput took {longest:.4g} s"
            )
            numbers = {"latency_s": value.value, "run_s": longest}
            yield finding(level, [value, *rate.values], message, numbers, certain=True)


def _own_duration(level: Level) -> Iterator[Finding]:
    """A rate times the duration that the run says itself is what was counted."""
    if level.duration_s is None or level.num_requests is None:
        return
    totals = {"request_throughput": exactly(level.num_requests)}
    if level.output is not None:
        totals["output_throughput"] = exactly(level.num_requests) * level.output.mean
    for metric, total in totals.items():
        rate = level.get(metric)
        if rate is None:
            continue
        counted = rate.span * exactly(level.duration_s)
        if counted.high < total.low * (1 - _SLACK) or counted.low > total.high * (1 + _SLACK):
            message = (
                f"{rate.column} of {rate.value:.4g} over the {level.duration_s:.4g} s of the run is "
                f"{counted.mid:.4g}, not {total.mid:.4g}"
            )
            numbers = {"rate": rate.value, "duration_s": level.duration_s, "total": total.mid}
            weight = abs(counted.mid / total.mid - 1) if total.mid else 1.0
            yield finding(level, [rate], message, numbers, certain=True, weight=weight)
