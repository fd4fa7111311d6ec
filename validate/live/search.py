"""The search for the rate up to which a server holds: among predictions first, then on the live server.

Both sides try rates until the largest that holds and the smallest that does not are near each other. The
prediction's ends are on disk before the server is asked, and are what it is asked first.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from servecast.sim.metrics.confidence import Interval
from servecast.sim.metrics.records import Run
from servecast.sim.metrics.slo import Goodput
from servecast.sim.run.simulate import simulate
from servecast.sim.scenario.scenario import Scenario
from servecast.validate.compare.sweep import bracket, strain, sustained
from servecast.validate.live.loads import Planner

MOST_LOADS, MOST_SIMULATED = 8, 20  # that a search tries
STEP = 1.1  # from rate to rate where the other end is not known, squared from step to step
BRACKET = 1.03  # of the live search: its ends over each other when they are near enough
FINE = 1.01  # of the predicted one


def goodput_of(scenario: Scenario) -> Goodput | None:
    """The goodput that a scenario's rates are judged by: where it has SLOs, those count instead."""
    return None if scenario.slos else scenario.goodput_limits


def meets(runs: Sequence[Run], scenario: Scenario) -> bool:
    """Whether runs at a rate meet all objectives of a scenario, on average."""
    strains = [strain(run, scenario.slos, goodput_of(scenario)) for run in runs]
    return float(np.mean(strains)) <= 1


@dataclass(frozen=True, slots=True)
class Search:
    """What is searched for. metric: its row in a comparison. holds: whether runs at one rate are below it."""

    metric: str
    holds: Callable[[Sequence[Run], Scenario], bool]


SEARCHES = {  # by plan
    "slo": Search("max_request_rate", meets),
    "knee": Search("knee", lambda runs, _scenario: sustained(runs)),
}


@dataclass(frozen=True, slots=True)
class PredictedRate:
    """Where a plan's rate lies, by simulation. tried: (requests/s, whether it held), in order.

    sha256: of the file that says so.
    """

    plan: str
    ends: Interval
    tried: tuple[tuple[float, bool], ...]
    sha256: str = ""

    def to_json(self) -> dict[str, Any]:
        """Plain values; an end that is not known is null."""
        return {
            "plan": self.plan,
            "metric": SEARCHES[self.plan].metric,
            "between": [self.ends.low, self.ends.high],
            "tried": [{"request_rate": rate, "holds": held} for rate, held in self.tried],
        }


def predict_rate(plan: str, planner: Planner, seeds: range) -> PredictedRate:
    """Search by simulation, on the very traffic that the live server would get at each rate."""
    tried: dict[float, bool] = {}
    with TemporaryDirectory() as folder:
        elsewhere = replace(planner, out=Path(folder))

        def holds(request_rate: float) -> bool:
            workload = elsewhere.at_rate(request_rate, plan).workload()
            runs = [simulate(planner.deployment, seed=seed, workload=workload) for seed in seeds]
            return SEARCHES[plan].holds(runs, planner.scenario)

        search(holds, planner.max_rate, tried, near=FINE, most=MOST_SIMULATED)
    ends = bracket(list(tried), list(tried.values()))
    middle = (ends.low * ends.high) ** 0.5 if 0 < ends.low < ends.high < np.inf else ends.estimate
    return PredictedRate(plan, replace(ends, estimate=float(middle)), tuple(tried.items()))


def search(
    holds: Callable[[float], bool | None],
    guess: float,
    tried: dict[float, bool],
    *,
    near: float = BRACKET,
    most: int = MOST_LOADS,
) -> None:
    """Try rates until the two ends are within a factor ``near``, or ``most`` were tried.

    Args:
        holds: whether a rate holds; None if that could not be told, which ends the search.
        guess: where the rate is thought to be: the first tried are a little below and above it.
        tried: rate -> whether it held; those that are known, to which the new ones are added.
    """
    step = STEP
    for _ in range(most):
        ends = bracket(list(tried), list(tried.values()))
        around = [rate for rate in (guess / near**0.5, guess * near**0.5) if ends.low < rate < ends.high]
        if around and not set(around) & set(tried):
            rate = around[0]
        elif ends.low and ends.high <= near * ends.low * (1 + 1e-9):
            return
        else:
            middle = (ends.low * ends.high) ** 0.5 if ends.low else 0.0
            if ends.high < guess:
                rate, step = max(ends.high / step, middle), step * step
            elif ends.low > guess:
                rate, step = min(ends.low * step, middle), step * step
            else:
                rate = middle
        held = holds(rate)
        if held is None:
            return
        tried[rate] = held
