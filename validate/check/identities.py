"""Rules that hold whatever was served: order of percentiles, sums of latencies, tokens against requests."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

from servecast.validate.check.finding import (
    Finding,
    completion_rate,
    finding,
    gaps_ratio,
    implied_tokens,
    reports_send_rate,
    token_time,
    tokens_each,
)
from servecast.validate.check.table import LATENCIES, Level, Report, exactly

_SLACK = 0.02  # of a sum, for clocks that start and stop a little apart
_DIFFERENT = 1.6  # how far a mean TPOT times the mean length may be off the mean of their product
_CLOCK_S = 2e-3  # between a tool's own stamps and those that it saves
_MEDIANS = 0.30  # the median of a sum against the sum of medians


def records(report: Report) -> Iterator[Finding]:
    """A result's figures are those of the requests that it lists."""
    for level in report.levels:
        for value, again in level.records:
            clock_s = _CLOCK_S if value.metric in ("ttft", "e2el") else 0.0
            if abs(value.value - again) > _SLACK * max(abs(again), value.value) + clock_s:
                message = (
                    f"{value.column} is {value.value:.4g}, but {again:.4g} of the requests that are listed"
                )
                numbers = {"reported": value.value, "of_records": again}
                yield finding(level, [value], message, numbers, certain=True)


def all_failed(report: Report) -> Iterator[Finding]:
    """A run in which no request was answered measured nothing."""
    for level in report.levels:
        success, failed, sent = level.get("success"), level.failed or 0.0, level.num_requests
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


def percentile_order(report: Report) -> Iterator[Finding]:
    """Percentiles rise with their rank, lie under the maximum, and a share 1-q of the requests takes at least
    the q-th percentile, so that the mean is at least (1-q) times it."""
    for level in report.levels:
        for metric in LATENCIES:
            ranked = level.percentiles(metric)
            for lower, higher in pairwise(ranked):
                if lower.span.low > higher.span.high:
                    numbers = {lower.statistic or "": lower.value, higher.statistic or "": higher.value}
                    yield finding(
                        level,
                        [lower, higher],
                        f"{metric} {lower.statistic} is above {higher.statistic}",
                        numbers,
                        certain=True,
                    )
            most, least, mean = (level.get(metric, name) for name in ("max", "min", "mean"))
            inner = [*ranked, *([mean] if mean is not None else [])]
            for value in inner:
                beyond = most is not None and value.span.low > most.span.high and level.law == "linear"
                below = least is not None and value.span.high < least.span.low
                if beyond or below:
                    other = most if beyond else least
                    assert other is not None
                    message = (
                        f"{metric} {value.statistic} is "
                        f"{'above the largest' if beyond else 'below the least'}"
                    )
                    numbers = {value.statistic or "": value.value, other.statistic or "": other.value}
                    yield finding(level, [value, other], message, numbers, certain=True)
            if mean is None:
                continue
            for value in ranked:
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


def e2e_sum(report: Report) -> Iterator[Finding]:
    """A request's latency is its TTFT and its gaps: exactly in the means, by bounds in the percentiles."""
    for level in report.levels:
        for total in level.of("e2el"):
            first = level.get("ttft", total.statistic)
            if total.statistic != "std" and first is not None and total.span.high < first.span.low:
                message = f"{total.statistic} of the whole latency is under that of its first token"
                numbers = {"e2e_s": total.value, "ttft_s": first.value}
                yield finding(level, [total, first], message, numbers, certain=True)
        sums = [_sum_of_means(level, "tpot"), _sum_of_means(level, "itl"), _sum_of_medians(level)]
        found = [finding for finding in sums if finding is not None]
        yield from [f for f in found if f.confidence == "certain"][:1] or found[:1]


def _sum_of_means(level: Level, metric: str) -> Finding | None:
    total, first, rest = level.get("e2el", "mean"), level.get("ttft", "mean"), token_time(level, metric)
    if total is None or first is None or rest is None:
        return None
    if total.span.high < first.span.low:
        return None  # nothing is left for the gaps
    parts = first.span + rest.span
    slack = _SLACK * total.value
    if not rest.exact:  # the mean TPOT of outputs that differ: long ones may have the shorter gaps
        if rest.values[0].statistic != "mean":
            return None
        slack = (_DIFFERENT - 1) * max(total.value, parts.mid)
    if total.span.low - slack <= parts.high and parts.low <= total.span.high + slack:
        return None
    ratio = gaps_ratio(level, metric)
    if ratio is not None and ratio.twice:
        return None  # halved-itl says it
    merged = metric == "itl" and parts.mid > total.value
    message = (
        f"mean latency {total.value:.4g} s, but TTFT and the gaps between tokens add up to {parts.mid:.4g} s"
        + (", or several tokens came in an event" if merged else "")
    )
    numbers = {"e2e_s": total.value, "ttft_s": first.value, "tokens_s": rest.span.mid}
    return finding(
        level,
        [total, first, *rest.values],
        message,
        numbers,
        certain=rest.exact and not merged,
        weight=abs(total.value / parts.mid - 1),
    )


def _sum_of_medians(level: Level) -> Finding | None:
    """For equal lengths: p_q of the sum is at least that of either part, and near the sum of the medians."""
    if level.gaps is None or level.output is None or not level.output.fixed:
        return None
    total, first = level.get("e2el", "p50"), level.get("ttft", "p50")
    gap = level.get("tpot", "p50") or level.get("itl", "p50")
    if total is None or first is None or gap is None or gap.value <= 0:
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
    return finding(
        level, [total, first, gap], message, numbers, weight=abs((total.value - first.value) / decode.mid - 1)
    )


def _spread(level: Level) -> float:
    """How far TTFT's highest percentile is above its median, s: where it is far, medians do not add up."""
    ranked = level.percentiles("ttft")
    median = level.get("ttft", "p50")
    return 0.0 if median is None or not ranked else ranked[-1].value - median.value


def throughput_against_requests(report: Report) -> Iterator[Finding]:
    """Tokens/s over requests/s are the tokens of a request."""
    for level in report.levels:
        each, implied = tokens_each(report, level), implied_tokens(level)
        tokens, requests = level.get("output_throughput"), level.get("request_throughput")
        if level.output is None or each is None or implied is None or reports_send_rate(report, level):
            continue
        if implied.low > each.high * (1 + _SLACK) or implied.high < each.low * (1 - _SLACK):
            message = (
                f"tokens/s over requests/s is {implied.mid:.4g} tokens a request, not {each.mid:.4g}: the "
                "two are not over the same time, or not of the same requests"
            )
            numbers = {"tokens_a_request": each.mid, "implied_tokens_a_request": implied.mid}
            yield finding(level, [tokens, requests], message, numbers, certain=True)


def wall_time(report: Report) -> Iterator[Finding]:
    """The whole run is requests over requests/s, and no request takes longer."""
    for level in report.levels:
        rate = completion_rate(level)
        yield from _own_duration(level)
        if rate is None or rate.span.low <= 0 or level.num_requests is None or level.whole_run:
            continue
        longest = level.num_requests / rate.span.low
        for value in level.of("ttft", "e2el"):
            rank = value.rank
            if (
                rank is not None
                and level.law == "exclusive"
                and rank / 100 * (level.num_requests + 1) > level.num_requests
            ):
                continue  # past the largest
            if value.statistic != "std" and value.span.low > longest * (1 + _SLACK):
                message = (
                    f"{value.metric} {value.statistic} of {value.value:.4g} s in a run that by its "
                    f"throughput took {longest:.4g} s"
                )
                numbers = {"latency_s": value.value, "run_s": longest}
                yield finding(level, [value, *rate.values], message, numbers, certain=True)


def _own_duration(level: Level) -> Iterator[Finding]:
    """A rate times the duration that the run says itself is what was counted."""
    count, tokens = level.num_requests, level.output
    if level.duration_s is None or count is None:
        return
    totals = {"request_throughput": exactly(count)}
    if tokens is not None:
        totals["output_throughput"] = exactly(count) * tokens.mean
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
            yield finding(
                level,
                [rate],
                message,
                numbers,
                certain=True,
                weight=abs(counted.mid / total.mid - 1) if total.mid else 1.0,
            )
