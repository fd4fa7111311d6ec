"""What a candidate comes to: the rate that it serves, and what the target takes of it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from servecast.sim.hardware.error_band import Bands
from servecast.sim.optimize.candidates import Candidate
from servecast.sim.plan.size import Size, Unit
from servecast.sim.plan.traffic import Traffic
from servecast.sim.run.kept import Document

Stage = Literal["planned", "short run"]
JUST_BELOW = 1 - 1e-3  # of a rate that was shown not to pass


@dataclass(frozen=True, slots=True)
class Demand:
    """What is to be served: ``target_rate`` (requests/s) of some traffic, with ``margin`` (a share of it) in
    hand."""

    target_rate: float
    margin: float
    traffic: Traffic

    @property
    def rate(self) -> float:
        """With the margin."""
        return self.target_rate * (1 + self.margin)


@dataclass(frozen=True, slots=True)
class Point:
    """A rate that was looked at. user_speed: tokens/s that a user sees at the SLO's statistic of TPOT, in the
    mean without one. gpu_speed: output tokens/s of a GPU."""

    user_speed: float
    gpu_speed: float
    state: str


@dataclass(frozen=True, slots=True)
class Offer:
    """A candidate that runs.

    Attributes:
        number: its place in the grid. unit: what is bought of it as a whole.
        document: the plan that was made of it, with its GPU and error bands, as plain values.
        stage: "planned" for a whole plan, "short run" where that was enough to see that it loses.
        lost_at: a rate at which it was shown to lose, None where there was no need to look.
        why: why it was stopped; empty where it was planned.
    """

    number: int
    candidate: Candidate
    unit: Unit
    demand: Demand
    document: Document
    stage: Stage = "short run"
    lost_at: float | None = None
    why: str = ""

    @property
    def rate(self) -> float | None:
        """The largest rate of a unit, requests/s; of a short run an estimate. None where none passes."""
        rate: float | None = self.document["max_request_rate"]
        return rate if rate is None or self.lost_at is None else min(rate, JUST_BELOW * self.lost_at)

    @property
    def most_rate(self) -> float:
        """At which the candidate failed, requests/s."""
        failed: float | None = self.document["interval"][1]
        return math.inf if failed is None else failed

    @property
    def size(self) -> Size:
        """What the demand takes of it."""
        assert self.rate is not None
        return Size(self.demand.target_rate, self.demand.margin, self.rate, self.unit, self.demand.traffic)

    @property
    def banded(self) -> Size | None:
        """The same with the error band of the largest rate in hand, if that is more than the margin; None
        where it is not known."""
        band = self.bands.max_rate
        if band is None or self.rate is None:
            return None
        return Size(
            self.demand.target_rate, max(band, self.demand.margin), self.rate, self.unit, self.demand.traffic
        )

    @property
    def bands(self) -> Bands:
        """Relative error bands by metric."""
        return Bands(**self.document["bands"])

    @property
    def rank(self) -> tuple[float, float, int]:
        """Smaller is better: by cost, then by what it carries, then by its place in the grid."""
        if self.rate is None:
            return math.inf, 0.0, self.number
        return round(self.size.hour_cost or 0.0, 9), -self.size.units * self.rate, self.number

    def rate_to_beat(self, best: Offer) -> float | None:
        """What a unit of this must serve to rank above another, requests/s; None if it cannot for its price.

        With as many units as the other's cost buys: fewer units must carry the demand; as much money must
        carry more than the other does.
        """
        price, theirs = self.unit.hour_cost, best.size.hour_cost
        assert price
        assert theirs is not None
        assert best.rate is not None
        affordable = math.floor(theirs / price + 1e-9)
        as_dear = math.isclose(affordable * price, theirs)
        cheaper = affordable - as_dear
        needed = [self.demand.rate / cheaper] if cheaper else []
        if as_dear:
            needed.append(max(best.size.units * best.rate, self.demand.rate) / affordable)
        return min(needed, default=None)

    def points(self, tpot: str | None) -> list[Point]:
        """The rates that were looked at and are sustained, rising. tpot: the objective on TPOT, if any."""
        found = []
        for probe in self.document["probes"]:
            verdicts = {each["objective"]: each["value"]["estimate"] for each in probe["verdicts"]}
            token_s = probe["tpot_s"] if tpot is None else (verdicts.get(tpot) or 0.0) / 1000
            if token_s and not probe["saturated"]:
                speed = probe["output_throughput"] / self.unit.gpus
                found.append(Point(1 / token_s, speed, probe["state"]))
        return found

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        rate, banded = self.rate, self.banded
        return {
            "candidate": dict(self.candidate.label),
            "gpu": self.document["gpu"],
            "stage": self.stage,
            "why": self.why,
            "max_request_rate": rate,
            "rate_per_replica": None if rate is None else rate / self.unit.replicas,
            "size": None if rate is None else self.size.to_json(),
            "size_with_error_band": None if banded is None else banded.to_json(),
            "binding_limit": self.document["binding_limit"],
            "binding_evidence": self.document["binding_evidence"],
            "error_bands": self.document["bands"],
            "points": [asdict(each) for each in self.points(None)],
        }


def ranked(offers: Sequence[Offer]) -> list[Offer]:
    """The best first."""
    return sorted(offers, key=lambda offer: offer.rank)
