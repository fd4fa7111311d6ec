"""Samples of latencies: how sure their statistics are, and how far two of them lie apart."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy.special import ndtri, stdtrit
from scipy.stats import ks_2samp, wasserstein_distance

from servecast.sim.metrics.metrics import Floats, latencies, percentiles, samples
from servecast.sim.metrics.records import Run

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


@dataclass(frozen=True, slots=True)
class Draws:
    """A statistic of bootstrap samples, in ms, (RESAMPLES,): of the measured run, and of the predicted ones,
    their mean, under the same draws."""

    measured: Floats
    predicted: Floats


def resampled_statistics(
    measured: Run, predicted: Sequence[Run], rng: np.random.Generator
) -> dict[str, Draws]:
    """Each latency statistic of bootstrap samples of a run and of its predictions.

    Blocks of requests that follow one another are drawn (Kuensch, Ann. Statist. 17(3), 1989), since those
    that are in the server together share its queue and its steps: a block lasts some mean E2E latencies.
    A predicted run of as many requests is resampled along with the measured one, request by request, so
    that what both say of a request is no chance; one of another number, and gaps between tokens, which do
    not say whose they are, are kept as they are.
    """
    done = _finished(measured)
    span = float(done["finish"].max() - done["sent"].min())
    apart = span / max(_MEMORY * float((done["finish"] - done["sent"]).mean()), 1e-9)
    blocks = min(int(np.clip(apart, *_BLOCKS)), max(len(done), 1))
    counts = rng.multinomial(blocks, np.full(blocks, 1 / blocks), RESAMPLES)
    found: dict[str, Draws] = {}
    for metric in LATENCIES:
        values, weights = _in_order(measured, metric)
        if np.isfinite(values).sum() < 2:
            continue
        truth = _statistics_of_draws(values, weights, counts)
        forecasts = []
        for run in predicted:
            ours, each = _in_order(run, metric)
            same = metric != "itl" and len(ours) == len(values)
            forecasts.append(_statistics_of_draws(ours, each, counts if same else _ALL))
        means = np.broadcast_to(np.mean(forecasts, axis=0), truth.shape) if forecasts else truth
        for name, drawn, mean in zip(STATISTICS, truth.T, means.T, strict=True):
            found[f"{name}_{metric}_ms"] = Draws(drawn, mean)
    return found


_ALL = np.ones((1, 1), dtype=int)  # one block, drawn once: the run itself


def _finished(run: Run) -> pd.DataFrame:
    return run.requests[run.requests["status"] == "finished"].sort_values("sent", kind="stable")


def _in_order(run: Run, metric: str) -> tuple[Floats, Floats]:
    """A metric's values in ms in the order of sending, NaN where a request has none, and their weights."""
    if metric == "itl":
        values, weights = run.itl["gap"].to_numpy(dtype=float), run.itl["weight"].to_numpy(dtype=float)
    else:
        values = latencies(_finished(run))[metric].to_numpy(dtype=float)
        weights = np.ones(len(values))
    return 1000 * values[:: (thin := max(1, len(values) // _MOST))], weights[::thin]


def _statistics_of_draws(values: Floats, weights: Floats, counts: NDArray[np.int64]) -> Floats:
    """STATISTICS of samples, (draws, statistics): in each a block of the values counts so many times.

    Few blocks vary too little: the draws are spread by Student's t over the normal law, and by n / (n - 1).
    """
    blocks = counts.shape[1]
    block = np.arange(len(values)) * blocks // max(len(values), 1)
    order = np.argsort(values, kind="stable")
    order = order[np.isfinite(values[order])]
    values, weights, block = values[order], weights[order], block[order]
    if not len(values):
        return np.full((len(counts), len(STATISTICS)), math.nan)
    drawn = np.vstack([np.ones(blocks), counts])  # (draws, blocks); the first is the sample itself
    upto = np.zeros((len(values), blocks))  # how much of each block lies at or below a value
    upto[np.arange(len(values)), block] = weights
    upto.cumsum(axis=0, out=upto)
    totals = np.rint(drawn @ upto[-1])[:, None]
    totals[totals == 0] = math.nan  # only blocks without a value
    sums = drawn @ np.bincount(block, weights * values, minlength=blocks)
    ranks = np.array([rank for rank in STATISTICS.values() if rank is not None])
    position = ranks / 100 * (totals - 1)  # as `percentiles` takes them
    below, above = (
        values[_first_beyond(upto, drawn, np.minimum(lower, totals - 1))]
        for lower in (np.floor(position), np.floor(position) + 1)
    )
    part = position % 1
    figures = np.column_stack([sums[:, None] / totals, below + (above - below) * part])
    whole, resampled = figures[:1], figures[1:]
    if blocks == 1:
        return resampled
    spread = stdtrit(blocks - 1, 0.975) / ndtri(0.975) * math.sqrt(blocks / (blocks - 1))
    return np.asarray(whole + spread * (resampled - whole))


def _first_beyond(upto: Floats, drawn: Floats, targets: Floats) -> NDArray[np.int64]:
    """The first value up to which a draw has more than its target, (draws, targets), by halving."""
    low, high = np.zeros(targets.shape, dtype=np.int64), np.full(targets.shape, len(upto) - 1)
    while (low < high).any():
        middle = (low + high) // 2
        short = np.einsum("dtb,db->dt", upto[middle], drawn) <= targets
        low, high = np.where(short, middle + 1, low), np.where(short, high, middle)
    return low


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
