"""The search for the rate up to which a server holds: among predictions first, then on the live server.

Both sides try rates until the largest that holds and the smallest that does not are near each other. The
prediction's ends are on disk before the server is asked, and are what it is asked first.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, repeat
from typing import Any

import numpy as np

from servecast.sim.metrics.confidence import Interval
from servecast.sim.metrics.records import Run
from servecast.sim.plan.judge import Objectives
from servecast.sim.plan.search import search
from servecast.sim.run.simulate import simulate
from servecast.sim.scenario.scenario import Scenario
from servecast.validate.compare.sweep import bracket, judged, sustained
from servecast.validate.live.loads import Loads

MOST_LOADS, MOST_SIMULATED = 8, 20  # that a search tries
STEP = 1.1  # from rate to rate where the other end is not known, squared from step to step
BRACKET = 1.03  # of the live search: its ends over each other when they are near enough
FINE = 1.01  # of the predicted one
FARTHEST = 100.0, 8.0  # times below and above the guess that a rate is looked for


def meets(runs: Sequence[Run], scenario: Scenario) -> bool:
    """Whether runs at a rate meet all objectives of a scenario (that has some), on average."""
    objectives = Objectives.of(scenario)
    assert objectives is not None
    return judged(runs, objectives).state == "pass"


@dataclass(frozen=True, slots=True)
class Search:
    """What is searched for. metric: its row in a comparison. holds: whether runs at one rate are below it."""

    metric: str
    holds: Callable[[Sequence[Run], Scenario], bool]


SEARCHES = {  # by kind of load
    "slo": Search("max_request_rate", meets),
    "knee": Search("knee", lambda runs, _scenario: sustained(runs)),
}


@dataclass(frozen=True, slots=True)
class PredictedRate:
    """Where a searched rate lies, by simulation. tried: (requests/s, whether it held), in order.

    sha256: of the file that says so.
    """

    kind: str
    ends: Interval
    tried: tuple[tuple[float, bool], ...]
    sha256: str = ""

    def to_json(self) -> dict[str, Any]:
        """Plain values; an end that is not known is null."""
        return {
            "plan": self.kind,
            "metric": SEARCHES[self.kind].metric,
            "between": [self.ends.low, self.ends.high],
            "tried": [{"request_rate": rate, "holds": held} for rate, held in self.tried],
        }


def predict_rate(kind: str, loads: Loads, seeds: range) -> PredictedRate:
    """Search by simulation, on the very traffic that the live server would get at each rate."""
    tried: dict[float, bool] = {}

    def holds(request_rate: float) -> bool:
        stages = loads.at_rate(request_rate, kind).stages()
        runs = [simulate(loads.deployment, seed=seed, stages=stages) for seed in seeds]
        return SEARCHES[kind].holds(runs, loads.scenario)

    ends = search_near(holds, loads.max_rate, tried, near=FINE, tries=MOST_SIMULATED)
    middle = (ends.low * ends.high) ** 0.5 if 0 < ends.low < ends.high < np.inf else ends.estimate
    return PredictedRate(kind, replace(ends, estimate=float(middle)), tuple(tried.items()))


def search_near(
    holds: Callable[[float], bool | None],
    guess: float,
    tried: dict[float, bool],
    *,
    near: float = BRACKET,
    tries: int = MOST_LOADS,
) -> Interval:
    """Search a rate from a guess that is taken to be good: just below and just above it first.

    Args: as of `plan.search.search`.
    """

    def within_reach(rate: float) -> bool | None:
        return None if rate < guess / FARTHEST[0] else holds(rate)

    search(
        within_reach,
        (guess / near**0.5, guess * near**0.5),
        tried,
        near=near,
        steps=accumulate(repeat(STEP), lambda step, _: step * step),
        most=guess * FARTHEST[1],
        tries=tries,
    )
    return bracket(tried.items())
