"""``servecast plan``."""

from __future__ import annotations

from collections.abc import Mapping
from math import isnan
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter

from servecast.sim.cli.options import WhatIf, check_jobs
from servecast.sim.cli.output import cell_text, print_json, print_table, progress_bar
from servecast.sim.inputs.errors import InputError

if TYPE_CHECKING:
    from servecast.sim.plan.capacity import Plan
    from servecast.sim.plan.fleet_size import FleetSize
    from servecast.sim.plan.prefix_slots import PrefixSlots
    from servecast.sim.report.figures import SweepPoint
    from servecast.sim.scenario.scenario import Scenario


def plan(
    scenario: str,
    /,
    *,
    slo: list[str] | None = None,
    goodput: Annotated[list[str] | None, Parameter(consume_multiple=True)] = None,
    attainment: float = 0.95,
    confidence: float = 0.95,
    tolerance: float = 0.03,
    max_num_requests: int = 20_000,
    target_rate: float | None = None,
    size_fleet: bool = False,
    gpu_hour_cost: float | None = None,
    sensitivity: bool = False,
    report: Path | None = None,
    jobs: int = -1,
    json: bool = False,
    what_if: WhatIf = WhatIf(),  # noqa: B008 (frozen)
) -> int:
    """Find the largest request rate that meets the SLOs, what binds there, and the knee.

    Exits 0 with an answer, 1 if no rate meets the SLOs, 3 if it cannot be told.

    Args:
        scenario: a shipped scenario's name, or a YAML file.
        slo: latency:statistic:milliseconds, as ttft:p95:500. Can be repeated. Without this and --goodput
            the scenario's own.
        goodput: what a good request meets, as ttft:500 tpot:50.
        attainment: share of requests that must be good.
        confidence: with which a rate must pass or fail.
        tolerance: relative width to which the answer is bracketed.
        max_num_requests: at most so many counted requests in a replication.
        target_rate: requests a second to serve: prints the headroom, and the replicas for it.
        size_fleet: find the fewest replicas behind the scenario's router that serve the target rate. Takes
            longer.
        gpu_hour_cost: what a GPU costs an hour: prints the cost of a million output tokens.
        sensitivity: look at the answer with each assumed constant 20 % lower and higher. Takes longer.
        report: HTML file to write (out/plan-NAME.html, unless --json).
        jobs: processes; -1 is one for each core. The answer does not depend on it.
        json: print one JSON object and nothing else.
    """
    check_jobs(jobs)
    if size_fleet and target_rate is None:
        raise InputError("no rate to size the fleet for", where="--size-fleet", fix="Add --target-rate.")
    loaded, changes = what_if.load(scenario)

    from servecast.sim.metrics.slo import SLO, Goodput
    from servecast.sim.plan import capacity
    from servecast.sim.plan.effort import Effort
    from servecast.sim.plan.judge import Objectives
    from servecast.sim.plan.prefix_slots import prefix_slots
    from servecast.sim.run.results import cautions, check_output, context
    from servecast.sim.run.simulate import RateProbe

    if report is None and not json:
        report = Path("out") / f"plan-{loaded.name}.html"
    if report is not None:
        check_output(report, where="--report")
    slos = tuple(SLO.parse(text) for text in slo or ())
    good = Goodput.parse(" ".join(goodput)) if goodput is not None else None
    if not slos and good is None:
        slos = loaded.slos
        good = None if slos else loaded.goodput_limits
    probe = RateProbe(loaded)
    deployment = probe.deployment
    effort = Effort(confidence, tolerance, max_requests=max_num_requests, jobs=jobs)
    gpu_cost = loaded.gpu_hour_cost if gpu_hour_cost is None else gpu_hour_cost
    gpus = loaded.engine.tensor_parallel_size * loaded.fleet.size
    with progress_bar("plan") as advance:
        advance(0.0, "first look")
        start = capacity.first_guess(probe, loaded.seed)
        found = capacity.plan(
            probe,
            Objectives(slos, good, attainment),
            effort=effort,
            limits=deployment.limits,
            start_rate=start,
            seed=loaded.seed,
            target_rate=target_rate,
            hour_cost=None if gpu_cost is None else gpu_cost * gpus,
            progress=lambda rate, state, share: advance(share, f"{rate:g} requests/s {state}"),
        )
        shown = found.best or found.probes[0]
        run = probe(shown.rate, loaded.seed, shown.num_requests)
        slots = prefix_slots(
            loaded.open_loop().stages[0].streams[0],
            run,
            kv_tokens=deployment.config.num_gpu_blocks * deployment.config.block_size,
            replicas=loaded.fleet.size,
        )
        points = sweep_points(loaded)
        sized = None
        if size_fleet and target_rate is not None:
            from servecast.sim.plan import fleet_size

            sized = fleet_size.size_fleet(
                loaded,
                found.objectives,
                target_rate,
                divided=found.replicas,
                effort=effort,
                progress=lambda count: advance(1.0, f"{count} replicas at {target_rate:g} requests/s"),
            )
        changed = []
        if sensitivity and found.best is not None:
            from servecast.sim.plan import sensitivity as assumed

            advance(1.0, "sensitivity to the assumptions")
            changed = assumed.sensitivity(
                loaded,
                found.objectives,
                rate=found.best.rate,
                num_requests=found.best.num_requests,
                changed=changes,
                seed=loaded.seed,
                jobs=jobs,
            )
    document = context(deployment, seed=loaded.seed, what_if=changes) | found.to_json()
    document["slo"] = document["objectives"]["slos"]
    document["knee"] = {"request_rate": found.knee, "concurrency": _concurrency_knee(points)}
    document["notes"] = [*loaded.notes, *found.notes, *cautions(deployment, run)]
    document["sensitivity"] = [each.to_json() for each in changed] if sensitivity else None
    document["prefix_slots"] = None if slots is None else slots.to_json()
    document["fleet_size"] = None if sized is None else sized.to_json()
    document["report"] = None if report is None else str(report)
    if report is not None:
        from servecast.sim.report.plan_page import write_report

        report.parent.mkdir(parents=True, exist_ok=True)
        write_report(report, found, context=_report_context(document), run=run, sweep=points)
    if json:
        print_json(document)
    else:
        _print(document, found, slots, sized)
    return found.exit_code


def sweep_points(scenario: Scenario) -> list[SweepPoint]:
    """The scenario's own closed-loop sweep, simulated, beside what was reported; empty where it has none."""
    from servecast.sim.metrics.metrics import summary
    from servecast.sim.metrics.warmup import select
    from servecast.sim.report.figures import SweepPoint
    from servecast.sim.run.simulate import simulate
    from servecast.sim.traffic.arrivals import ClosedLoop

    laws = [stage.streams[0].arrivals for stage in scenario.stages().stages]
    levels = [law.concurrency for law in laws if isinstance(law, ClosedLoop)]
    if scenario.sweep is None or len(levels) < len(laws):
        return []
    run = simulate(scenario)
    throughput = [summary(select(run, stage=index))["output_throughput"] for index in range(len(levels))]
    reported = _reported_throughput(scenario)
    return [
        SweepPoint(level, value, reported.get(level)) for level, value in zip(levels, throughput, strict=True)
    ]


def _reported_throughput(scenario: Scenario) -> dict[int, float]:
    """Output tokens/s by concurrency, as far as the scenario's sweep was reported."""
    from servecast.sim.scenario.reported import read_rows

    found = {}
    for table in scenario.reported:
        columns = [name for name, column in table.columns.items() if column.metric == "output_throughput"]
        if table.keys == ("concurrency",) and table.workload is None and columns:
            for row in read_rows(table):
                if columns[0] not in row.excluded and not isnan(row.values[columns[0]]):
                    found[int(row.keys["concurrency"])] = row.values[columns[0]]
    return found


def _concurrency_knee(points: list[SweepPoint]) -> int | None:
    from servecast.sim.metrics.knee import closed_loop_knee

    return closed_loop_knee([p.concurrency for p in points], [p.output_throughput for p in points])


def _report_context(document: Mapping[str, Any]) -> Any:
    from servecast.sim.report.plan_page import ReportContext

    objectives = document["slo"] or [f"goodput {document['objectives']['goodput']}"]
    band, provenance = document["error_band"], document["provenance"]
    return ReportContext(
        title=f"servecast plan: {document['scenario']}",
        question=f"How many requests a second can {document['model_id']} on {document['gpu']} serve at "
        f"{' and '.join(objectives)}?",
        band="The error of this profile is not known." if band is None else f"Latencies within {band:.0%}.",
        run_context={
            **(document["run_context"] or {}),
            **{f"what-if: {field}": value for field, value in document["what_if"].items()},
        },
        provenance={
            "basis": provenance["basis"],
            "profile": provenance["profile"],
            "vLLM rules": document["engine"]["rules"],
            "seed": document["seed"],
            "servecast": document["servecast_version"],
            **{f"note {number}": note for number, note in enumerate(document["notes"], 1)},
        },
        assumptions=_assumptions(document),
    )


def _assumptions(document: Mapping[str, Any]) -> list[dict[str, object]]:
    """Each assumption with what 20 % of it changes, as far as that was asked for."""
    rows = []
    for assumption in document["assumptions"]:
        row = {"assumed": assumption["name"], "value": assumption["value"], "origin": assumption["origin"]}
        if document["sensitivity"] is not None:
            row["changes the answer by"] = "; ".join(
                f"{each['scaled']:g}: {_effect(each)}"
                for each in document["sensitivity"]
                if each["name"] == assumption["name"]
            )
        rows.append(row)
    return rows


def _effect(change: Mapping[str, Any]) -> str:
    rate = change["max_request_rate"]
    return change["error"] if rate is None else f"{rate:+.1%}"


def _print(
    document: Mapping[str, Any], found: Plan, slots: PrefixSlots | None, sized: FleetSize | None
) -> None:
    header = ["requests/s", "verdict", *(v.objective for v in found.probes[0].verdicts), "tok/s", "why not"]
    print_table(
        header,
        [
            [
                probe.rate,
                probe.state,
                *(verdict.value.estimate for verdict in probe.verdicts),
                probe.output_throughput,
                "; ".join(probe.reasons),
            ]
            for probe in found.probes
        ],
    )
    rate, (low, high) = found.max_request_rate, found.interval
    print()
    if rate is None:
        print(f"Largest request rate: none ({found.state})")
    else:
        end = "no rate that was tried fails" if high is None else f"{high:g} fails"
        print(f"Largest request rate: {rate:g} requests/s")
        print(f"  {found.state}: {low:g} passes, {end}, with {found.confidence:.0%} confidence")
    print(f"What binds: {found.binding.limit}")
    for reason in found.binding.reasons:
        print(f"  {reason}")
    knee = document["knee"]
    concurrency = "" if knee["concurrency"] is None else f"; closed loop: concurrency {knee['concurrency']}"
    print(f"Knee: {cell_text(knee['request_rate'])} requests/s{concurrency}")
    if found.headroom is not None:
        print(
            f"For {found.target_rate:g} requests/s: {found.replicas} of these, headroom {found.headroom:.2f}"
        )
    if sized is not None:
        print(sized.to_text())
    if slots is not None:
        at = found.best or found.probes[0]
        print(f"Prefix slots at {at.rate:g} requests/s:")
        for line in slots.to_text().splitlines():
            print(f"  {line}")
    if found.cost_per_million_output_tokens is not None:
        print(f"Cost of a million output tokens: {found.cost_per_million_output_tokens:.3g}")
    if document["sensitivity"]:
        _print_sensitivity(document["sensitivity"])
    band, provenance = document["error_band"], document["provenance"]
    within = "error not known" if band is None else f"error band +-{band:.0%}"
    print(f"Rests on: {provenance['basis']}; profile {provenance['profile']}; {within}; seed {found.seed}")
    for note in document["notes"]:
        print(f"note: {note}")
    print(f"Report: {document['report']}")


def _print_sensitivity(changes: list[Mapping[str, Any]]) -> None:
    objectives = list(next((each["values"] for each in changes if each["values"]), {}))
    rows = [
        [
            each["name"],
            each["assumed"],
            each["scaled"],
            _effect(each),
            *(f"{each['values'][name]:+.1%}" if name in each["values"] else None for name in objectives),
        ]
        for each in changes
    ]
    title = "\nWhat the assumptions are worth (change of the answer, and of the objectives at it)"
    print_table(["assumed", "value", "instead", "max rate", *objectives], rows, title=title)
    print()
