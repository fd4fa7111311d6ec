"""``servecast compare``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter

from servecast.sim.cli.options import Load, WhatIf, check_jobs, file_or_name
from servecast.sim.cli.output import cell_text, print_json, print_table, progress_bar
from servecast.sim.cli.simulate import print_replicas
from servecast.sim.inputs.errors import InputError

if TYPE_CHECKING:
    from servecast.sim.compare.compare import Comparison, Side
    from servecast.sim.compare.ranking import Place, Ranking, Reason
    from servecast.sim.scenario.scenario import Scenario

_SHOWN = (
    "request_throughput",
    "output_throughput",
    "goodput_share",
    "median_ttft_ms",
    "p95_ttft_ms",
    "p99_ttft_ms",
    "median_tpot_ms",
    "p95_tpot_ms",
    "p99_tpot_ms",
    "p95_itl_ms",
    "median_e2el_ms",
    "p95_e2el_ms",
    "kv_cache_usage_peak",
    "max_num_waiting",
    "num_preemptions",
    "prefix_cache_hit_rate",
)


def compare(
    a: str,
    b: str | None = None,
    /,
    *,
    routers: Annotated[list[str] | None, Parameter(consume_multiple=True)] = None,
    seeds: int = 5,
    stage: str | None = None,
    all_metrics: bool = False,
    report: Path | None = None,
    jobs: int = -1,
    json: bool = False,
    load: Load = Load(),  # noqa: B008 (frozen)
    what_if: WhatIf = WhatIf(),  # noqa: B008
) -> int:
    """Put two results, scenarios or routers side by side.

    Give two of: a result's .json file (of servecast simulate or vllm bench serve) and a scenario, which is
    simulated. Or one scenario with --routers to send the same traffic through each, or one scenario with
    what-ifs to compare it before and after. What was simulated on both sides is compared seed by seed.

    Args:
        a: a result or a scenario.
        b: another one.
        routers: routing policies, and files of EndpointPickerConfigs, as round_robin precise.yaml.
        seeds: how many to simulate, from --seed on.
        stage: compare this stage alone, as concurrency=32.
        all_metrics: print all that the results have in common.
        report: with --routers, write a single-file HTML report.
        jobs: processes; -1 is one for each core.
        json: print one JSON object and nothing else.
    """
    check_jobs(jobs)
    if seeds < 1:
        raise InputError(f"{seeds} seeds", where="--seeds", fix="Give at least 1.")
    chosen = _scenarios(a, b, routers, what_if)

    from servecast.sim.compare import compare as comparing
    from servecast.sim.run.results import check_output, read_result

    if report is not None:
        if routers is None:
            raise InputError("only routers have a report", where="--report", fix="Add --routers.")
        check_output(report, where="--report")
    sides = []
    with progress_bar("compare") as advance:
        for number, (label, source) in enumerate(chosen):
            advance(number / len(chosen), label)
            if isinstance(source, Path):
                sides.append(comparing.Side(label, (read_result(source),)))
            else:
                sides.append(_simulated(label, *source, load=load, seeds=seeds, jobs=jobs))
    found = comparing.compare(sides, stage=stage)
    document = found.to_json()
    if routers is not None:
        from servecast.sim.compare import ranking

        places = ranking.rank(sides)
        why = ranking.reasons(sides, places)
        document |= ranking.to_json(sides, places, why)
        if report is not None:
            _write_report(report, sides, places, why, chosen, load)
    if json:
        print_json(document)
        return 0
    if routers is not None:
        _print_places(sides, places, why)
    if routers is None or all_metrics or stage is not None:
        _print(found, all_metrics=all_metrics)
    if report is not None:
        print(f"\nwritten: {report}")
    return 0


def _scenarios(
    a: str, b: str | None, routers: list[str] | None, what_if: WhatIf
) -> list[tuple[str, Path | tuple[Scenario, dict[str, Any]]]]:
    """What to compare: labels, and result files or scenarios with what was changed in them."""
    if routers is not None:
        if b is not None or len(routers) < 2 or _is_result(a):
            raise InputError(
                "routers are compared on one scenario, at least two of them",
                where="--routers",
                fix="Write for example SCENARIO --routers round_robin least_outstanding.",
            )
        if len(set(routers)) < len(routers):
            raise InputError("a router is named twice", where="--routers", fix="Name each once.")
        changed = [what_if.load(a, {"fleet.router": file_or_name(name)}) for name in routers]
        short = [Path(name).stem for name in routers]
        found = list(zip(short if len(set(short)) == len(short) else routers, changed, strict=True))
        for _name, (scenario, _changes) in found:
            scenario.fleet.check()
        if found[0][1][0].fleet.size < 2:
            raise InputError(
                "one replica leaves a router no choice", where="--routers", fix="Add --replicas 4."
            )
        return list(found)
    if b is not None:
        return [(name, Path(name) if _is_result(name) else what_if.load(name)) for name in (a, b)]
    if _is_result(a) or not what_if.overrides():
        raise InputError(
            "there is nothing to compare with",
            where="B",
            fix="Give a second result or scenario, --routers, or a what-if.",
        )
    before = WhatIf(seed=what_if.seed)
    return [(a, before.load(a)), ("what-if", what_if.load(a))]


def _is_result(name: str) -> bool:
    return name.endswith(".json")


def _simulated(
    label: str, scenario: Scenario, changes: Mapping[str, Any], *, load: Load, seeds: int, jobs: int
) -> Side:
    from joblib import Parallel, delayed

    from servecast.sim.compare.compare import Side

    workload = load.workload(scenario)
    numbers = range(scenario.seed, scenario.seed + seeds)
    run = delayed(_result)
    results = Parallel(n_jobs=jobs)(run(scenario, workload, seed, changes) for seed in numbers)
    return Side(label, tuple(results))


def _result(scenario: Scenario, workload: Any, seed: int, changes: Mapping[str, Any]) -> dict[str, Any]:
    from servecast.sim.run.results import result
    from servecast.sim.run.simulate import simulate
    from servecast.sim.scenario.deployment import Deployment

    deployment = Deployment.of(scenario)
    run = simulate(scenario, seed=seed, workload=workload, deployment=deployment)
    return result(scenario, deployment, run, what_if=changes)


def _write_report(
    path: Path,
    sides: Sequence[Side],
    places: Sequence[Ranking],
    why: Sequence[Reason],
    chosen: Sequence[tuple[str, Any]],
    load: Load,
) -> None:
    from servecast.sim.compare.page import PodsOverTime, write_router_page
    from servecast.sim.run.simulate import simulate

    pods = {}
    for label, (scenario, _changes) in chosen:
        pods[label] = PodsOverTime.of(simulate(scenario, workload=load.workload(scenario)))
    title = f"Routers on {sides[0].results[0]['scenario']}"
    write_router_page(path, sides, places, why, pods, title=title)


def _print_places(sides: Sequence[Side], places: Sequence[Ranking], why: Sequence[Reason]) -> None:
    """Places by metric, a row a stage; what explains them; and the replicas of the first seed."""
    labels = [side.label for side in sides]
    for metric in dict.fromkeys(ranking.metric for ranking in places):
        rows = [
            [ranking.stage or "all", *(_place(ranking.of(label)) for label in labels)]
            for ranking in places
            if ranking.metric == metric
        ]
        print_table(["place, value", *labels], rows, title=f"\n{metric}")
    if any(ranking.places[-1].behind is not None for ranking in places):
        print("\nPlaces are shared where no difference, seed by seed, is beyond doubt (95%).")
    for reason in why:
        where = "" if reason.stage is None else f"{reason.stage}, "
        print(f"{where}{reason.metric}: {reason.to_text()}.")
    for side in sides:
        print_replicas(side.results[0]["fleet_load"]["replicas"], title=f"\nReplicas behind {side.label}")


def _place(place: Place | None) -> str:
    if place is None:
        return "-"
    text = f"{place.rank}. {cell_text(place.value)}"
    return f"{text} ({place.behind_text})" if place.behind_text else text


def _print(found: Comparison, *, all_metrics: bool) -> None:
    first, *others = found.labels
    header = ["metric", first]
    for label in others:
        header += [label, "ratio"] if found.seeds == 1 else [label, "ratio", "difference (95%)"]
    for stage in dict.fromkeys(row.stage for row in found.rows):
        rows: list[list[object]] = []
        for row in found.rows:
            if row.stage != stage or not (all_metrics or row.metric in _SHOWN):
                continue
            cells: list[object] = [row.metric, row.values[0]]
            for value, ratio, difference in zip(
                row.values[1:], row.ratios[1:], row.differences[1:], strict=True
            ):
                cells += [value, ratio]
                if found.seeds > 1:
                    cells.append(
                        None if difference is None else f"{difference.low:+.3g}..{difference.high:+.3g}"
                    )
            rows.append(cells)
        print_table(header, rows, title=f"\n{stage}" if stage else "")
    if found.differences:
        facts = [
            [each.field, *(cell_text(value) for value in each.values), each.may_explain]
            for each in found.differences
        ]
        print_table(["differs", *found.labels, "may explain"], facts, title="\nWhat differs between the runs")
    if found.unstated:
        print(f"\nnot stated on every side: {', '.join(found.unstated)}")
