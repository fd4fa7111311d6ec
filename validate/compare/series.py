"""What an engine shows of itself over a run, as scraped from its /metrics or as simulated: frames by
``time_s`` since the run began, with columns of ``telemetry.METRICS``, NaN where a value is not known."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd

from servecast.sim.metrics.metrics import Floats, gauges_at
from servecast.sim.metrics.records import Run

_PEAKS = {"kv_cache_usage_peak": "kv_usage", "max_num_running": "running", "max_num_waiting": "waiting"}
_COLUMNS = ("time_s", *_PEAKS.values(), "preemptions", "prefix_hits", "prefix_queries")


def scraped(telemetry: pd.DataFrame, *, start_s: float = 0.0, end_s: float = math.inf) -> pd.DataFrame:
    """What was scraped from ``start_s`` on, when the run began, until ``end_s`` later, with the last row
    before it and the first behind."""
    seen = telemetry.reindex(columns=[*_COLUMNS])
    seen["time_s"] -= start_s
    inside = np.flatnonzero(seen["time_s"].between(0, end_s))
    first = int(inside[0]) if len(inside) else len(seen)
    rows = np.concatenate([[first - 1], inside]).astype(int) if first > 0 else inside
    if len(rows) and rows[-1] + 1 < len(seen):
        rows = np.append(rows, rows[-1] + 1)  # counters are complete only at the next look
    return seen.iloc[rows]


def simulated(run: Run, times: Floats) -> pd.DataFrame:
    """The gauges of a simulated run, looked at when a live one was: peaks between two looks stay unseen in
    both. Requests are summed over replicas, KV usage is their mean. Without times: after each step."""
    if not len(times):
        times = run.steps["start"].to_numpy(dtype=float)
    gauges = {name: gauges_at(run, name, times).sum(axis=0) for name in ("running", "waiting")}
    return pd.DataFrame(
        {"time_s": times, **gauges, "kv_usage": gauges_at(run, "kv_usage", times).mean(axis=0)}
    )


def figures_of(series: pd.DataFrame) -> dict[str, float]:
    """Peaks of the gauges and growth of the counters under the keys of ``metrics.summary``; what is not known
    is left out."""
    counters = series.reindex(columns=["preemptions", "prefix_hits", "prefix_queries"])
    preemptions, hits, queries = (growth(counters[name].to_numpy(dtype=float)) for name in counters)
    found = {figure: float(series[column].max()) for figure, column in _PEAKS.items()}
    found["num_preemptions"] = preemptions
    if queries > 0:
        found["prefix_cache_hit_rate"] = hits / queries
    return {name: value for name, value in found.items() if not math.isnan(value)}


def growth(values: Floats) -> float:
    """How much a counter grew over its readings; NaN where it was not read twice."""
    known = values[~np.isnan(values)]
    return float(known[-1] - known[0]) if len(known) > 1 else math.nan
