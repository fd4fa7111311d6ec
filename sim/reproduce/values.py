"""The value of a reported column on a simulated run, as the table's source would have measured it."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from servecast.sim.inputs.errors import InputError
from servecast.sim.metrics.metrics import (
    counted,
    gauges_at,
    good_requests,
    latencies,
    series,
    statistic,
    statistics_of,
)
from servecast.sim.metrics.records import Run
from servecast.sim.reproduce import inference_perf as inference_perf_report
from servecast.sim.scenario.deployment import Deployment
from servecast.sim.scenario.reported import GAUGES, Column, Reported

GIB = 1 << 30
SCRAPE_INTERVAL_S = 15.0  # Prometheus' usual interval; gauges are seen at its scrapes only
_SCALE = {"s": 1.0, "ms": 1000.0}

Value = tuple[float, float | None]  # as reported, and the true one where the harness measures another


def values_of(
    run: Run, columns: Sequence[str], reported: Reported, deployment: Deployment
) -> dict[str, Value]:
    """The values of a row's columns, in their units."""
    found: dict[str, Value] = {}
    for name in columns:
        column, true = reported.columns[name], None
        if reported.harness == "inference_perf" and column.metric in inference_perf_report.METRICS:
            true = inference_perf_report.true_value(run, column) * _SCALE.get(column.unit, 1.0)
        found[name] = measure(run, column, reported, deployment), true
    return found


def summed_up(
    columns: Sequence[str], reported: Reported, parts: Sequence[tuple[int, dict[str, Value]]]
) -> dict[str, Value]:
    """The values of a row that sums up others, as ``Reported.summary`` says. parts: requests and values."""
    requests = np.array([count for count, _ in parts], dtype=float)

    def over(name: str, values: Sequence[float]) -> float:
        column = reported.columns[name]
        if column.metric == "request_throughput":
            return float(requests.sum() / (requests / np.array(values)).sum())
        weights = None if column.statistic is None else requests
        return float(np.average(values, weights=weights))

    found: dict[str, Value] = {}
    for name in columns:
        values = [row[name][0] for _, row in parts]
        true = [value for _, row in parts if (value := row[name][1]) is not None]
        found[name] = over(name, values), over(name, true) if true else None
    return found


def measure(run: Run, column: Column, reported: Reported, deployment: Deployment) -> float:
    """The value of a column in its unit, as the table's source would have measured it on this run."""
    metric, extra = column.metric, reported.events_beyond_tokens
    if reported.harness == "inference_perf" and metric in inference_perf_report.METRICS:
        value = inference_perf_report.measure(run, column, output_tokens_each=reported.output_tokens_each)
        return value * _SCALE.get(column.unit, 1.0)
    done = run.requests[run.requests["status"] == "finished"]
    if metric == "gpu_memory":
        return deployment.memory.memory_used_bytes / GIB
    if metric in GAUGES:
        scale = 100 if column.unit == "percent" else 1
        if reported.gauges == "scrapes":
            return _gauge_peak(run, metric) * scale
        assert column.statistic is not None
        seen = gauges_at(run, metric, run.requests["arrival"].to_numpy()).ravel()
        return statistics_of(seen, None, [column.statistic], reported.percentile_law)[0] * scale
    if metric == "makespan":
        return float(done["finish"].max() - run.requests["sent"].min())
    if metric == "success":
        return len(done) / len(run.requests)
    part, seconds = counted(run)
    rated = part.requests[part.requests["status"] == "finished"]
    if metric == "output_throughput":
        return float((rated["output_tokens"] + extra).sum()) / seconds
    if metric == "request_throughput":
        return len(rated) / seconds
    if metric == "goodput":
        goodput = deployment.scenario.goodput_limits
        if goodput is None:
            what = "a goodput column, but no limits"
            raise InputError(what, where="goodput", fix='Add them, as goodput: "ttft:1000".')
        return 100 * good_requests(run, goodput) / len(run.requests)
    assert column.statistic is not None
    name = "p50" if column.statistic == "median" else column.statistic
    if metric == "tpot" and extra:
        values = latencies(run.requests)
        events = done["output_tokens"] + extra - 1
        sample = ((values["e2el"] - values["ttft"]) / events).to_numpy()
        seconds = statistics_of(sample, None, [name], reported.percentile_law)[0]
    else:
        seconds = statistic(run, metric, name, law=reported.percentile_law)
    return seconds * _SCALE[column.unit]


def _gauge_peak(run: Run, column: str) -> float:
    """The largest value that a scraper sees, for the median of its possible starts."""
    values = series(run.steps, column)
    times, seen = values.index.to_numpy(), values.to_numpy()
    end = float(run.requests["finish"].max())
    peaks = []
    for offset in np.linspace(0.0, SCRAPE_INTERVAL_S, 60, endpoint=False):
        at = np.searchsorted(times, np.arange(offset, end, SCRAPE_INTERVAL_S), side="right") - 1
        if (at >= 0).any():
            peaks.append(seen[at[at >= 0]].max())
    return float(np.median(peaks)) if peaks else math.nan
