"""The distributions around the step times and in front of the engine, from repeats."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import nnls

from servecast.calibrate.fit.rows import Overhead, Step
from servecast.calibrate.measure.folder import Row
from servecast.calibrate.measure.turns import complaints, lags, trusted
from servecast.sim.hardware.front_end_costs import FrontEndCosts
from servecast.sim.hardware.noise import StepNoise

Floats = NDArray[np.float64]

MIN_REPEATS = 4  # of a composition, before its scatter counts
MIN_TIMES = 20  # over all of them, before a distribution is fitted
_SIGMA = (15.87, 84.13)  # percentiles one standard deviation either side of a normal's median
_STALL_SIGMAS, _STALL_FACTOR = 5.0, 1.5  # a stall is beyond both: what a lognormal has 1 in 3 million of


def fit_noise(steps: Iterable[Step]) -> StepNoise | None:
    """The noise of step times: spread by robust quantiles of time / median, and stalls beyond it.

    Returns:
        None where too few steps were repeated to tell.
    """
    logs = [
        np.log(np.asarray(step.times_s) / step.median_s) * math.sqrt(n / (n - 1))  # the median is theirs
        for step in steps
        if (n := len(step.times_s)) >= MIN_REPEATS
    ]
    pooled = np.concatenate(logs) if logs else np.empty(0)
    if len(pooled) < MIN_TIMES:
        return None
    sigma = _half_width(pooled)
    stalled = pooled > max(_STALL_SIGMAS * sigma, math.log(_STALL_FACTOR))
    return StepNoise(
        cv=math.sqrt(math.expm1(sigma * sigma)),
        stall_probability=float(stalled.mean()),
        stall_factor=float(np.exp(np.median(pooled[stalled]))) if stalled.any() else 1.0,
    )


@dataclass(frozen=True, slots=True)
class Scatter:
    """What the noise of steps makes of the times measured of them."""

    noise: StepNoise

    def means(self, steps: Sequence[Step]) -> Floats:
        """Mean times, s, which a step-time model stands for: the medians, which stalls do not move, times
        what the noise's mean is over its median."""
        noise = self.noise
        over = math.sqrt(1 + noise.cv**2) * (1 + noise.stall_probability * (noise.stall_factor - 1))
        return np.array([over * step.median_s for step in steps])

    def standard_errors(self, steps: Sequence[Step]) -> Floats:
        """Of these, relative: a median's is sqrt(pi / 2) times a mean's."""
        return np.array([math.sqrt(math.pi / 2 / len(step.times_s)) * self.noise.cv for step in steps])


def undisturbed(overheads: Sequence[Overhead]) -> tuple[tuple[Overhead, ...], list[str]]:
    """The rows of the turns that count (see ``measure.turns``), without the tokens of loads behind which the
    front end fell; and what was wrong with the others."""
    loads = defaultdict[int, dict[int, list[Row]]](dict)
    for row in overheads:
        if row.more_tokens:
            continue  # measured once
        loads[row.concurrency].setdefault(row.turn, []).append(row.model_dump())
    behind = {load for load, turns in loads.items() if lags([row for rows in turns.values() for row in rows])}
    if behind == loads.keys():
        behind.clear()  # better than nothing
    kept = tuple(
        row
        for row in overheads
        if row.more_tokens
        or (
            row.turn in trusted(loads[row.concurrency])
            and not (row.kind == "token_out" and row.concurrency in behind)
        )
    )
    return kept, complaints(loads)


def fit_front_end(
    overheads: Sequence[Overhead], preparation_round: int
) -> tuple[FrontEndCosts, tuple[str, ...]]:
    """The costs in front of the engine, as ``sim.front_end`` spends them.

    c requests in preparation at a time are ready after latency + their rounds' costs; the tokens of a burst
    leave one after the other, first ones last, and are delivered after what a first token takes beyond that
    (a constant delay of the later ones moves none of their gaps). Server and client share one machine here,
    and what each of them takes is not told apart: all of it is the server's.

    Args:
        preparation_round: requests that the server prepared together, at most.

    Returns:
        The costs, and the names of those that the rows tell.
    """
    inward = [row for row in overheads if row.kind == "request_in" and not row.more_tokens]
    longer = [row for row in overheads if row.kind == "request_in" and row.more_tokens]
    outward = [row for row in overheads if row.kind == "token_out"]
    costs: dict[str, float] = {}
    if inward:
        latency, request = _line(inward, [_mean_ready(_together(row), preparation_round) for row in inward])
        costs |= {"latency_s": latency, "request_s": request}
        fewest = min(map(_together, inward))
        alone = np.concatenate([row.times_s for row in inward if _together(row) == fewest])
        spread = _half_width(alone) / float(np.median(alone))
        if longer:  # prompts of random tokens, one at a time
            usual = float(np.median(alone))
            took = np.concatenate([(np.array(row.times_s) - usual) / row.more_tokens for row in longer])
            random = FrontEndCosts(prompt_token_s=1.0).of_prompts("random_text").prompt_token_s
            costs["prompt_token_s"] = max(0.0, float(np.median(took))) / random
        costs["cv"] = spread * (latency + request) / math.hypot(latency, request)  # each is drawn for itself
    if outward:
        first = [row for row in outward if row.first]
        later = [row for row in outward if not row.first] or first
        start, costs["token_s"] = _line(later, [_mean_place(row) for row in later])
        if first:
            waits = [np.asarray(row.times_s) - costs["token_s"] * _mean_place(row) for row in first]
            start = max(0.0, float(np.median(np.concatenate(waits))))
        costs["delivery_s"] = start
    return FrontEndCosts(**costs), tuple(costs)


def _line(rows: Sequence[Overhead], at: Sequence[float]) -> tuple[float, float]:
    """Start and slope, neither negative, of the medians over ``at`` by least relative squares, weighed by
    their numbers of times; all of it is slope where every row stands at the same place."""
    medians = np.array([row.median_s for row in rows])
    if len(set(at)) == 1:
        return 0.0, float(np.median(medians)) / at[0]
    weights = np.sqrt([len(row.times_s) for row in rows])
    design: Floats = np.column_stack([np.ones(len(rows)), at])
    (start, slope), _ = nnls(design * (weights / medians)[:, None], weights)
    return float(start), float(slope)


def _together(row: Overhead) -> int:
    """Requests or tokens at a time: all that are in progress, where a row does not say."""
    return row.burst or row.concurrency


def _mean_place(row: Overhead) -> float:
    """Of these tokens in their burst, from 1 on, whose first tokens stand last."""
    if row.first and row.firsts:
        return _together(row) - (row.firsts - 1) / 2
    return (1 + _together(row) - row.firsts) / 2


def _mean_ready(requests: int, most: int) -> float:
    """When a burst of requests is ready, on average, in units of one's cost (``front_end.Preparation``)."""
    ready = [min(requests, most * (at // most + 1)) for at in range(requests)]
    return sum(ready) / requests


def _half_width(values: Floats) -> float:
    low, high = np.percentile(values, _SIGMA)
    return float(high - low) / 2
