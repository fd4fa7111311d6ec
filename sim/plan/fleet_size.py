"""How many replicas behind a router serve a request rate: not the rate over that of one, where a router sends
requests to what is cached, or where caches are too small for all."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from servecast.sim.inputs.errors import InputError
from servecast.sim.plan.effort import Effort
from servecast.sim.plan.judge import Objectives
from servecast.sim.plan.prober import ProbedRate, Prober
from servecast.sim.plan.search import fewest
from servecast.sim.run.simulate import RateProbe
from servecast.sim.scenario.scenario import Scenario


@dataclass(frozen=True, slots=True)
class FleetSize:
    """replicas: the fewest that meet the objectives at ``request_rate`` (requests/s over the whole fleet),
    None if ``tried`` has none. tried: number of replicas and what they do at that rate, rising. divided: the
    number that comes of dividing the rate by what was found for one fleet; None if that was not done."""

    request_rate: float
    replicas: int | None
    tried: tuple[tuple[int, ProbedRate], ...]
    divided: int | None = None

    @property
    def note(self) -> str | None:
        """Which number holds where the two differ, and why."""
        if self.replicas is None or self.divided in (None, self.replicas):
            return None
        why = (
            "this router does not split the traffic evenly, or their caches hold too little of it"
            if self.replicas > (self.divided or 0)
            else "behind one router they share bursts, and caches, that each would have to carry alone"
        )
        return (
            f"dividing the rate comes to {self.divided} replicas, as if each had an even share for itself; "
            f"{self.replicas} holds, which was simulated: {why}"
        )

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "request_rate": self.request_rate,
            "replicas": self.replicas,
            "divided": self.divided,
            "note": self.note,
            "tried": [
                {
                    "replicas": count,
                    "state": probe.state,
                    "output_throughput": probe.output_throughput,
                    "reasons": list(probe.reasons),
                    **{each.objective: each.value.estimate for each in probe.verdicts},
                }
                for count, probe in self.tried
            ],
        }

    def to_text(self) -> str:
        """The answer and what was tried."""
        number = "more than were tried" if self.replicas is None else str(self.replicas)
        lines = [f"Replicas behind this router for {self.request_rate:g} requests/s: {number}"]
        for count, probe in self.tried:
            values = ", ".join(f"{each.objective} {each.value.estimate:.4g}" for each in probe.verdicts)
            lines.append(f"  {count}: {probe.state}, {values}")
        if self.note is not None:
            lines.append(f"  {self.note}")
        return "\n".join(lines)


def fleet_size(
    at: Callable[[int], ProbedRate], request_rate: float, *, start: int = 1, most: int = 64
) -> FleetSize:
    """The fewest replicas that pass: doubled from ``start`` until a number passes, then bisected below it.

    Args:
        at: what so many replicas do at the rate. most: where doubling ends.

    Raises:
        InputError: ``start`` is not between 1 and ``most``.
    """
    if not 1 <= start <= most:
        raise InputError(f"{start} replicas to start from", where="fleet.replicas", fix=f"Give 1 to {most}.")
    tried: dict[int, ProbedRate] = {}

    def too_few(count: int) -> bool:
        tried[count] = at(count)
        return tried[count].state != "pass"

    return FleetSize(request_rate, fewest(too_few, start, most), tuple(sorted(tried.items())))


def size_fleet(
    scenario: Scenario,
    objectives: Objectives,
    request_rate: float,
    *,
    divided: int | None = None,
    effort: Effort = Effort(),  # noqa: B008 (frozen)
    progress: Callable[[int], None] | None = None,
) -> FleetSize:
    """The fewest replicas of a scenario's engine that meet the objectives at a rate behind its router.

    Args:
        divided: fleets like the scenario's that carry the rate if each has an even share (`Plan.replicas`).
        effort: as of `capacity.plan`. progress: called with each number tried.

    Raises:
        InputError: the scenario lists different replicas.
    """
    if scenario.fleet.prefill or not isinstance(scenario.fleet.replicas, int):
        what = "a list of replicas, or two pools of them, have no number to vary"
        fix = "Give their number, leave --size-fleet out, or compare pools with servecast optimize."
        raise InputError(what, where=f"{scenario.source}: fleet.replicas", fix=fix)

    def at(count: int) -> ProbedRate:
        if progress is not None:
            progress(count)
        fleet = scenario.fleet.model_copy(update={"replicas": count})
        probe = RateProbe(scenario.model_copy(update={"fleet": fleet}))
        limits = probe.deployment.limits
        return Prober(probe, objectives, limits, scenario.seed, effort).at(request_rate)

    found = fleet_size(at, request_rate, start=scenario.fleet.replicas)
    return replace(found, divided=None if divided is None else divided * scenario.fleet.replicas)
