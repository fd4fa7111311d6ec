"""What a finite run can tell: confidence intervals and the warm-up to leave out."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike
from scipy.special import ndtri, stdtrit

MSER_BATCH = 5


@dataclass(frozen=True, slots=True)
class Interval:
    """A two-sided confidence interval.

    estimate, low, high: in the unit of what was estimated; low and high are NaN where one sample gives
    no interval. samples: how many observations (replications, batches, trials) stand behind it.
    """

    estimate: float
    low: float
    high: float
    confidence: float
    samples: int


def t_interval(values: Sequence[float], confidence: float = 0.95) -> Interval:
    """Student's interval for the mean of independent replications (Law, Simulation Modeling, 4.5).

    values: one statistic a replication, for instance each replication's own p95; a NaN among them
    makes the whole interval NaN, since a replication without the statistic says nothing about it.
    """
    samples = np.asarray(values, dtype=float)
    n = len(samples)
    if n == 0:
        return Interval(math.nan, math.nan, math.nan, confidence, 0)
    mean = float(samples.mean())
    if n == 1:
        return Interval(mean, math.nan, math.nan, confidence, 1)
    half = float(stdtrit(n - 1, 0.5 + confidence / 2) * samples.std(ddof=1) / math.sqrt(n))
    return Interval(mean, mean - half, mean + half, confidence, n)


def wilson(successes: int, trials: int, confidence: float = 0.95) -> Interval:
    """Wilson's score interval for a share; unlike Wald's it holds at 0 %, at 100 % and for few trials."""
    if trials == 0:
        return Interval(math.nan, math.nan, math.nan, confidence, 0)
    z2 = float(ndtri(0.5 + confidence / 2)) ** 2
    share = successes / trials
    centre = (share + z2 / (2 * trials)) / (1 + z2 / trials)
    half = math.sqrt(z2 * (share * (1 - share) / trials + z2 / (4 * trials**2))) / (1 + z2 / trials)
    return Interval(share, max(0.0, centre - half), min(1.0, centre + half), confidence, trials)


def mser5(values: ArrayLike) -> tuple[int, bool]:
    """How many leading observations are warm-up, by MSER-5 (White, Simulation 69(6), 1997).

    The series is averaged in batches of 5; the cut is the one that minimises the squared standard
    error of the mean of what remains. At most half of the series is cut.

    Returns: (observations to leave out, whether the minimum lies inside the first half). False means
    that the series still drifts, as an overloaded system's does: it has no steady state to cut to.
    """
    series = np.asarray(values, dtype=float)
    count = len(series) // MSER_BATCH
    if count < 4:
        return 0, False
    means = series[: count * MSER_BATCH].reshape(count, MSER_BATCH).mean(axis=1)
    means -= means.mean()  # the sums below would cancel otherwise
    left = np.arange(count, 0, -1)
    total, squares = np.cumsum(means[::-1])[::-1], np.cumsum(means[::-1] ** 2)[::-1]
    error = (squares - total**2 / left) / left**2
    cut = int(np.argmin(error[: count // 2 + 1]))
    return cut * MSER_BATCH, cut < count // 2
