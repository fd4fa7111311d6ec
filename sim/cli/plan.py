"""``servecast plan``."""

from __future__ import annotations

import re
import sys
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from cyclopts import Group, Parameter

from servecast.sim.cli.options import WhatIf, check_jobs
from servecast.sim.cli.output import print_json, print_text, today
from servecast.sim.plan import plan as planner
from servecast.sim.plan.effort import Effort
from servecast.sim.run.results import check_output
from servecast.sim.scenario.scenario import Scenario


@Parameter(name="*", group=Group("Objectives", sort_key=8))
@dataclass(frozen=True, kw_only=True, slots=True)
class Objectives:
    """What a rate must meet.

    Attributes:
        slo: latency:statistic:milliseconds, as ttft:p95:500. Can be repeated. Without this and --goodput
            the scenario's own.
        goodput: what a good request meets, as ttft:500 tpot:50.
        attainment: share of requests that must be good.
    """

    slo: list[str] | None = None
    goodput: Annotated[list[str] | None, Parameter(consume_multiple=True)] = None
    attainment: float = 0.95


@Parameter(name="*", group=Group("Target", sort_key=7))
@dataclass(frozen=True, kw_only=True, slots=True)
class Target:
    """What is to be served, and at what price.

    Attributes:
        target_rate: requests a second to serve: prints the replicas, GPUs and money that this takes.
        margin: share of the target rate to keep in hand, as 0.2; without it the error band of the largest
            rate.
        size_fleet: find the fewest replicas behind the scenario's router that serve the target rate. Takes
            longer.
        gpu_hour_cost: what a GPU costs an hour, instead of the scenario's price: prints what tokens cost.
    """

    target_rate: float | None = None
    margin: float | None = None
    size_fleet: bool = False
    gpu_hour_cost: float | None = None


@Parameter(name="*", group=Group("Effort", sort_key=9))
@dataclass(frozen=True, kw_only=True, slots=True)
class Certainty:
    """How surely and how closely to answer.

    Attributes:
        confidence: with which a rate must pass or fail.
        tolerance: relative width to which the answer is bracketed.
        max_num_requests: at most so many counted requests in a replication.
    """

    confidence: float = 0.95
    tolerance: float = 0.03
    max_num_requests: int = 20_000

    @property
    def effort(self) -> Effort:
        """As the planner takes it, with one process."""
        return Effort(self.confidence, self.tolerance, max_requests=self.max_num_requests)


@Parameter(name="*", group=Group("Effort", sort_key=9))
@dataclass(frozen=True, kw_only=True, slots=True)
class Spend(Certainty):
    """How surely and how closely to answer.

    Attributes:
        jobs: processes; -1 is one for each core. The answer does not depend on it.
    """

    jobs: int = -1


def plan(
    scenario: str,
    /,
    *,
    sensitivity: bool = False,
    report: Path | None = None,
    json: bool = False,
    target: Target = Target(),
    objectives: Objectives = Objectives(),
    spend: Spend = Spend(),
    what_if: WhatIf = WhatIf(),  # noqa: B008
) -> int:
    """Find the largest request rate that meets the SLOs, what binds there, and the knee.

    Exits 0 with an answer, 1 if no rate meets the SLOs, 3 if it cannot be told.

    Args:
        scenario: a shipped scenario's name, or a YAML file.
        sensitivity: look at the answer with each assumed constant 20 % lower and higher. Takes longer.
        report: HTML file to write (out/plan-NAME.html, a what-if's changes behind NAME; none with --json).
        json: print one JSON object and nothing else.
    """
    check_jobs(spend.jobs)
    loaded = what_if.load(scenario)
    page = Path("out") / f"plan-{loaded.name}{_changed(loaded)}.html"
    if target.gpu_hour_cost is not None:
        loaded = loaded.changed(gpu_hour_cost=target.gpu_hour_cost)
    if report is None and not json:
        report = page
    check_output(report, where="--report")
    answer = planner.plan(
        loaded,
        objectives.slo,
        goodput=None if objectives.goodput is None else " ".join(objectives.goodput),
        attainment=objectives.attainment,
        target_rate=target.target_rate,
        margin=target.margin,
        size_fleet=target.size_fleet,
        sensitivity=sensitivity,
        progress=sys.stderr.isatty(),
        confidence=spend.confidence,
        tolerance=spend.tolerance,
        max_requests=spend.max_num_requests,
        jobs=spend.jobs,
    )
    if report is not None:
        answer.to_html(report, date=today())
    if json:
        print_json(answer.to_json() | {"report": None if report is None else str(report)})
    else:
        print_text(str(answer), f"Report: {report}")
    return answer.exit_code


def _changed(scenario: Scenario) -> str:
    """What is changed of a scenario, for the name of a file, as "-engine.max_num_seqs=64"."""
    whole = "".join(f"-{field}={value}" for field, value in scenario.changes.items())
    plain = re.sub(r"[^\w.=-]+", "_", whole)
    return plain if len(plain) <= 80 else f"{plain[:70]}-{zlib.crc32(whole.encode()):08x}"
