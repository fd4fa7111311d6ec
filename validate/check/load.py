"""Rules about how the load was made and what a rate was taken over: Little's law, sending, drain, caps."""

from __future__ import annotations

import math
from collections.abc import Iterator

from servecast.validate.check.finding import (
    IDLE,
    LOW_RATE_OF_SATURATION,
    SAME_RATE,
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
    reports_send_rate,
    send_window_s,
    tokens_each,
)
from servecast.validate.check.table import Level, Report, Span, Value, exactly

_MEASURED, _ESTIMATED = 1.02, 1.15  # Little's law over its bound, with the mean latency and with a median
_HARDLY = 0.02  # share of a closed loop's slots in use, under which no drain and no wave explains it
_HIGHEST, _HIGHEST_OF_EQUAL = 99, 90  # ranks that stand for the longest latency; outputs of equal length
_LONGEST = 2.0  # times the highest percentile, of outputs that differ
# of rate x tokens, where the number of requests, and so the noise of their rate, is not known
_SHORT_BY_SIGHT = 0.8


@each_row
def littles_law(_report: Report, level: Level) -> Iterator[Finding]:
    """In flight = throughput x latency. It cannot exceed a closed loop's slots, and fills them."""
    slots, flight = needed(level.concurrency), in_flight(level)
    asked(completion_rate(level) and (latency(level) or level.get("ttft", "mean", "p50")))
    if flight is None:
        yield from _waiting_alone(level, slots)
        return
    over = flight.span.low > slots * (_MEASURED if flight.exact else _ESTIMATED)
    busy, known = _busy(level, slots)
    hardly = flight.span.high < _HARDLY * slots and (level.num_requests or slots) >= slots
    numbers = {"in_flight": flight.span.mid, "concurrency": float(slots)}
    if hardly and not level.open_loop:
        message = (
            f"throughput x latency is {flight.span.mid:.2g} requests in flight of {slots}: the latencies "
            "are of another unit (seconds that are called ms?), or the load was another"
        )
        yield finding(level, flight.values, message, numbers)
    elif over or flight.span.high < IDLE * busy:
        why = "more than there can be" if over else "another load, or a latency that leaves a part out"
        message = f"throughput x latency is {flight.span.mid:.4g} requests in flight of {slots}: {why}"
        yield finding(level, flight.values, message, numbers, certain=flight.exact and (over or known))


def _waiting_alone(level: Level, slots: int) -> Iterator[Finding]:
    """Where the latency is not known: the requests before their first token are not more than the slots."""
    rate, first = completion_rate(level), level.get("ttft", "mean", "p50")
    if rate is None or first is None or level.whole_run or not level.all_answered:
        return
    exact = rate.exact and first.statistic == "mean"
    before = rate.span * first.span
    if before.low > slots * (_MEASURED if exact else _ESTIMATED):
        message = (
            f"throughput x TTFT alone is {before.mid:.4g} requests in flight of {slots}, and no latency is "
            "shorter than that of its first token"
        )
        numbers = {"in_flight": before.mid, "concurrency": float(slots)}
        yield finding(level, [*rate.values, first], message, numbers, certain=exact)


def _busy(level: Level, slots: int) -> tuple[float, bool]:
    """The least slots that a closed loop keeps busy on average (0 where that is not known), and whether this
    rests on the longest latency: no slot idles longer than that at the end, and none before."""
    rate, count = completion_rate(level), level.num_requests
    if rate is None or count is None or count < WAVES * slots or level.open_loop:
        return 0.0, False
    equal, most = level.equal_outputs, level.get("e2el", "max")
    ranked = [
        v for v in level.percentiles("e2el") if (v.rank or 0) >= (_HIGHEST_OF_EQUAL if equal else _HIGHEST)
    ]
    if most is None and not ranked:
        return 0.0, False
    longest = most.value if most is not None else ranked[-1].value * (1.0 if equal else _LONGEST)
    idle = longest * rate.span.high / count
    return slots - (slots - 1) * min(1.0, idle), most is not None


@each_row
def send_rate(report: Report, level: Level) -> Iterator[Finding]:
    """Requests/s that equal the offered rate although fewer were completed are the rate of sending."""
    rate, requests = needed(level.request_rate), needed(level.get("request_throughput"))
    each, tokens = tokens_each(report, level), level.get("output_throughput")
    if reports_send_rate(report, level):
        assert each is not None
        assert tokens is not None
        done = (tokens.span / each).mid
        message = (
            f"requests/s is the offered rate, {requests.value:.4g}, but the tokens are those of "
            f"{done:.4g} requests/s: it is the rate of sending"
        )
        numbers = {"requests_s": requests.value, "offered_rate": rate, "completed_s": done}
        known = level.output is not None
        yield finding(level, [requests], message, numbers, certain=known, weight=requests.value / done)
        return
    time, window = needed(latency(level)), send_window_s(level)
    if tokens is not None or window is None or not level.all_answered:
        return
    assert level.num_requests is not None
    # the last are sent, and take their time
    most = (exactly(level.num_requests) / (window + time.span)).high
    if abs(requests.value / rate - 1) <= SAME_RATE and requests.span.low > most / LOW_RATE_OF_SATURATION:
        message = (
            f"requests/s is the offered rate, but with a latency of {time.span.mid:.4g} s not more than "
            f"{most:.4g} requests/s can be completed: it is the rate of sending"
        )
        numbers = {"requests_s": requests.value, "offered_rate": rate, "most_completed_s": most}
        yield finding(level, [requests], message, numbers, weight=requests.value / most)


@each_row
def drain(report: Report, level: Level) -> Iterator[Finding]:
    """All requests were answered, yet tokens/s are fewer than rate x tokens: the time after the last send,
    in which only what is left runs, is counted."""
    rate, tokens = needed(level.request_rate), needed(level.get("output_throughput"))
    each = needed(tokens_each(report, level))
    if not level.all_answered or tokens.value <= 0:
        return
    of_sending = reports_send_rate(report, level)
    if not (of_sending or _unsaturated_but_short(level, each)):
        return
    longer = (exactly(rate) * each / tokens.span).mid
    numbers = {"output_tok_s": tokens.value, "rate_x_tokens": rate * each.mid, "time_over_sending": longer}
    took = f"{longer:.3g} times as long as sending"
    if level.num_requests is not None:
        window = level.num_requests / rate
        numbers |= {"sending_s": window, "drain_s": window * (longer - 1)}
        took = f"{window * longer:.0f} s, of which sending took {window:.0f} s"
    message = (
        f"{tokens.value:.4g} tokens/s, where {rate:g} requests/s of {each.mid:.4g} tokens are "
        f"{rate * each.mid:.4g}, and all were answered: it is taken over {took}"
    )
    sure = of_sending and level.output is not None
    yield finding(level, [tokens], message, numbers, certain=sure, weight=longer)


def _unsaturated_but_short(level: Level, each: Span) -> bool:
    """Too few tokens/s at a rate at which nothing queues, where requests/s do not say the same."""
    tokens, waiting, rate = level.get("output_throughput"), level.get("waiting", "max"), level.request_rate
    assert tokens is not None
    assert rate is not None
    least = _SHORT_BY_SIGHT if level.num_requests is None else SHORT - 3 / math.sqrt(level.num_requests)
    if level.get("request_throughput") is not None or tokens.span.high >= least * rate * each.low:
        return False
    first, time = level.get("ttft", "mean", "p50"), latency(level)
    quick = first is not None and time is not None and first.value < 0.2 * time.span.mid
    return quick if waiting is None else waiting.value == 0


def open_loop(report: Report) -> Iterator[Finding]:
    """Past saturation an open loop's queue grows: the last request waits for all that is left. Where
    latencies do not, arrivals were held back, and the loop was closed."""
    asked([v for v in report.levels if v.open_loop and completion_rate(v) and latency(v)])
    for series in report.series():
        held: list[tuple[Level, Span, tuple[Value, ...], float]] = []
        for level in series:
            rate, done, time = level.request_rate, completion_rate(level), latency(level)
            if rate is None or done is None or time is None or not level.all_answered:
                continue
            if done.span.high >= LOW_RATE_OF_SATURATION * rate:
                continue
            queued = done.span * time.span
            held.append((level, queued, (*done.values, *time.values), rate))
            window = send_window_s(level)
            if window is None:
                continue
            assert level.num_requests is not None
            late = level.num_requests / done.span.high - window.high  # from the last send to the last finish
            tail = [v.value for v in level.of("e2el", "ttft") if (v.rank or 0) >= 90 or v.statistic == "max"]
            slowest = max(tail, default=0.0)
            if time.span.high < 0.25 * late and slowest < 0.5 * late:
                message = (
                    f"offered {rate:g} requests/s and {done.span.mid:.4g} completed, the last request would "
                    f"have waited {late:.4g} s, yet latencies are {time.span.mid:.4g} s: a cap on requests "
                    "in flight held the sending back"
                )
                numbers = {"offered_rate": rate, "completed_s": done.span.mid, "latency_s": time.span.mid}
                numbers["last_latency_s"] = late
                cells = [*done.values, *time.values]
                yield finding(level, cells, message, numbers, weight=late / time.span.mid)
        if len(held) < 2 or any(window is not None for window in map(send_window_s, series)):
            continue
        spans = [queued for _, queued, _, _ in held]
        rates = [rate for *_, rate in held]
        same = max(span.low for span in spans) <= 1.05 * min(span.high for span in spans)
        if same and max(rates) > 1.2 * min(rates):
            for level, queued, values, rate in held:
                message = (
                    f"past saturation the requests in flight stay at {queued.mid:.4g} whatever the offered "
                    "rate: a cap held the sending back"
                )
                yield finding(level, values, message, {"offered_rate": rate, "in_flight": queued.mid})
