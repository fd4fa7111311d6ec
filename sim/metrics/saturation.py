"""Is an open-loop load sustained: the test for saturation."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from scipy.special import stdtr

from servecast.sim.inputs.errors import InputError
from servecast.sim.metrics.metrics import Floats
from servecast.sim.metrics.records import Run

COMPLETION_SHORTFALL = 0.02  # a load holds if its completion rate is within this of the offered rate
QUEUE_GROWTH = 0.01  # a queue that grows by less than this share of the offered rate counts as level
GROWTH_LEVEL = 0.05  # significance at which a queue counts as growing
BACKLOG_LEVEL = 0.20  # the same for all in the system, where a missing completion rate already speaks
BATCHES = 10


@dataclass(frozen=True, slots=True)
class Saturation:
    """Whether an open-loop load was sustained.

    offered, completed: requests/s that arrived and that finished in the window. queue_growth: slope of
    the number of requests that wait for their first step, in requests/s; backlog_growth: that of all
    requests in the system. p_queue, p_backlog: one-sided probability of such a slope where nothing grows.
    """

    offered: float
    completed: float
    queue_growth: float
    backlog_growth: float
    p_queue: float
    p_backlog: float

    @property
    def completion_ratio(self) -> float:
        return self.completed / self.offered

    @property
    def reason(self) -> str:
        """Why the load did not hold, empty where it did."""
        short = self.completion_ratio < 1 - COMPLETION_SHORTFALL and self.p_backlog < BACKLOG_LEVEL
        if short:
            return f"completes {self.completion_ratio:.1%} of the offered rate"
        if self.queue_grows:
            return f"the waiting queue grows by {self.queue_growth:.3g} requests/s"
        return ""

    @property
    def queue_grows(self) -> bool:
        return self.queue_growth > QUEUE_GROWTH * self.offered and self.p_queue < GROWTH_LEVEL

    @property
    def saturated(self) -> bool:
        return bool(self.reason)


def saturation(run: Run, *, start_s: float = 0.0) -> Saturation:
    """Tests an open-loop run for saturation, in the window from the end of its warm-up to its last arrival.

    It is saturated if its completion rate is more than 2 % below the offered rate, or if its waiting
    queue grows by more than 1 % of the offered rate. Both could be chance in a short run, so a growth is
    tested: the least-squares slope over the means in ten equal batches of the window against zero, one
    sided (Student's t, 8 degrees of freedom; batches since neighbouring values are correlated). The
    queue's must be significant at 5 %. That of the number in the system at 20 %, only to tell a
    shortfall from requests that happen to be under way at the end.

    What waits is counted from the request table: it arrived and was not yet scheduled (where that is not
    known: has no first token), so it includes what waits in the client and in the front end.
    Raises InputError when nothing arrives after start_s: a closed loop has no offered rate.
    """
    requests = run.requests
    arrival = requests["arrival"].to_numpy(dtype=float)
    end = float(arrival.max()) if len(arrival) else start_s
    if not end > start_s:
        fix = "The saturation test needs an open loop: give a finite request rate."
        raise InputError(f"no request arrives after {start_s:g} s", where="workload", fix=fix)
    started = requests["scheduled"].fillna(requests["first_token"]).to_numpy(dtype=float)
    finish = requests["finish"].to_numpy(dtype=float)
    seconds = end - start_s
    queue_growth, p_queue = _trend(_mean_counts(arrival, started, start_s, end), seconds)
    backlog_growth, p_backlog = _trend(_mean_counts(arrival, finish, start_s, end), seconds)
    return Saturation(
        offered=int((arrival > start_s).sum()) / seconds,
        completed=int(((finish > start_s) & (finish <= end)).sum()) / seconds,
        queue_growth=queue_growth,
        backlog_growth=backlog_growth,
        p_queue=p_queue,
        p_backlog=p_backlog,
    )


def lasts(run: Run) -> bool:
    """Whether arrivals go on for twice as long as a request takes once it is scheduled (the median).

    In a shorter run most requests are still under way at the last arrival, however few are sent, and what
    it completes until then says nothing of what is served.
    """
    requests = run.requests
    arrival = requests["arrival"].to_numpy(dtype=float)
    started = requests["scheduled"].fillna(requests["first_token"])
    served = (requests["finish"] - started).to_numpy(dtype=float)
    known = served[~np.isnan(served)]
    return not len(known) or float(arrival.max() - arrival.min()) > 2 * float(np.median(known))


def pooled(replications: Sequence[Saturation]) -> Saturation:
    """One verdict over independent replications: their means, and the growths tested between them.

    A single replication keeps its own verdict.
    """
    if len(replications) == 1:
        return replications[0]
    growths = np.array([(each.queue_growth, each.backlog_growth) for each in replications])
    means = growths.mean(axis=0)
    errors = growths.std(axis=0, ddof=1) / math.sqrt(len(growths))
    return Saturation(
        offered=float(np.mean([each.offered for each in replications])),
        completed=float(np.mean([each.completed for each in replications])),
        queue_growth=float(means[0]),
        backlog_growth=float(means[1]),
        p_queue=_p_positive(float(means[0]), float(errors[0]), len(growths) - 1),
        p_backlog=_p_positive(float(means[1]), float(errors[1]), len(growths) - 1),
    )


def _mean_counts(entry: Floats, leave: Floats, start: float, end: float) -> Floats:
    """Mean number of requests between entry and leave in each of the equal batches of [start, end]."""
    edges = np.linspace(start, end, BATCHES + 1)
    leave = np.where(np.isnan(leave), np.inf, leave)
    overlap = [
        np.clip(np.minimum(leave, high) - np.maximum(entry, low), 0.0, None).sum()
        for low, high in pairwise(edges)
    ]
    return np.array(overlap) * BATCHES / (end - start)


def _trend(means: Floats, seconds: float) -> tuple[float, float]:
    """Least-squares slope a second of equally spaced batch means, and its one-sided p."""
    x = (np.arange(BATCHES) - (BATCHES - 1) / 2) * (seconds / BATCHES)
    slope = float(x @ means / (x @ x))
    residual = means - means.mean() - slope * x
    error = math.sqrt(float(residual @ residual) / (BATCHES - 2) / float(x @ x))
    return slope, _p_positive(slope, error, BATCHES - 2)


def _p_positive(mean: float, error: float, degrees: int) -> float:
    """Probability of a mean this far above zero if the true one is zero (Student's t)."""
    if error == 0.0:
        return 0.0 if mean > 0 else 1.0
    return float(stdtr(degrees, -mean / error))
