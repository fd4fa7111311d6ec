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


def split(run: Run, period_s: float, end_s: float = 0.0) -> list[Run]:
    """Requests by the period in which they arrive, up to the last, or to the one that ends at ``end_s``."""
    place = (run.requests["arrival"].to_numpy() // period_s).astype(int)
    order, count = place.argsort(kind="stable"), math.ceil(end_s / period_s - 1e-9)
    ends = np.searchsorted(place[order], np.arange(1, max(int(place.max(initial=0)) + 1, count)))
    return [replace(run, requests=run.requests.iloc[rows]) for rows in np.split(order, ends)]


def by_period(
    run: Run, parts: Sequence[Run], limits: Goodput | None, lives: Lives, period_s: float
) -> pd.DataFrame:
    """A row for each period of a run.

    Args:
        parts: of the periods, from ``split``. limits: of a good request. lives: of the replicas.

    Returns:
        start_s; requests that arrived and request_rate; prompt and output tokens a second of them;
        median_ttft_ms, p95_ttft_ms, p95_tpot_ms; good: share of all that arrived; failed; running, waiting:
        means over time, over all replicas; kv_usage: mean over time and replicas that are there; replicas:
        mean over time.
    """
    count = len(parts)
    edges = np.arange(count + 1, dtype=np.float64) * period_s
    there = sum((_overlap(edges, begin, end) for begin, end in lives), np.zeros(count))
    steps, seconds = run.steps, run.steps["duration"].to_numpy()
    of_step = np.minimum((steps["start"].to_numpy() // period_s).astype(int), count - 1)
    means = {
        name: np.bincount(of_step, steps[name].to_numpy(dtype=float) * seconds, count)[:count]
        for name in ("running", "waiting", "kv_usage")
    }
    told = [_period(part, limits, period_s) for part in parts]
    table = pd.DataFrame([{"start_s": start, **each} for start, each in zip(edges[:-1], told, strict=True)])
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
