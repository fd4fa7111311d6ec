"""The race of candidates: short runs for all, whole plans for the few that may win.

All see the same traffic. A short run of each says roughly what it serves, and the most promising one is
planned. Then each of the others, best first, has to serve the rate at which it would beat the best so far,
for its price: that is a single rate, at the full confidence of a plan. Only what does is planned, too.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from joblib import delayed

from servecast.sim.inputs.errors import InputError
from servecast.sim.optimize.candidates import Candidate
from servecast.sim.optimize.offer import Demand, Offer, ranked
from servecast.sim.plan import capacity
from servecast.sim.plan.effort import Effort
from servecast.sim.plan.judge import Objectives
from servecast.sim.plan.prober import Prober
from servecast.sim.plan.size import Unit
from servecast.sim.report.progress import Advance
from servecast.sim.run.kept import Document, fingerprint, kept
from servecast.sim.run.results import write_result
from servecast.sim.run.simulate import RateProbe
from servecast.sim.run.workers import Workers, parallel
from servecast.sim.scenario.scenario import Scenario

SHORT = Effort(confidence=0.5, tolerance=0.1, replications=(1,), least_requests=400)
SLACK = 2.0  # times the rate that a short run failed at: nothing is thought to serve more


@dataclass(frozen=True, slots=True)
class Outcome:
    """offers: the candidates that run, best first. left_out: those that do not, and why. simulated: requests,
    of what was not there before. reused: results that were."""

    offers: tuple[Offer, ...]
    left_out: tuple[tuple[Candidate, str], ...]
    simulated: int
    reused: int


@dataclass(slots=True)
class Race:
    """Runs it, and keeps every result in a folder as soon as it is there.

    Attributes:
        objectives, effort: of the whole plans. workers: where simulations run.
        out: the folder. resume: take what is there.
    """

    objectives: Objectives
    effort: Effort
    workers: Workers
    out: Path
    resume: bool
    simulated: int = 0
    reused: int = 0

    def run(
        self, candidates: Sequence[Candidate], prices: Sequence[float], demand: Demand, advance: Advance
    ) -> Outcome:
        """The race of candidates, a GPU of which costs so much an hour."""
        with parallel(self.workers) as run:
            documents = self._screen(candidates, run, advance)
            offers, left_out = list[Offer](), list[tuple[Candidate, str]]()
            for number, (candidate, price) in enumerate(zip(candidates, prices, strict=True)):
                document = documents[number]
                unit = Unit.of(candidate.scenario, price)
                if "error" in document:
                    left_out.append((candidate, str(document["error"])))
                else:
                    offers.append(Offer(number, candidate, unit, demand, document))
            found: list[Offer] = []
            best: Offer | None = None
            for number, offer in enumerate(ranked(offers)):
                advance(0.5 + number / len(offers) / 2, str(offer.candidate))
                offer = self._decide(offer, best)
                found.append(offer)
                if offer.stage == "planned" and (best is None or offer.rank < best.rank):
                    best = offer
        lost = [offer for offer in found if offer.rate is None]
        left_out += [(offer.candidate, _missed(offer)) for offer in lost]
        able = ranked([offer for offer in found if offer.rate is not None])
        return Outcome(tuple(able), tuple(left_out), self.simulated, self.reused)

    def _screen(
        self, candidates: Sequence[Candidate], run: Callable[[Any], Any], advance: Advance
    ) -> dict[int, Document]:
        found: dict[int, Document] = {}
        waiting = []
        for number, candidate in enumerate(candidates):
            document = self._kept("short run", candidate.scenario)
            if document is None:
                waiting.append(number)
            else:
                found[number] = document
        tasks = (
            delayed(_numbered)(number, candidates[number].scenario, self.objectives) for number in waiting
        )
        for number, made in run(tasks):
            found[number] = self._keep("short run", candidates[number].scenario, made)
            advance(len(found) / len(candidates) / 2, f"{len(found)} of {len(candidates)} short runs")
        return found

    def _decide(self, offer: Offer, best: Offer | None) -> Offer:
        """A candidate planned, or stopped where it cannot beat the best so far."""
        scenario, effort = offer.candidate.scenario, replace(self.effort, jobs=self.workers.jobs)
        if offer.rate is None:
            return offer
        if best is not None:
            needed = offer.rate_to_beat(best)
            if needed is None:
                return replace(offer, why=f"one alone costs more than {best.candidate}")
            beat = f"{needed:.4g} requests/s would beat {best.candidate}"
            if needed > SLACK * offer.most_rate:
                return replace(offer, why=f"{beat}; a short run failed at {offer.most_rate:.4g}")
            asked = scenario, self.objectives, effort, needed
            looked = self._done("challenge", scenario, partial(challenge, *asked), rate=needed)
            if looked["state"] != "pass":
                return replace(offer, lost_at=needed, why=f"{beat}, and are too many: {looked['reasons']}")
        document = self._done("plan", scenario, partial(planned, scenario, self.objectives, effort))
        return replace(offer, document=document, stage="planned")

    def _done(self, stage: str, scenario: Scenario, work: Callable[[], Document], **more: float) -> Document:
        document = self._kept(stage, scenario, **more)
        return self._keep(stage, scenario, work(), **more) if document is None else document

    def _kept(self, stage: str, scenario: Scenario, **more: float) -> Document | None:
        document = kept(self._path(stage, scenario, more)) if self.resume else None
        self.reused += document is not None
        return document

    def _keep(self, stage: str, scenario: Scenario, document: Document, **more: float) -> Document:
        self.simulated += document.get("simulated", 0)
        write_result(self._path(stage, scenario, more), document)
        return document

    def _path(self, stage: str, scenario: Scenario, more: Mapping[str, float]) -> Path:
        effort = SHORT if stage == "short run" else replace(self.effort, jobs=1)
        asked = {"objectives": str(self.objectives), "attainment": self.objectives.attainment}
        what = {"stage": stage, "effort": asdict(effort), **asked, **more}
        return self.out / f"{fingerprint(what, scenario)}.json"


def _numbered(number: int, scenario: Scenario, objectives: Objectives) -> tuple[int, Document]:
    """A short run, or why there is none."""
    try:
        return number, planned(scenario, objectives, SHORT)
    except InputError as error:
        return number, {"error": error.what if error.where == "max_model_len" else str(error)}


def planned(scenario: Scenario, objectives: Objectives, effort: Effort) -> Document:
    """The largest rate of a scenario, as `capacity.plan` finds it, without the knee."""
    probe = RateProbe(scenario)
    deployment, seed = probe.deployment, scenario.seed
    start = capacity.first_guess(probe, seed)
    limits = deployment.limits
    found = capacity.plan(
        probe, objectives, effort=effort, limits=limits, start_rate=start, seed=seed, knee=False
    )
    document = found.to_json()
    document["simulated"] += capacity.BURST
    return document | {"gpu": deployment.gpu.name, "bands": asdict(deployment.bands)}


def challenge(scenario: Scenario, objectives: Objectives, effort: Effort, rate: float) -> Document:
    """Whether a scenario serves a rate (requests/s)."""
    probe = RateProbe(scenario)
    prober = Prober(probe, objectives, None, scenario.seed, effort)
    found = prober.at(rate)
    return {"state": found.state, "reasons": "; ".join(found.reasons), "simulated": prober.simulated}


def _missed(offer: Offer) -> str:
    """Why no rate passes."""
    lowest = offer.document["probes"][0]
    return f"no rate meets the objectives: at {lowest['rate']:g} requests/s {'; '.join(lowest['reasons'])}"
