"""A long run by periods, as the hours of a day."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from servecast.sim.metrics.metrics import Floats, good_requests, latencies, percentiles
from servecast.sim.metrics.records import Run
from servecast.sim.metrics.slo import Goodput

Lives = Sequence[tuple[float, float]]  # from when a replica is paid for, and until when, in seconds


def by_period(
    run: Run, limits: Goodput | None, lives: Lives, period_s: float, *, end_s: float | None = None
) -> pd.DataFrame:
    """A row for each period of a run in which requests arrive, or replicas are there.

    Args:
        limits: of a good request. lives: of the replicas. end_s: of the last period that is asked for.

    Returns:
        start_s; requests that arrived and request_rate; prompt and output tokens a second of them;
        median_ttft_ms, p95_ttft_ms, p95_tpot_ms; good: share of all that arrived; failed; running, waiting:
        means over time, over all replicas; kv_usage: mean over time and replicas that are there; replicas:
        mean over time.
    """
    requests = run.requests
    place = (requests["arrival"].to_numpy() // period_s).astype(int)
    count = max(int(place.max(initial=0)) + 1, math.ceil((end_s or 0.0) / period_s - 1e-9))
    edges = np.arange(count + 1, dtype=np.float64) * period_s
    there = sum((_overlap(edges, begin, end) for begin, end in lives), np.zeros(count))
    steps, seconds = run.steps, run.steps["duration"].to_numpy()
    of_step = np.minimum((steps["start"].to_numpy() // period_s).astype(int), count - 1)
    means = {
        name: np.bincount(of_step, steps[name].to_numpy(dtype=float) * seconds, count)[:count]
        for name in ("running", "waiting", "kv_usage")
    }
    rows = []
    for number in range(count):
        part = requests[place == number]
        rows.append({"start_s": edges[number], **_period(replace(run, requests=part), limits, period_s)})
    table = pd.DataFrame(rows)
    for name in ("running", "waiting"):
        table[name] = means[name] / period_s
    with np.errstate(divide="ignore", invalid="ignore"):
        table["kv_usage"] = np.where(there > 0, means["kv_usage"] / there, np.nan)
    table["replicas"] = there / period_s
    return table


def _overlap(edges: Floats, begin: float, end: float) -> NDArray[np.float64]:
    """Seconds of an interval in each period."""
    found: Floats = np.clip(np.minimum(edges[1:], end) - np.maximum(edges[:-1], begin), 0.0, None)
    return found


def _period(part: Run, limits: Goodput | None, period_s: float) -> Mapping[str, Any]:
    requests = part.requests
    done = latencies(requests)
    ttft = percentiles(done["ttft"].to_numpy(), (50, 95))
    tpot = percentiles(done["tpot"].dropna().to_numpy(), (95,))
    good = math.nan if limits is None or not len(requests) else good_requests(part, limits) / len(requests)
    return {
        "requests": len(requests),
        "request_rate": len(requests) / period_s,
        "prompt_tokens_per_s": requests["prompt_tokens"].sum() / period_s,
        "output_tokens_per_s": requests["output_tokens"].sum() / period_s,
        "median_ttft_ms": ttft[0] * 1000,
        "p95_ttft_ms": ttft[1] * 1000,
        "p95_tpot_ms": tpot[0] * 1000,
        "good": good,
        "failed": int(requests["status"].isin(("failed", "aborted")).sum()),
    }
