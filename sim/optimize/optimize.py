"""The cheapest deployment that serves a rate within its objectives, with its runners-up."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from servecast.sim.inputs.errors import InputError
from servecast.sim.optimize.candidates import Candidate, Choices
from servecast.sim.optimize.deploy import deployment_files
from servecast.sim.optimize.figures import draw_pareto
from servecast.sim.optimize.offer import Demand, Offer
from servecast.sim.optimize.page import write_optimum_page
from servecast.sim.optimize.prices import Prices, read_prices
from servecast.sim.optimize.race import Race
from servecast.sim.plan.effort import Effort
from servecast.sim.plan.judge import ATTAINMENT, Objectives
from servecast.sim.plan.size import check_target
from servecast.sim.plan.traffic import Traffic
from servecast.sim.report.answer import Answer
from servecast.sim.report.drawing import drawn
from servecast.sim.report.progress import progress_bar
from servecast.sim.report.text import counted, table
from servecast.sim.run.results import check_output, context, engine_lines
from servecast.sim.run.workers import Workers
from servecast.sim.scenario.deployment import Deployment
from servecast.sim.scenario.scenario import Scenario

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_SHORT = {  # in the head of a table
    "tensor_parallel": "TP",
    "pipeline_parallel": "PP",
    "decode_context_parallel": "DCP",
    "data_parallel": "DP",
    "expert_parallel": "EP",
}


@dataclass(frozen=True, slots=True, repr=False)
class Optimum(Answer):
    """The deployments that serve the target, the cheapest first.

    Attributes:
        scenario: its name.
        demand: what is served.
        objectives: within which.
        offers: the candidates that can serve it, best first. Only what may have been the best was planned; of
            the others a short run says about what they serve.
        left_out: those that cannot, and why.
        prices: of the GPUs, and the file that they come from.
        context: what produced the answer, for the best one; empty where there is none.
        files: its ``vllm serve`` line, its Kubernetes Deployment and its values for llm-d, by their names.
        simulated: how many requests this took. reused: how many results were there before.
    """

    scenario: str
    demand: Demand
    objectives: Objectives
    offers: tuple[Offer, ...]
    left_out: tuple[tuple[Candidate, str], ...]
    prices: tuple[Prices, str]
    context: dict[str, Any]
    files: dict[str, str]
    simulated: int
    reused: int

    @property
    def best(self) -> Offer | None:
        """The cheapest; None where no candidate serves the target."""
        return self.offers[0] if self.offers else None

    @property
    def table(self) -> pd.DataFrame:
        """A row an offer: what was chosen, what it serves, and what it costs."""
        return pd.DataFrame(
            {
                **offer.candidate.label,
                "rate_per_replica": (offer.rate or 0.0) / offer.unit.replicas,
                "stage": offer.stage,
                **{key: value for key, value in offer.size.to_json().items() if key != "target_rate"},
                "binding_limit": offer.document["binding_limit"],
                "error_band": offer.bands.max_rate,
                "why": offer.why,
            }
            for offer in self.offers
        )

    @property
    def tpot(self) -> str | None:
        """The objective on TPOT, if any."""
        return next((str(slo) for slo in self.objectives.slos if slo.metric == "tpot"), None)

    @property
    def robust(self) -> Offer | None:
        """The cheapest once each has its own error band in hand."""
        banded = [(each.banded.hour_cost or 0.0, each) for each in self.offers if each.banded is not None]
        return min(banded, key=lambda pair: pair[0])[1] if banded else None

    @property
    def exit_code(self) -> int:
        """0: answered; 1: no candidate serves the target."""
        return 0 if self.offers else 1

    def to_json(self) -> dict[str, Any]:
        """Every offer with its figures, what was left out, and the context of the best one."""
        prices, source = self.prices
        return self.context | {
            "scenario": self.scenario,
            "target_rate": self.demand.target_rate,
            "margin": self.demand.margin,
            "slo": [str(slo) for slo in self.objectives.slos],
            "goodput": None if self.objectives.goodput is None else str(self.objectives.goodput),
            "traffic": self.demand.traffic.to_text(),
            "offers": [offer.to_json() for offer in self.offers],
            "left_out": [{"candidate": dict(each.label), "why": why} for each, why in self.left_out],
            "prices": prices.model_dump(mode="json") | {"source": source},
            "files": self.files,
            "simulated": self.simulated,
            "reused": self.reused,
        }

    def to_text(self) -> str:
        """The best, its runners-up, what was left out and why, and what the best rests on."""
        lines = [*self._best_lines(), ""]
        if self.offers:
            lines += [table(self.columns, self.rows()), ""]
        if self.left_out:
            lines += ["Left out:", *(f"  {candidate}: {why}" for candidate, why in self.left_out)]
        return "\n".join([*lines, *self._rests_on()])

    @property
    def columns(self) -> list[str]:
        """Of the table of offers."""
        return [
            *(_SHORT.get(name, name) for name in self.offers[0].candidate.label),
            *("req/s each", "replicas", "GPUs", f"{self.prices[0].currency}/h", "in hand", "how"),
        ]

    def rows(self) -> list[list[object]]:
        """A row an offer."""
        return [
            [
                *offer.candidate.label.values(),
                (offer.rate or 0.0) / offer.unit.replicas,
                offer.size.replicas,
                offer.size.gpus,
                offer.size.hour_cost,
                f"{offer.size.in_hand:.1%}",
                offer.stage,
            ]
            for offer in self.offers
        ]

    def _best_lines(self) -> list[str]:
        best, demand, money = self.best, self.demand, self.prices[0].currency
        asked = f"{demand.target_rate:g} requests/s at {self.objectives}"
        if best is None:
            return [f"Nothing serves {asked}"]
        size = best.size
        lines = [
            f"Cheapest for {asked}: {best.candidate}",
            f"  {counted(size.replicas, 'replica')}, {counted(size.gpus, best.document['gpu'])}"
            f"{size.money_text(money)}",
            f"  {(best.rate or 0.0) / best.unit.replicas:.4g} requests/s a replica; {size.in_hand:.1%} in "
            f"hand, {demand.margin:.0%} asked for",
            f"  binds: {best.document['binding_limit']}",
        ]
        lines += [f"  {text}" for text in (size.tokens_text(),) if text]
        if best.banded is not None:
            guess = "?" if "max_rate" in best.bands.guessed else ""
            lines.append(
                f"  with the error band of its rate, +-{best.bands.max_rate:.0%}{guess}, in hand: "
                f"{best.banded.to_text()}"
            )
        if self.robust not in (None, best):
            assert self.robust is not None
            assert self.robust.banded is not None
            seems = "is" if self.robust.stage == "planned" else "seems"
            lines.append(
                f"  with each one's error band in hand {self.robust.candidate} {seems} cheapest: "
                f"{self.robust.banded.to_text()}"
            )
        return lines

    def _rests_on(self) -> list[str]:
        prices, source = self.prices
        lines = [f"Prices: of {prices.date}, {source}"]
        if self.best is not None:
            basis, profile = self.context["provenance"]["basis"], self.context["provenance"]["profile"]
            lines.append(f"Rests on: {basis}; profile {profile}; seed {self.context['seed']}")
            lines.append(f"Error bands: {self.best.bands.to_text()}")
            lines += engine_lines(self.context)
            lines += [f"note: {note}" for note in self.context["notes"]]
        done = f"{self.simulated:,} requests simulated"
        return [*lines, f"{done}, {counted(self.reused, 'result')} there already" if self.reused else done]

    def plot(self) -> Figure:
        """Tokens/s a GPU against tokens/s a user sees, with the objective's corner."""
        return drawn(1, lambda axes: draw_pareto(self, axes))

    def to_html(self, path: Path | str, *, date: str | None = None) -> Path:
        """Write the page of the answer, with its plot; see `Answer.to_html`. date: to put on it."""
        return write_optimum_page(path, self, date=date)

    def write_files(self, folder: Path | str) -> list[Path]:
        """Write the files of the best one into a folder."""
        Path(folder).mkdir(parents=True, exist_ok=True)
        paths = [Path(folder) / name for name in self.files]
        for path in paths:
            path.write_text(self.files[path.name], encoding="utf-8")
        return paths


def optimize(
    scenario: Scenario,
    slo: str | Sequence[str] | Objectives | None = None,
    *,
    target_rate: float,
    choices: Choices | None = None,
    margin: float = 0.1,
    out: Path | str = "out/optimize",
    resume: bool = False,
    progress: bool = False,
    effort: Effort | None = None,
    workers: Workers | None = None,
) -> Optimum:
    """Find the cheapest deployment that serves a rate within its objectives.

    Every combination of the choices is looked at in a short run, and those that may win are planned as
    ``plan`` does. Each result is kept as soon as it is there.

    Args:
        slo: latency:statistic:milliseconds, as "ttft:p95:500", several of them, or `Objectives`; without it
            the scenario's own.
        target_rate: requests/s to serve.
        choices: what to choose from, and what GPUs cost.
        margin: share of the target rate to keep in hand.
        out: folder of the results.
        resume: take the results that are there.
        progress: show how far it is.
        effort: how surely and closely to plan.
        workers: where simulations run.

    Raises:
        InputError: a choice is not known or comes twice, a GPU has no price, or a value is out of range.
    """
    check_target(target_rate, margin)
    objectives = slo if isinstance(slo, Objectives) else Objectives.asked(scenario, slo, None, ATTAINMENT)
    if not isinstance(scenario.fleet.replicas, int):
        what = "a list of replicas has no number to choose"
        raise InputError(what, where=f"{scenario.source}: fleet.replicas", fix="Give their number.")
    choices = choices or Choices()
    candidates, prices = choices.of(scenario), choices.prices
    listed, source = read_prices(Path(prices) if prices is not None else None)
    own = scenario.gpu_price if prices is None else None  # which holds for the scenario's own GPU
    costs = [
        own if own and each.scenario.gpu == scenario.gpu else listed.of(each.gpu, source)
        for each in candidates
    ]
    of_own = f"; gpu_hour_cost of the scenario for its own GPU, {own:g}" if own else ""
    check_output(Path(out) / "best" / "vllm-serve.sh", where="--out")
    demand = Demand(target_rate, margin, Traffic.of(scenario))
    race = Race(objectives, effort or Effort(), workers or Workers(), Path(out), resume)
    with progress_bar("optimize", shown=progress) as advance:
        found = race.run(candidates, costs, demand, advance)
    made: dict[str, Any] = {}
    files: dict[str, str] = {}
    if found.offers:
        best = found.offers[0]
        deployment = Deployment.of(best.candidate.scenario)
        made = context(deployment, seed=scenario.seed)
        made["served_name"] = deployment.served_name
        made["notes"] += best.document["notes"]
        files = deployment_files(deployment, best.size.replicas)
    return Optimum(
        scenario.name,
        demand,
        objectives,
        found.offers,
        found.left_out,
        (listed, source if prices is not None else f"shipped with servecast{of_own}"),
        made,
        files,
        found.simulated,
        found.reused,
    )
