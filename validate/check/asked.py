"""Which rules could be asked of a report: what each needs of a row."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from servecast.validate.check.finding import completion_rate, implied_tokens, latency, token_time, tokens_each
from servecast.validate.check.table import LATENCIES, Level, Report

Has = Callable[[Report, Level], bool]


def not_asked(report: Report, rules: Iterable[str]) -> dict[str, str]:
    """The rules of which no row has what they need, and what that is."""
    return {
        rule: need
        for rule in rules
        if rule in _NEEDS
        for need, has in [_NEEDS[rule]]
        if not any(has(report, level) for level in report.levels)
    }


def _statistics(level: Level, least: int) -> bool:
    """Whether a latency has so many statistics."""
    return any(len([v for v in level.of(metric) if v.statistic != "std"]) >= least for metric in LATENCIES)


def _rates(level: Level) -> bool:
    return bool(level.of("request_throughput", "output_throughput"))


def _latency(level: Level) -> bool:
    return latency(level) is not None or level.get("ttft", "mean", "p50") is not None


def _loads(report: Report) -> bool:
    """Whether a series has two loads with tails."""
    return any(len(series) > 1 and series[0].percentiles("ttft") for series in report.series())


def _prompts(report: Report) -> bool:
    lengths = {level.prompt.mean.low for level in report.levels if level.prompt is not None}
    return len(lengths) > 1


GPU = "--model-config and --gpu"
_NEEDS: dict[str, tuple[str, Has]] = {
    "all-failed": ("a number of failures", lambda r, v: v.failed is not None or bool(v.of("success"))),
    "records": ("the requests behind the figures", lambda r, v: bool(v.records)),
    "percentile-order": ("two statistics of a latency", lambda r, v: _statistics(v, 2)),
    "e2e-sum": (
        "E2E and TTFT, and the time between tokens with output lengths",
        lambda r, v: bool(v.of("e2el") and v.of("ttft")),
    ),
    "throughput-requests": (
        "tokens/s, requests/s and output lengths",
        lambda r, v: v.output is not None and implied_tokens(v) is not None,
    ),
    "wall-time": (
        "a rate and the number of requests",
        lambda r, v: v.num_requests is not None and completion_rate(v) is not None,
    ),
    "littles-law": (
        "the concurrency, a rate and a latency",
        lambda r, v: v.concurrency is not None and completion_rate(v) is not None and _latency(v),
    ),
    "few-waves": (
        "the concurrency, the number of requests, a rate and a latency",
        lambda r, v: (
            None not in (v.concurrency, v.num_requests)
            and completion_rate(v) is not None
            and latency(v) is not None
        ),
    ),
    "send-rate": (
        "the offered rate, requests/s and a latency",
        lambda r, v: v.open_loop and v.get("request_throughput") is not None and latency(v) is not None,
    ),
    "drain": (
        "the offered rate, tokens/s and output lengths",
        lambda r, v: v.open_loop and v.get("output_throughput") is not None and tokens_each(r, v) is not None,
    ),
    "open-loop": (
        "the offered rate, a rate and a latency",
        lambda r, v: v.open_loop and completion_rate(v) is not None and latency(v) is not None,
    ),
    "warm-up": ("two loads with a median and a tail of TTFT", lambda r, v: _loads(r)),
    "percentile-past-maximum": (
        "the exclusive law of percentiles, and the number of requests",
        lambda r, v: v.law == "exclusive" and v.num_requests is not None,
    ),
    "zero-latency": ("a latency", lambda r, v: bool(v.of(*LATENCIES))),
    "halved-itl": (
        "TPOT or ITL, with output lengths",
        lambda r, v: token_time(v) is not None or bool(v.of("itl")),
    ),
    "clock-grid": (
        "four rows of a latency",
        lambda r, v: len([each for each in r.levels if each.of(*LATENCIES)]) >= 4,
    ),
    "roofline-decode": (
        f"TPOT, ITL or E2E, {GPU}",
        lambda r, v: v.hardware is not None and bool(v.of("tpot", "itl", "e2el")),
    ),
    "roofline-prefill": (
        f"TTFT, the prompts' length, {GPU}",
        lambda r, v: v.hardware is not None and v.prompt is not None and bool(v.of("ttft")),
    ),
    "prefill-difference": (
        f"TTFT at two lengths of prompts, {GPU}",
        lambda r, v: v.hardware is not None and bool(v.of("ttft")) and _prompts(r),
    ),
    "roofline-throughput": (
        f"tokens/s, {GPU}",
        lambda r, v: v.hardware is not None and v.get("output_throughput") is not None,
    ),
    "repeated-prompts": (
        "a scenario that says which prompts were sent before",
        lambda r, v: v.hardware is not None and v.repeated is not None,
    ),
    "kv-arithmetic": (
        f"KV usage, requests running or waiting, or {GPU}",
        lambda r, v: v.hardware is not None or bool(v.of("kv_usage", "running", "waiting", "gpu_memory")),
    ),
    "kv-capacity": (
        f"the concurrency, the prompts' length, TTFT p50 and a latency, {GPU}",
        lambda r, v: (
            None not in (v.hardware, v.concurrency, v.prompt, v.get("ttft", "p50")) and latency(v) is not None
        ),
    ),
}
