"""What the constants that a source did not state are worth: the answer with each 20 % lower and higher."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from itertools import repeat
from typing import Any

from joblib import Parallel, delayed

from servecast.sim.inputs.errors import InputError
from servecast.sim.plan.effort import Effort
from servecast.sim.plan.judge import CERTAIN, Judgement, Objectives, judge
from servecast.sim.plan.prober import ProbedRate, replicate
from servecast.sim.plan.search import search
from servecast.sim.run.simulate import RateProbe
from servecast.sim.scenario.scenario import Scenario

SCALES = (0.8, 1.2)
SEEDS = 2
STEP = 1.25  # from rate to rate while the answer is bracketed
TOLERANCE = 0.02
FARTHEST = 50.0  # times the answer, up or down: beyond that no rate is looked for


@dataclass(frozen=True, slots=True)
class Estimate:
    """At fixed seeds and without intervals: the largest rate that holds (requests/s), and each objective's
    value at the plan's answer (milliseconds; a goodput's share). They are compared with each other only."""

    max_request_rate: float
    values: dict[str, float]


@dataclass(frozen=True, slots=True)
class Sensitivity:
    """An assumption scaled: its value, and the relative changes (0.1 is +10 %) that come of it.

    error: why it could not be simulated at that value, else None.
    """

    name: str
    field: str
    assumed: float
    scaled: float
    max_request_rate: float | None
    values: dict[str, float]
    error: str | None = None

    @property
    def effect(self) -> str:
        """The change of the largest rate, or why there is none, in words."""
        return self.error or f"{self.max_request_rate:+.1%}"

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def sensitivity(
    scenario: Scenario, at: ProbedRate, objectives: Objectives, effort: Effort
) -> list[Sensitivity]:
    """Scale each numeric assumption that has a field by 0.8 and 1.2 and look at the answer again.

    Whole numbers stay whole; one that this does not move is left out, as is one that a what-if replaced.

    Args:
        at: the plan's answer. effort: its jobs count here.
    """
    rate, num_requests, seed = at.rate, at.num_requests, scenario.seed
    cases = [
        (assumption.name, assumption.field, float(assumption.value), scaled)
        for assumption in scenario.assumptions
        if isinstance(assumption.value, float | int)
        and assumption.field
        and assumption.field not in scenario.changes
        for scaled in _scaled(float(assumption.value))
    ]

    def work() -> Iterator[Any]:
        yield delayed(_estimate)(scenario, objectives, rate, num_requests, seed)
        for _, field, _, value in cases:
            yield delayed(_estimate_or_error)(scenario, {field: value}, objectives, rate, num_requests, seed)

    base, *estimates = Parallel(n_jobs=effort.jobs)(work())
    found = []
    for (name, field, assumed, scaled), estimate in zip(cases, estimates, strict=True):
        if isinstance(estimate, InputError):
            found.append(Sensitivity(name, field, assumed, scaled, None, {}, str(estimate)))
            continue
        change = estimate.max_request_rate / base.max_request_rate - 1
        values = {
            key: estimate.values[key] / value - 1
            for key, value in base.values.items()
            if value and math.isfinite(estimate.values[key] / value)
        }
        found.append(Sensitivity(name, field, assumed, scaled, change, values))
    return found


def _scaled(value: float) -> list[float | int]:
    if not value.is_integer():
        return [value * scale for scale in SCALES]
    return [whole for scale in SCALES if (whole := round(value * scale)) != value]


def _estimate_or_error(scenario: Scenario, overrides: Mapping[str, Any], *rest: Any) -> Estimate | InputError:
    try:
        return _estimate(scenario.changed(overrides), *rest)
    except InputError as error:
        return error


def _estimate(
    scenario: Scenario, objectives: Objectives, rate: float, num_requests: int, seed: int
) -> Estimate:
    probe = RateProbe(scenario)

    def look(at: float) -> Judgement:
        runs = [
            replicate(probe, at, seed + number, num_requests, objectives, None) for number in range(SEEDS)
        ]
        return judge([run.observed for run in runs], objectives, CERTAIN)

    def holds(at: float) -> bool | None:
        return None if at < rate / FARTHEST else look(at).state == "pass"

    here = look(rate)
    tried = {rate: here.state == "pass"}
    low, high = search(holds, (rate,), tried, near=1 + TOLERANCE, steps=repeat(STEP), most=rate * FARTHEST)
    at = high if not low else low if math.isinf(high) else math.sqrt(low * high)
    return Estimate(at, {verdict.objective: verdict.value.estimate for verdict in here.verdicts})
