"""What an engine shows of itself over a run: as scraped from its /metrics, or as simulated."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import pandas as pd

from servecast.sim.metrics.metrics import Floats, gauges_at
from servecast.sim.metrics.records import Run

_COLUMNS = {  # field -> column of telemetry
    "running": "running",
    "waiting": "waiting",
    "kv_usage": "kv_usage",
    "preemptions_total": "preemptions",
    "prefix_hit_tokens": "prefix_hits",
    "prefix_query_tokens": "prefix_queries",
}


@dataclass(frozen=True, slots=True)
class EngineSeries:
    """Gauges and counters at times since the start of a run; all arrays (n,), NaN where not known.

    Attributes:
        time_s: rising. running, waiting: requests, summed over replicas. kv_usage: 0..1, their mean.
        preemptions_total, prefix_hit_tokens, prefix_query_tokens: counters, from whatever they began at.
    """

    time_s: Floats
    running: Floats
    waiting: Floats
    kv_usage: Floats
    preemptions_total: Floats
    prefix_hit_tokens: Floats
    prefix_query_tokens: Floats

    @classmethod
    def of_telemetry(cls, frame: pd.DataFrame, *, start_s: float = 0.0) -> EngineSeries:
        """From scraped columns (see telemetry.METRICS). start_s: their clock when the run began."""
        none = np.full(len(frame), math.nan)
        columns = {
            field: frame[column].to_numpy(dtype=float) if column in frame else none
            for field, column in _COLUMNS.items()
        }
        time_s = frame["time_s"].to_numpy(dtype=float) if "time_s" in frame else none
        return cls(time_s - start_s, **columns)

    @classmethod
    def of_run(cls, run: Run, times: Floats) -> EngineSeries:
        """A simulated run, looked at when a live one was: peaks between two looks stay unseen in both.
        Without times: after each step."""
        if not len(times):
            times = run.steps["start"].to_numpy(dtype=float)
        gauges = {name: gauges_at(run, name, times) for name in ("running", "waiting", "kv_usage")}
        preempted = run.steps["preempted"].to_numpy(dtype=float)
        upto = np.searchsorted(run.steps["start"].to_numpy(dtype=float), times, side="right")
        none = np.full(len(times), math.nan)
        return cls(
            times,
            running=gauges["running"].sum(axis=0),
            waiting=gauges["waiting"].sum(axis=0),
            kv_usage=gauges["kv_usage"].mean(axis=0),
            preemptions_total=np.concatenate([[0.0], np.cumsum(preempted)])[upto],
            prefix_hit_tokens=none,
            prefix_query_tokens=none,
        )

    def within(self, end_s: float) -> EngineSeries:
        """The part from 0 to ``end_s``, and of the counters the last value before it."""
        inside = np.flatnonzero((self.time_s >= 0) & (self.time_s <= end_s))
        first = int(inside[0]) if len(inside) else len(self.time_s)
        rows = np.concatenate([[first - 1], inside]).astype(int) if first > 0 else inside
        last = rows[-1] if len(rows) else -1
        if len(rows) and last + 1 < len(self.time_s):
            rows = np.append(rows, last + 1)  # counters are complete only at the next look
        fields = ("time_s", *_COLUMNS)
        return EngineSeries(**{name: getattr(self, name)[rows] for name in fields})

    def figures(self) -> dict[str, float]:
        """Peaks of the gauges and growth of the counters under the keys of ``metrics.summary``; what is not
        known is left out."""
        found = {
            "kv_cache_usage_peak": _peak(self.kv_usage),
            "max_num_running": _peak(self.running),
            "max_num_waiting": _peak(self.waiting),
            "num_preemptions": growth(self.preemptions_total),
        }
        queries = growth(self.prefix_query_tokens)
        if queries > 0:
            found["prefix_cache_hit_rate"] = growth(self.prefix_hit_tokens) / queries
        return {name: value for name, value in found.items() if not math.isnan(value)}


def _peak(values: Floats) -> float:
    known = values[~np.isnan(values)]
    return float(known.max()) if len(known) else math.nan


def growth(values: Floats) -> float:
    """How much a counter grew over its readings; NaN where it was not read twice."""
    known = values[~np.isnan(values)]
    return float(known[-1] - known[0]) if len(known) > 1 else math.nan
