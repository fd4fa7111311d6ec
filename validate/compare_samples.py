"""Samples of latencies: how sure their statistics are, and how far two of them lie apart."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import ks_2samp, wasserstein_distance

from servecast.sim.metrics import Floats, percentiles, samples
from servecast.sim.records import Run

LATENCIES = ("ttft", "tpot", "itl", "e2el")
STATISTICS = {"mean": None, "median": 50, "p90": 90, "p95": 95, "p99": 99}
RESAMPLES = 400
_BLOCKS = (5, 50)  # least and most stretches of a run that are resampled
_MEMORY = 3.0  # mean E2E latencies until a server has forgotten
_MOST = 50_000  # of a sample's values that are resampled or whose distribution is compared


@dataclass(frozen=True, slots=True)
class Distance:
    """How far two distributions of a latency lie apart: the largest difference of their cumulative shares
    (Kolmogorov-Smirnov), and the area between them in ms (Wasserstein)."""

    metric: str
    kolmogorov_smirnov: float
    wasserstein_ms: float


def resampled_statistics(run: Run, rng: np.random.Generator) -> dict[str, Floats]:
    """Each latency statistic of bootstrap samples of a run, in ms.

    Blocks of requests that follow one another are drawn (Kuensch, Ann. Statist. 17(3), 1989), since those
    that are in the server together share its queue and its steps: a block lasts some mean E2E latencies.
    """
    done = run.requests[run.requests["status"] == "finished"]
    span = float(done["finish"].max() - done["sent"].min())
    apart = span / max(_MEMORY * float((done["finish"] - done["sent"]).mean()), 1e-9)
    found: dict[str, Floats] = {}
    for metric in LATENCIES:
        values, weights = samples(run, metric)
        thinned = slice(None, None, max(1, len(values) // _MOST))
        values = values[thinned] * 1000
        counted = np.ones(len(values)) if weights is None else weights[thinned]
        if len(values) < 2:
            continue
        blocks = min(int(np.clip(apart, *_BLOCKS)), len(values))
        block = np.arange(len(values)) * blocks // len(values)
        order = np.argsort(values, kind="stable")
        counts = rng.multinomial(blocks, np.full(blocks, 1 / blocks), RESAMPLES)
        ranks = [rank for rank in STATISTICS.values() if rank is not None]
        draws = []
        for drawn in counts:
            times = drawn[block[order]] * counted[order]
            mean = float(np.average(values[order], weights=times))
            draws.append([mean, *percentiles(values[order], ranks, weights=times)])
        columns = np.array(draws).T
        found |= {f"{name}_{metric}_ms": column for name, column in zip(STATISTICS, columns, strict=True)}
    return found


def distances(predicted: Sequence[Run], measured: Run) -> list[Distance]:
    """Each latency's distance between the predicted runs together and the measured one."""
    found = []
    for metric in LATENCIES:
        truth = _spread(*samples(measured, metric))
        ours = np.concatenate([_spread(*samples(run, metric)) for run in predicted])
        if len(truth) and len(ours):
            distance = ks_2samp(ours, truth, method="asymp").statistic
            found.append(Distance(metric, float(distance), float(wasserstein_distance(ours, truth)) * 1000))
    return found


def _spread(values: Floats, weights: Floats | None) -> Floats:
    """The sample itself if it is small and unweighted, else evenly spaced quantiles of it."""
    if not len(values) or (weights is None and len(values) <= _MOST):
        return values
    total = round(float(weights.sum())) if weights is not None else len(values)
    count = min(total, 2000)
    ranks = ((np.arange(count) + 0.5) * (100 / count)).tolist()
    return np.array(percentiles(values, ranks, weights=weights), dtype=np.float64)
